"""Where the time of a training run goes: steps, batches, evaluation, checkpoints.

    python scripts/reproduce/run.py training_profile --train_file enwik8_prefix.xz

Runs the first steps of each config through `run_clm.py` in one process, with one checkpoint and the evaluation of both
parts, and counts what each takes. The shares are those of the whole run of the config: its steps, its checkpoints, one
evaluation of each part.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import yaml

from common.record import RESULTS, read_json, save
from hf_rezero import ReZeroTrainer
from hf_rezero.commands import clm


SCRIPTS = Path(__file__).parents[2]
CONFIGS = [SCRIPTS / "configs" / f"enwik8_prefix_{name}.yaml" for name in ("12l", "recipe")]
# methods of the Trainer, and what they are for
PARTS = {
    "training_step": "step",
    "get_batch_samples": "batches",
    "evaluation_loop": "evaluation",
    "_save_checkpoint": "checkpoint",
}


@contextmanager
def stopwatches() -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of the methods in `PARTS`."""
    seconds = defaultdict(list)

    def timed(name):
        method = getattr(ReZeroTrainer, name)

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[PARTS[name]].append(time.perf_counter() - start)

        return call

    with patch.multiple(ReZeroTrainer, **{name: timed(name) for name in PARTS}):
        yield seconds


def shares(seconds: dict[str, list[float]], runtime: float, steps: int, settings: dict) -> dict[str, float]:
    """The part of the whole run that batches, evaluation and checkpoints take."""
    step = (runtime - sum(seconds["checkpoint"])) / steps
    total_steps, checkpoints = settings["max_steps"], settings["max_steps"] // settings["save_steps"]
    whole = {
        "training": total_steps * (step - sum(seconds["batches"]) / steps),
        "batches": total_steps * sum(seconds["batches"]) / steps,
        "evaluation": sum(seconds["evaluation"]),
        "checkpoints": checkpoints * sum(seconds["checkpoint"]) / len(seconds["checkpoint"]),
    }
    return {name: part / sum(whole.values()) for name, part in whole.items()}


def profile(config: Path, train_file: str, steps: int) -> dict:
    """The shares of the parts of a run, and the median seconds of each."""
    with tempfile.TemporaryDirectory() as folder, stopwatches() as seconds:
        words = ["--train_file", train_file, "--output_dir", folder, "--max_steps", str(steps)]
        clm.main([str(config), *words, "--save_steps", str(steps)])
        runtime = read_json(Path(folder, "all_results.json"))["train_runtime"]
    settings = yaml.safe_load(config.read_text())
    return {
        "steps": settings["max_steps"],
        "shares": {name: round(x, 5) for name, x in shares(seconds, runtime, steps, settings).items()},
        "median_seconds": {name: round(median(values), 5) for name, values in seconds.items()},
    }


def table(results: dict) -> list[list[str]]:
    """One row for each config: the shares of the parts."""
    rows = [["part of the run of a config", "steps", "training", "batches", "evaluation", "checkpoints"]]
    for config, found in results["configs"].items():
        rows.append([f"{config}.yaml", f"{found['steps']:,}", *(f"{x:.2%}" for x in found["shares"].values())])
    return rows


def main() -> None:
    """Train with each config, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True, help="the first 4,154,399 bytes of enwik8")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--configs", nargs="+", type=Path, default=CONFIGS)
    parser.add_argument("--output", type=Path, default=RESULTS / "training_profile.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {config.stem: profile(config, args.train_file, args.steps) for config in args.configs}
    save(args.output, {"configs": found})
    print(found)
