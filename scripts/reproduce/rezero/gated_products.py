"""Stock models with residual weights in their first steps: which of them diverge, and what bounds them.

    python scripts/reproduce/run.py gated_products --train_file enwik8_prefix.xz

`rezero_` of Llama (SwiGLU), Qwen3 (SwiGLU, norms of queries and keys) and GPT-2 (GELU), with and without the final norm, and with
four other ways to bound the first steps, the final norm kept. A run counts as diverged when the root mean square of its stream
passes 100, or its loss is no number. A repeated call goes on where it stopped.
"""

import argparse
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from common.record import RESULTS, read_json, save
from hf_rezero import load_corpus, rezero_
from hf_rezero.structure.parameters import is_resweight


DIVERGED = 100.0
BOUNDS = {
    "none": {},
    "no final norm": {"final_norm": "remove"},
    "gates at a tenth of the rate": {"gate_rate": 0.1},
    "gates at most 1 / (2 L)": {"cap": True},
    "warmup of 20 steps": {"warmup": 20},
    "gradients clipped to 1": {"clip": 1.0},
}


def build(name: str, args: argparse.Namespace, final_norm: str = "keep") -> nn.Module:
    """A stock model of about the same size, with residual weights at 0."""
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": 2}
    words = {"vocab_size": 264, "bos_token_id": None, "eos_token_id": None}
    gated = {**sizes, **words, "intermediate_size": 5 * args.hidden_size // 2}
    models = {
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**gated)),
        "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**gated, num_key_value_heads=2, head_dim=args.hidden_size // 2)),
        "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**sizes, **words, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    }
    model = models[name]()
    rezero_(model, final_norm=final_norm)
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The stack of layers."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


@torch.no_grad()
def degree(model: nn.Module) -> float:
    """log2 |F(2 x)| / |F(x)| of the first feed-forward branch with its residual weight at 1."""
    branch = layers_of(model)[0].mlp
    x = torch.randn(1, 64, model.config.hidden_size)
    weight = next(p for n, p in branch.named_parameters() if is_resweight(n))
    weight.fill_(1.0)
    ratio = branch(2 * x).norm() / branch(x).norm()
    weight.zero_()
    return math.log2(ratio.item())


def batches(data: np.ndarray, seed: int, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Random windows."""
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(0, len(data) - args.block_size, args.batch_size)
        yield torch.from_numpy(np.stack([data[i : i + args.block_size] for i in starts]).astype(np.int64))


def train(name: str, bound: dict, rate: float, seed: int, data: np.ndarray, args: argparse.Namespace) -> dict:
    """Some steps of AdamW at one rate, and what became of residual weights and stream."""
    torch.manual_seed(seed)
    model = build(name, args, bound.get("final_norm", "keep"))
    gates = [p for n, p in model.named_parameters() if is_resweight(n)]
    others = [p for n, p in model.named_parameters() if not is_resweight(n)]
    groups = [{"params": others}, {"params": gates, "lr": rate * bound.get("gate_rate", 1.0), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    rates, sizes, largest, loss = [group["lr"] for group in optimizer.param_groups], [], [0.0], math.nan
    first = degree(model)
    layers_of(model)[-1].register_forward_hook(lambda m, a, out: sizes.append(_size(out)))
    for step, ids in zip(range(args.steps), batches(data, seed, args), strict=False):
        for group, base in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = base * min(1.0, (step + 1) / bound.get("warmup", 1))
        output = model(input_ids=ids, labels=ids).loss
        loss = output.item() / math.log(2)
        if not math.isfinite(loss) or not sizes[-1] < DIVERGED:
            return {"diverged": step, "gate": largest[-1], "stream": None, "bpb": None, "degree": first}
        optimizer.zero_grad()
        output.backward()
        nn.utils.clip_grad_norm_(model.parameters(), bound.get("clip", math.inf))
        optimizer.step()
        if bound.get("cap"):
            for gate in gates:
                gate.data.clamp_(-0.5 / args.layers, 0.5 / args.layers)
        largest.append(max(largest[-1], max(gate.abs().item() for gate in gates)))
    return {"diverged": None, "gate": largest[-1], "stream": max(sizes), "bpb": loss, "degree": first}


def _size(output: torch.Tensor | tuple) -> float:
    stream = output[0] if isinstance(output, tuple) else output
    return stream.detach().float().square().mean().sqrt().item()


def table(results: dict) -> list[list[str]]:
    """One row for each model and bound: how many of its runs diverged, by learning rate."""
    rates = results["settings"]["learning_rates"]
    found = {(arm["model"], arm["bound"], arm["rate"]): arm["runs"] for arm in results["arms"]}
    rows = [
        ["model", "bound", *(f"diverged at {rate:g}" for rate in rates), "largest residual weight of a diverged run"]
    ]
    for model, bound in product(dict.fromkeys(model for model, _, _ in found), BOUNDS):
        runs = [found[model, bound, rate] for rate in rates]
        counts = [f"{len(_gone(of_rate))} of {len(of_rate)}" for of_rate in runs]
        largest = max((run["gate"] for of_rate in runs for run in _gone(of_rate)), default=None)
        rows.append([model, bound, *counts, "-" if largest is None else f"{largest:.3f}"])
    return rows


def _gone(runs: list[dict]) -> list[dict]:
    return [run for run in runs if run["diverged"] is not None]


def main() -> None:
    """Run every arm and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-2, 3e-3])
    parser.add_argument("--output", type=Path, default=RESULTS / "gated_products.json")
    args = parser.parse_args()
    data, settings = load_corpus(args.train_file).train, {k: v for k, v in vars(args).items() if k != "output"}
    settings["train_file"] = Path(args.train_file).name
    results = read_json(args.output) or {"settings": settings, "arms": []}
    done = {(arm["rate"], arm["model"], arm["bound"]) for arm in results["arms"]}
    for rate, name, bound in product(args.learning_rates, ("Llama", "Qwen3", "GPT-2"), BOUNDS):
        if (rate, name, bound) in done:
            continue
        runs = [train(name, BOUNDS[bound], rate, seed, data, args) for seed in range(args.seeds)]
        results["arms"].append({"rate": rate, "model": name, "bound": bound, "runs": runs})
        print(rate, name, bound, runs, flush=True)
        save(args.output, results)
