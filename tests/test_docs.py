"""The README and the docstrings do what they say."""

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import hf_rezero


ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(hf_rezero.__path__, "hf_rezero.")]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {"__name__": page})


def test_tables_of_the_readme_come_from_the_result_files():
    sys.path.insert(0, str(ROOT / "scripts" / "reproduce"))
    import tables

    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table:") == len(tables.TABLES)
    assert tables.render(text) == text, "run `make tables`"


def test_figures_of_the_readme_are_drawn_from_the_result_files(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts" / "reproduce"))
    import figures

    assert set(re.findall(r"figures/(\w+)\.png", (ROOT / "README.md").read_text())) == set(figures.DRAWN)
    for name in ("growing", "depth"):
        source, draw = figures.DRAWN[name]
        draw(figures.read_json(figures.RESULTS / f"{source}.json"), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0
