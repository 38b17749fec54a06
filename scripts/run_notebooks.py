"""Run the notebooks of docs/notebooks and write their outputs into them, without what goes to stderr.

python scripts/run_notebooks.py docs/notebooks/*.ipynb
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from hf_rezero.files import write_text


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run from top to bottom in an empty folder; progress bars and warnings are left out.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=300, coalesce_streams=True, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(paths: list[str]) -> None:
    """Run each and write it back."""
    for path in map(Path, paths):
        write_text(path, nbformat.writes(executed(path)) + "\n")
        print(f"{path}: done")


if __name__ == "__main__":
    main(sys.argv[1:])
