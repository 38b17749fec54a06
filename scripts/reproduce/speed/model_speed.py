"""Speed and memory of ReZero against GPT-2, Llama and nn.TransformerEncoder at equal dimensions.

    python scripts/reproduce/run.py model_speed

Everything is a ratio within one round: the arms take turns, a ratio is the median over the rounds of several processes, and
GPT-2 as transformers ships it (sdpa, gelu_new, dropout 0) is 1. One thread and its processor time, so that other work on
the machine counts less; no memory goes back to the system. ReZero is folded (`fold_resweight_`) for inference. Memory is
what autograd saves for the backward pass, in units of width numbers for each token and layer.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.record import RESULTS, read_json, save
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, fold_resweight_


VOCABULARY = 264
# layers, width, heads, tokens, batch of training, batch of inference
CASES = {
    "12 x 512": (12, 512, 8, 512, 2, 1),
    "64 x 256": (64, 256, 4, 128, 4, 1),
    "128 x 256": (128, 256, 4, 128, 4, 1),
    "128 x 64": (128, 64, 4, 128, 4, 2),
}
# glibc reads them when a process starts: memory is kept, as the price of page faults is the host's
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}
MEASURES = ["train", "train_bf16", "infer", "one_token", "generate", "saved"]


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder, pre-norm and causal, as a language model."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.embed, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(tokens, width)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        x = self.embed(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return self.head(self.layers(x, mask, is_causal=True))


def builders(layers: int, width: int, heads: int, tokens: int) -> dict[str, Callable[[], nn.Module]]:
    """The models, none of them built yet."""
    gpt2 = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": tokens, "vocab_size": VOCABULARY}
    gpt2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"bos_token_id": 0, "eos_token_id": None}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"max_position_embeddings": tokens, "vocab_size": VOCABULARY}
    llama = {"intermediate_size": 8 * width // 3, "bos_token_id": 0, "eos_token_id": None}
    rezero = {"position_embedding_type": "learned", "resweight_init": 0.1, "eos_token_id": None}
    return {
        "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        "GPT-2, fused gelu": lambda: GPT2LMHeadModel(GPT2Config(**gpt2, activation_function="gelu_pytorch_tanh")),
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **llama)),
        "nn.TransformerEncoder": lambda: TorchEncoder(layers, width, heads, tokens),
        "ReZero, learned positions": lambda: ReZeroForCausalLM(ReZeroConfig(**sizes, **rezero)),
        "ReZero": lambda: ReZeroForCausalLM(ReZeroConfig(**sizes | rezero | {"position_embedding_type": "rotary"})),
        "ReZero, relu": lambda: ReZeroForCausalLM(ReZeroConfig(**sizes, **rezero, hidden_act="relu")),
    }


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V)."""
    return model(ids) if isinstance(model, TorchEncoder) else model(ids, use_cache=False).logits


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy."""
    return nn.functional.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def training_step(model: nn.Module, ids: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """Forward, backward and a step of fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def inference(model: nn.Module, ids: torch.Tensor, measure: str) -> Callable[[], object]:
    """A forward pass over all tokens or one, or 32 new tokens one at a time behind a prompt of 16."""
    model.eval()
    if isinstance(model, ReZeroForCausalLM):
        fold_resweight_(model)
    if measure == "generate":
        options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(ids[:, :16], attention_mask=torch.ones_like(ids[:, :16]), **options)
    inputs = ids[:, :1] if measure == "one_token" else ids
    return torch.inference_mode()(lambda: logits_of(model, inputs))


def saved_activations(model: nn.Module, ids: torch.Tensor, layers: int, width: int) -> float:
    """Numbers kept for the backward pass, for each token, layer and unit of width."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, ids)
    assert loss.requires_grad
    return sum(kept.values()) / 4 / (ids.numel() * layers * width)


def seconds_of(case: Sequence[int], name: str, rounds: int) -> dict[str, list[float]]:
    """Processor time of every arm in each round."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers, width, heads, tokens, batch, small_batch = case
    models, ids = builders(layers, width, heads, tokens), torch.randint(0, 256, (batch, tokens))
    if name == "generate":
        del models["nn.TransformerEncoder"]
    if name.startswith("train"):
        steps = {arm: training_step(build(), ids, name == "train_bf16") for arm, build in models.items()}
    else:
        rows = ids[: 1 if name in ("one_token", "generate") else small_batch]
        steps = {arm: inference(build(), rows, name) for arm, build in models.items()}
    times = {arm: [] for arm in steps}
    for _ in range(1 + (rounds if name.startswith("train") else 5 * rounds)):
        for arm, step in steps.items():
            start = time.process_time()
            step()
            times[arm].append(time.process_time() - start)
    return {arm: taken[1:] for arm, taken in times.items()}


def speeds(case: str, name: str, rounds: int, processes: int) -> dict[str, dict[str, float]]:
    """Milliseconds and speed against GPT-2 of every arm, over `rounds` in each of several fresh processes."""
    times = defaultdict(list)
    for _ in range(processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            for arm, taken in fresh.submit(seconds_of, CASES[case], name, rounds).result().items():
                times[arm] += taken
    ratios = {arm: median(a / b for a, b in zip(times["GPT-2"], times[arm], strict=True)) for arm in times}
    return {arm: {"ms": round(1000 * median(times[arm]), 2), "speed": round(ratios[arm], 3)} for arm in times}


def saved(case: str) -> dict[str, dict[str, float]]:
    """What every arm saves."""
    layers, width, heads, tokens, batch, _ = CASES[case]
    ids = torch.randint(0, 256, (batch, tokens))
    models = builders(layers, width, heads, tokens)
    return {arm: {"saved": round(saved_activations(build(), ids, layers, width), 2)} for arm, build in models.items()}


def table(results: dict) -> list[list[str]]:
    """One row for each measure at each size, one column for each model."""
    names = {
        "train": "training step, fp32",
        "train_bf16": "training step, bf16",
        "infer": "inference",
        "one_token": "inference, 1 token",
        "generate": "32 tokens, one at a time",
        "saved": "saved numbers / (tokens x layers x width)",
    }
    arms = list(next(iter(results["results"].values()))["train"])
    rows = [["speed against GPT-2 in transformers", *arms]]
    for name, label in names.items():
        for case, found in ((case, found) for case, found in results["results"].items() if name in found):
            values = [found[name].get(arm, {}).get("saved" if name == "saved" else "speed") for arm in arms]
            rows.append([f"{label}: {case}", *("" if value is None else f"{value:.2f}" for value in values)])
    return rows


def goals(results: dict) -> list[list[str]]:
    """Goals of speed and memory against GPT-2 as transformers ships it: what was set, what was measured, and a note."""

    def ratio(measure: str, case: str, arm: str = "ReZero, learned positions") -> str:
        return f"{results['results'][case][measure][arm]['speed']:.2f}"

    def with_relu(measure: str) -> str:
        return f"with relu {ratio(measure, '128 x 64', 'ReZero, relu')}"

    saved = results["results"]["12 x 512"]["saved"]["ReZero, learned positions"]["saved"]
    return [
        ["12 x 512, training, fp32, times GPT-2", "1.10", ratio("train", "12 x 512"), ""],
        ["12 x 512, training, bf16", "1.4", ratio("train_bf16", "12 x 512"), ""],
        ["128 x 64, training, fp32", "1.4", ratio("train", "128 x 64"), f"gelu; {with_relu('train')}"],
        ["128 x 64, training, bf16", "2", ratio("train_bf16", "128 x 64"), ""],
        ["12 x 512, inference, folded", "1.05", ratio("infer", "12 x 512"), ""],
        ["128 x 64, inference, folded", "1.35", ratio("infer", "128 x 64"), f"gelu; {with_relu('infer')}"],
        ["128 x 64, one token", "2.5", ratio("one_token", "128 x 64"), with_relu("one_token")],
        ["saved numbers per token, layer and width", "14.2", f"{saved:.1f}", ""],
    ]


def main() -> None:
    """Measure what the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="in each process; five times as many without training")
    parser.add_argument("--processes", type=int, default=2, help="fresh ones, one after the other")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--output", type=Path, default=RESULTS / "model_speed.json")
    args = parser.parse_args()
    os.environ.update(KEEP_MEMORY)
    results = read_json(args.output) or {"results": {}}
    for case in args.cases:
        for name in args.measures:
            found = results["results"].setdefault(case, {})
            if name not in found:
                found[name] = saved(case) if name == "saved" else speeds(case, name, args.rounds, args.processes)
                save(args.output, results)
            print(
                case, name, {arm: row.get("speed", row.get("saved")) for arm, row in found[name].items()}, flush=True
            )
