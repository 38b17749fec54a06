"""Run transformers' own common tests on our models: `python tests/upstream/run.py [pytest arguments]`.

The tests are those of the installed release, taken from its source archive. The archive lacks some of the helpers that
they import: `standins/` has them.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
WANTED = ("LICENSE", "pyproject.toml", "tests/")
OPTIONS = "--quiet --disable-warnings -p no:cacheprovider -o log_cli=false -c pyproject.toml".split()
# our files and their places in the tests of transformers
FILES = {
    "standins/configuration.py": "utils/test_configuration_utils.py",
    "standins/distributed.py": "distributed_testing_utils.py",
    "standins/exporters.py": "exporters/test_export.py",
    "standins/generation.py": "generation/test_utils.py",
    "rezero_models.py": "test_modeling_rezero.py",
}


def download_tests(release: str, folder: Path) -> None:
    """Put the tests of a release of transformers and their pytest settings into a folder, whole or not at all."""
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={release}"]
        subprocess.run(command, check=True)
        name = f"transformers-{release}"
        with tarfile.open(Path(scratch, f"{name}.tar.gz")) as archive:
            wanted = tuple(f"{name}/{path}" for path in WANTED)
            members = [member for member in archive if member.name.startswith(wanted)]
            archive.extractall(scratch, members, filter="data")
        Path(scratch, name).rename(folder)


def lay_out(source: Path, folder: Path) -> None:
    """Copy the tests into a folder and add what they lack; what the archive has itself is left as it is."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for ours, theirs in FILES.items():
        target = folder / "tests" / theirs
        target.parent.mkdir(exist_ok=True)
        (target.parent / "__init__.py").touch()
        if not target.exists():
            shutil.copy(HERE / ours, target)


def run_pytest(folder: Path, arguments: list[str]) -> int:
    """Run the tests of our models with the pytest settings of transformers and return the exit code."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, f"tests/{FILES['rezero_models.py']}", *arguments]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    env = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=env).returncode


def main() -> int:
    """Run the tests of the installed release; their exit code is ours."""
    release = version("transformers")
    source = REPOSITORY / "build" / f"transformers-{release}"
    print(f"transformers {release}, torch {version('torch')}, Python {sys.version.split()[0]}", flush=True)
    if not source.exists():
        download_tests(release, source)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(source, Path(folder))
        return run_pytest(Path(folder), sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
