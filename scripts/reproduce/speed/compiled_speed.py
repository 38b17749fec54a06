"""What compiling one layer, used again for all, is worth in training and inference, and what it costs to start.

    python scripts/reproduce/run.py compiled_speed

Arms and models are those of model_speed, each eager and compiled; a ratio within one round, GPT-2 eager is 1.
One thread and its processor time. Each arm compiles in a process of its own with an empty cache first: the seconds until its
first step is done are in the table, and so is the largest memory of that process against the eager one.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from common.equal_models import CASES, builders, deployed, inference, training_step
from common.record import RESULTS, read_json, save
from common.timing import against, in_fresh_processes, take_turns


ARMS = ("GPT-2", "Llama", "ReZero, learned positions", "ReZero")
MEASURES = {
    "train": "training step, fp32",
    "train_bf16": "training step, bf16",
    "infer": "inference",
    "static": "32 tokens, static cache",
}
FORMS = ("eager", "compiled")


def compiled(model: nn.Module, measure: str) -> nn.Module:
    """With each layer compiled by itself: equal layers share what was compiled.

    A static cache is asked for by the number of the layer, so that no two layers are equal: there the whole forward pass
    is compiled.
    """
    if measure == "static":
        model.forward = torch.compile(model.forward)
        return model
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()
    return model


def stepper(arm: str, form: str, case: Sequence[int], measure: str) -> Callable[[], object]:
    """One step of the arm; GPT-2 and Llama as transformers ships them."""
    torch.manual_seed(0)
    layers, width, heads, tokens, batch, small_batch = case
    model = builders(layers, width, heads, tokens)[arm]()
    if not measure.startswith("train"):
        deployed(model)
    if form == "compiled":
        compiled(model, measure)
    if measure.startswith("train"):
        return training_step(model, torch.randint(0, 256, (batch, tokens)), measure == "train_bf16")
    if measure == "static":
        model.generation_config.cache_implementation = "static"
        return inference(model, torch.randint(0, 256, (1, tokens)), "generate")
    return inference(model, torch.randint(0, 256, (small_batch, tokens)), measure)


def seconds_of(case: Sequence[int], measure: str, rounds: int) -> dict[str, list[float]]:
    """Processor time of every arm in each round."""
    torch.set_num_threads(1)
    return take_turns({f"{a} | {f}": stepper(a, f, case, measure) for a in ARMS for f in FORMS}, rounds)


def start_of(case: Sequence[int], measure: str, form: str) -> dict[str, list[float]]:
    """Of ReZero: seconds to the end of the first step with nothing compiled before, and the most memory in GB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        start = time.perf_counter()
        stepper("ReZero, learned positions", form, case, measure)()
        seconds = time.perf_counter() - start
    return {"seconds": [seconds], "gigabytes": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]}


def start(case: str, measure: str) -> dict[str, dict[str, float]]:
    """What the first step costs in a new process, eager and compiled."""
    found = {form: in_fresh_processes(1, start_of, CASES[case], measure, form) for form in FORMS}
    return {form: {name: round(values[0], 2) for name, values in costs.items()} for form, costs in found.items()}


def table(results: dict) -> list[list[str]]:
    """One row for each measure at each size."""
    arms = [f"{arm} | {form}" for arm in ARMS for form in FORMS]
    heads = [arm.replace(" |", ",") for arm in arms]
    rows = [["speed against GPT-2 eager", *heads, "first step compiled, s", "its memory against eager"]]
    for measure, label in MEASURES.items():
        for case, found in ((case, found[measure]) for case, found in results["results"].items() if measure in found):
            speeds, first = [f"{found['speeds'][arm]['speed']:.2f}" for arm in arms], found["start"]
            memory = first["compiled"]["gigabytes"] / first["eager"]["gigabytes"]
            rows.append([f"{label}: {case}", *speeds, f"{first['compiled']['seconds']:.0f}", f"{memory:.2f}"])
    return rows


def goals(results: dict) -> list[list[str]]:
    """Goals of compiled layers against GPT-2 eager."""

    def ratio(measure: str) -> str:
        return (
            f"{results['results']['128 x 64'][measure]['speeds']['ReZero, learned positions | compiled']['speed']:.2f}"
        )

    return [
        ["128 x 64, training, fp32, compiled", "1.4", ratio("train"), ""],
        ["128 x 64, training, bf16, compiled", "2.5", ratio("train_bf16"), ""],
        ["128 x 64, inference, compiled", "1.5", ratio("infer"), ""],
    ]


def main() -> None:
    """Measure what the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="in each process")
    parser.add_argument("--processes", type=int, default=2, help="fresh ones, one after the other")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["12 x 512", "128 x 64"])
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--output", type=Path, default=RESULTS / "compiled_speed.json")
    args = parser.parse_args()
    results = read_json(args.output) or {"results": {}}
    for case in args.cases:
        for measure in args.measures:
            found = results["results"].setdefault(case, {})
            if measure not in found:
                times = in_fresh_processes(args.processes, seconds_of, CASES[case], measure, args.rounds)
                found[measure] = {"speeds": against(times, "GPT-2 | eager"), "start": start(case, measure)}
                save(args.output, results)
            print(case, measure, {arm: row["speed"] for arm, row in found[measure]["speeds"].items()}, flush=True)
