"""Where the time of a training run goes: steps, batches, evaluation, checkpoints.

    python scripts/reproduce/training_profile.py --train_file enwik8_prefix.xz

Runs the first steps of `configs/enwik8_prefix_12l.yaml` through `run_clm.py` in one process, with one checkpoint and the
evaluation of both parts, and counts what each takes. The shares are those of the whole run of that config: its steps, its
checkpoints, one evaluation of each part.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from record import RESULTS, provenance, read_json, write_json

from hf_rezero import ReZeroTrainer


SCRIPTS = Path(__file__).parent.parent
CONFIG = SCRIPTS / "configs" / "enwik8_prefix_12l.yaml"
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


def main() -> None:
    """Train, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True, help="the first 4,154,399 bytes of enwik8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=RESULTS / "training_profile.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(SCRIPTS))
    import run_clm

    with tempfile.TemporaryDirectory() as folder, stopwatches() as seconds:
        words = ["--train_file", args.train_file, "--output_dir", folder, "--max_steps", str(args.steps)]
        run_clm.main([str(args.config), *words, "--save_steps", str(args.steps)])
        runtime = read_json(Path(folder, "all_results.json"))["train_runtime"]
    settings = yaml.safe_load(args.config.read_text())
    found = {name: round(value, 5) for name, value in shares(seconds, runtime, args.steps, settings).items()}
    median = {name: round(sorted(values)[len(values) // 2], 5) for name, values in seconds.items()}
    write_json(args.output, {"shares": found, "median_seconds": median, "provenance": provenance()})
    print(found)


if __name__ == "__main__":
    main()
