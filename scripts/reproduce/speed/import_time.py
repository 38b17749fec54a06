"""Seconds that imports take in fresh processes, in turns.

python scripts/reproduce/run.py import_time
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from common.record import RESULTS, save


STATEMENTS = {
    "import torch": "import torch",
    "import transformers (lazy)": "import transformers",
    "the Trainer and the Auto classes of transformers": (
        "from transformers import AutoConfig, AutoModelForCausalLM, Trainer"
    ),
    "import hf_rezero": "import hf_rezero",
}


def seconds(statement: str) -> float:
    """How long the statement takes in a new process, without the start of Python."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def table(results: dict) -> list[list[str]]:
    """One row for each statement."""
    return [["in a fresh process", "seconds"], *([name, f"{value:.2f}"] for name, value in results["seconds"].items())]


def goals(results: dict) -> list[list[str]]:
    """What the import adds to that of transformers."""
    seconds = results["seconds"]
    added = seconds["import hf_rezero"] - seconds["import transformers (lazy)"]
    return [["import, seconds over `import transformers`", "0.1", f"{added:.1f}", ""]]


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "import_time.json")
    args = parser.parse_args()
    times = {name: [] for name in STATEMENTS}
    for _ in range(args.rounds):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    results = {name: round(median(values), 3) for name, values in times.items()}
    save(args.output, {"seconds": results})
    print(results)
