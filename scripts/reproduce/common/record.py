"""Result files: what was run, on what, and the figures, written to a temporary name and moved into place."""

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


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
    temporary = path.with_suffix(".tmp")
    text = json.dumps(content, indent=1)
    flat_lists = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)
    temporary.write_text(flat_lists + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict:
    """The content of a result file, empty if it does not exist yet."""
    return json.loads(path.read_text()) if path.exists() else {}
