"""The notebooks run from top to bottom, and stand in the repository with their outputs."""

import sys

import nbformat
import pytest
from support.launch import SCRIPTS


sys.path.append(str(SCRIPTS))
from run_notebooks import executed  # noqa: E402


NOTEBOOKS = sorted((SCRIPTS.parent / "docs" / "notebooks").glob("*.ipynb"))


def shape(notebook):
    """What the cells show: their kinds, and the number of their lines where it is text."""
    return [
        [sorted(output.get("data", {"text": ""})) for output in cell.get("outputs", [])] for cell in notebook.cells
    ]


def test_there_are_five():
    names = ["any_architecture", "deep_model", "diagnostics", "gradinit", "pruning"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_outputs_are_in_the_repository(path):
    saved = nbformat.read(path, as_version=4)
    cells = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "%pip install -q hf_rezero" in cells[0].source
    assert shape(executed(path)) == shape(saved)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert "Traceback" not in nbformat.writes(saved)
