"""Speed and memory of ReZero against GPT-2, Llama and nn.TransformerEncoder at equal dimensions.

    python scripts/reproduce/run.py model_speed

Everything is a ratio within one round: the arms take turns, a ratio is the median over the rounds of several processes, and
GPT-2 as transformers ships it (sdpa, gelu_new, dropout 0) is 1. One thread and its processor time, so that other work on
the machine counts less; no memory goes back to the system. ReZero is folded (`fold_resweight_`) for inference. Memory is
what autograd saves for the backward pass, in units of width numbers for each token and layer.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from common.equal_models import CASES, builders, deployed, inference, loss_of, training_step
from common.record import RESULTS, read_json, save
from common.timing import against, in_fresh_processes, take_turns


MEASURES = ["train", "train_bf16", "infer", "one_token", "generate", "saved"]


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
        steps = {arm: inference(deployed(build()), rows, name) for arm, build in models.items()}
    return take_turns(steps, rounds if name.startswith("train") else 5 * rounds)


def speeds(case: str, name: str, rounds: int, processes: int) -> dict[str, dict[str, float]]:
    """Milliseconds and speed against GPT-2 of every arm, over `rounds` in each of several fresh processes."""
    return against(in_fresh_processes(processes, seconds_of, CASES[case], name, rounds), "GPT-2")


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
