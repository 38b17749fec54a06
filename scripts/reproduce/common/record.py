"""Result files: what was run, on what, and the figures."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from hf_rezero.files import read_json, write_text


__all__ = ["FIGURES", "RESULTS", "once", "provenance", "read_json", "save", "write_json", "write_text"]
HERE = Path(__file__).parents[1]
RESULTS, FIGURES = HERE / "results", HERE / "figures"


def provenance() -> dict:
    """The command, the commit, the versions and the hardware of this run; absolute paths by their last part."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return {
        "command": " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
        "commit": git.stdout.strip(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "transformers")},
        "hardware": {"cpu": models[0] if models else platform.processor(), "cores": len(models)},
        "threads": torch.get_num_threads(),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def write_json(path: Path, content: dict) -> None:
    """Write `content` as JSON; a reader sees the old file or the new one, never half of one."""
    text = json.dumps(content, indent=1)
    write_text(path, re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n")


def save(path: Path, results: dict) -> None:
    """Write the results with the record of this run as their `provenance`."""
    results["provenance"] = provenance()
    write_json(path, results)


def once(path: Path, results: dict, key: str, make: Callable[[], dict]) -> dict:
    """The run of this name; what the results lack is made, written to the file and printed."""
    if key not in results["runs"]:
        run = results["runs"][key] = make()
        save(path, results)
        shown = {name: value for name, value in run.items() if not isinstance(value, (list, dict))}
        print(f"{key}: {shown}", flush=True)
    return results["runs"][key]
