"""Runs a claim of the folders beside this file, and writes its result file and its figure.

    python scripts/reproduce/run.py depth --train_file enwik8_prefix.xz
    python scripts/reproduce/run.py rezero/depth --help

The folder may be left out: no two claims share a name. `--help` alone lists all claims.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType


HERE = Path(__file__).parent


def claims() -> dict[str, str]:
    """The module of each claim by its name, which no two of them share."""
    files = sorted(path for path in HERE.glob("*/*.py") if path.parent.name != "common" and path.stem != "__init__")
    return {path.stem: f"{path.parent.name}.{path.stem}" for path in files}


def load_claim(module: str) -> ModuleType:
    """Import the module of a claim, such as `rezero.depth`."""
    return importlib.import_module(module)


def main() -> None:
    """Run the claim that is named first with all the words behind it."""
    found = claims()
    listed = "\n".join(f"  {module.replace('.', '/')}" for module in found.values())
    parser = argparse.ArgumentParser(
        description="Runs a claim and writes its result file; `run.py CLAIM --help` lists its options.",
        epilog=f"claims, with or without their folder:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="run.py CLAIM [OPTIONS]",
    )
    parser.add_argument("claim", type=Path, help="the name of a claim")
    claim = parser.parse_args(sys.argv[1:2]).claim
    module = found.get(claim.stem)
    if module is None or claim.parent.name not in ("", module.split(".")[0]):
        parser.error(f"a claim of the list below --help was expected, got {str(claim)!r}")
    sys.argv = [f"{sys.argv[0]} {claim.stem}", *sys.argv[2:]]  # what `--help` and the record of the run show
    load_claim(module).main()


if __name__ == "__main__":
    main()
