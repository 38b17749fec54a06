"""What the defaults of the text model are worth: one change at a time, early training loss, several seeds.

    python scripts/reproduce/run.py defaults --train_file enwik8_prefix.xz

All variants of a seed take the same batches at the same constant learning rate, without warmup. Differences are given
against the default of the same seed; their spread over the seeds is the noise. Results are written after every run
and a repeated call goes on where it stopped.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from common.first_steps import add_arguments, batches, byte_model, train
from common.record import RESULTS, once, read_json, write_json
from hf_rezero import load_corpus


VARIANTS = {
    "default": {},
    "embedding_std 0.02 (the GPT-2 habit)": {"embedding_std": 0.02},
    "final norm": {"final_norm": True},
    "resweight_init 0.125 (1/sqrt(2 layers))": {"resweight_init": 0.125},
    "ReZero + pre-norm": {"norm_position": "pre", "final_norm": False},
    "ReLU": {"hidden_act": "relu"},
    "GELU by erf": {"hidden_act": "gelu"},
    "learned positions": {"position_embedding_type": "learned"},
}


def run_all(args: argparse.Namespace, text: np.ndarray) -> dict:
    """Run what the result file does not hold yet."""
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    settings["train_file"] = Path(args.train_file).name
    results = read_json(args.output) or {"settings": settings, "runs": {}}

    def train_variant(variant: str, seed: int) -> dict:
        model = byte_model(VARIANTS[variant], seed, args)
        return train(model, batches(text, seed, args.steps, args), args.learning_rate)

    for seed in range(args.seeds):
        for variant in VARIANTS:
            once(args.output, results, f"{variant} seed={seed}", partial(train_variant, variant, seed))
    return results


def differences(results: dict, seeds: int) -> dict[str, dict]:
    """The mean of each variant over the seeds, and its distance from the default of the same seed."""
    finals = {v: [results["runs"][f"{v} seed={s}"]["final"] for s in range(seeds)] for v in VARIANTS}
    return {
        variant: {
            "bits_per_byte": mean(values),
            "against_default_by_seed": [a - b for a, b in zip(values, finals["default"], strict=True)],
        }
        for variant, values in finals.items()
    }


def table(results: dict) -> list[list[str]]:
    """One row for each variant."""
    rows = [["one change to the default", "bits per byte", "against the default, by seed"]]
    for variant, row in results["table"].items():
        differences = ", ".join(f"{d:+.3f}" for d in row["against_default_by_seed"])
        if not math.isfinite(row["bits_per_byte"]):
            rows.append([variant, "diverged", ""])
        else:
            rows.append([variant, f"{row['bits_per_byte']:.3f}", "" if variant == "default" else differences])
    return rows


def main() -> None:
    """Run every variant for every seed, and write the differences to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, layers=32, block_size=128, steps=100, seeds=2)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=RESULTS / "defaults.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = run_all(args, load_corpus(args.train_file).train)
    write_json(args.output, results | {"table": differences(results, args.seeds)})
