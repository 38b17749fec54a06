"""What residual weights cost a model of transformers, how long surgery takes, and what loading the result costs.

    python scripts/reproduce/run.py rewrite_speed   # five minutes

The same stock model with and without residual weights, with and without norms, in turn in several fresh processes, by
processor time of one thread. Then a Llama of 135 million random weights: heads and neurons found, scored, chosen and cut; residual
weights put in; layers grown; its checkpoints loaded in turn, by the clock. The ratios are medians over the rounds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from common.equal_models import CASES, builders, inference, training_step
from common.record import RESULTS, read_json, save
from common.timing import against, in_fresh_processes, take_turns
from hf_rezero import grow_, rezero_
from hf_rezero.pruning import find_groups, magnitude, prune_, select


FAMILIES = ["GPT-2", "Llama"]
MEASURES = {"train": "training step", "infer": "forward pass"}
SIZE = CASES["12 x 512"]
# SmolLM2-135M without its training
LLAMA = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SPARSITY, NEW_LAYERS = 0.3, 6
REWRITES: dict[str, Callable[[nn.Module], object]] = {
    "stock": lambda model: None,
    "residual weights": partial(rezero_, pretrained=True),
    "residual weights, no norms": partial(rezero_, resweight_init=0.1),
}


def rewritten(model: nn.Module, arm: str) -> nn.Module:
    """The model after what the arm is named for."""
    REWRITES[arm](model)
    return model


def step_seconds(size: tuple[int, ...], family: str, measure: str, rounds: int) -> dict[str, list[float]]:
    """Processor time of every arm in each round."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers, width, heads, tokens, batch, small_batch = size
    build, ids = builders(layers, width, heads, tokens)[family], torch.randint(0, 256, (batch, tokens))
    models = {arm: rewritten(build(), arm) for arm in REWRITES}
    if measure == "train":
        return take_turns({arm: training_step(model, ids, False) for arm, model in models.items()}, rounds)
    steps = {arm: inference(model.eval(), ids[:small_batch], measure) for arm, model in models.items()}
    return take_turns(steps, 3 * rounds)


def llama() -> LlamaForCausalLM:
    """With random weights."""
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def cut(model: nn.Module) -> None:
    """Heads and neurons, by the sizes of their weights."""
    groups = find_groups(model, ["heads", "neurons"])
    prune_(model, groups, select(model, groups, magnitude(model, groups), SPARSITY))


SURGERY: dict[str, Callable[[nn.Module], object]] = {
    f"{SPARSITY:.0%} of heads and neurons found, chosen and cut": cut,
    "residual weights put in": REWRITES["residual weights"],
    f"{NEW_LAYERS} layers grown": partial(grow_, num_layers=NEW_LAYERS),
}


def surgery_seconds(rounds: int) -> dict[str, list[float]]:
    """Seconds of every operation, each on a model of its own."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in SURGERY}
    for _ in range(rounds):
        for name, operate in SURGERY.items():
            model = llama()
            start = time.perf_counter()
            operate(model)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def load_seconds(rounds: int) -> dict[str, list[float]]:
    """Seconds of every checkpoint in each round."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, rewrite in {**REWRITES, "cut": cut}.items():
            model = llama()
            rewrite(model)
            model.save_pretrained(Path(folder, name))
        loads = {
            path.name: partial(AutoModelForCausalLM.from_pretrained, path) for path in sorted(Path(folder).iterdir())
        }
        return take_turns(loads, rounds, time.perf_counter)


def measure_all(rounds: int, processes: int) -> dict[str, Callable[[], dict]]:
    """What makes each part of the results."""
    parts: dict[str, Callable[[], dict]] = {
        f"{MEASURES[measure]}, {family}": partial(step_ratios, family, measure, rounds, processes)
        for family in FAMILIES
        for measure in MEASURES
    }
    parts["surgery"] = lambda: {
        name: round(median(taken), 3) for name, taken in in_fresh_processes(1, surgery_seconds, rounds).items()
    }
    parts["loading"] = lambda: against(in_fresh_processes(processes, load_seconds, 3 * rounds), "stock")
    return parts


def step_ratios(family: str, measure: str, rounds: int, processes: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every arm, and its speed against the stock model."""
    return against(in_fresh_processes(processes, step_seconds, SIZE, family, measure, rounds), "stock")


def table(results: dict) -> list[list[str]]:
    """Time against the stock model, or seconds, one row for each thing that was measured; goals behind them."""
    rows = [["what", "measured", "goal"]]
    for part, found in results["results"].items():
        if part == "surgery":
            rows += [[name, f"{seconds:.2f} s", "5 s"] for name, seconds in found.items()]
            continue
        goal = "1.2" if part == "loading" else "1.03"
        rows += [
            [f"{part}: {arm}, time against stock", f"{1 / row['speed']:.2f}", goal]
            for arm, row in found.items()
            if arm != "stock"
        ]
    return rows


def main() -> None:
    """Measure what the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="in each process; more of what is short")
    parser.add_argument("--processes", type=int, default=2, help="fresh ones, one after the other")
    parser.add_argument("--output", type=Path, default=RESULTS / "rewrite_speed.json")
    args = parser.parse_args()
    results = read_json(args.output) or {"results": {}}
    for part, make in measure_all(args.rounds, args.processes).items():
        if part not in results["results"]:
            results["results"][part] = make()
            save(args.output, results)
        print(part, results["results"][part], flush=True)
