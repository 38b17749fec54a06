"""`scripts/reproduce/render.py`, `run.py` and `goals.py`: every page says what the result files say, every claim can be run."""

import ast
import json
import re
import sys

import pytest

import goals
import render
import run
from common.record import RESULTS, read_json
from speed import import_time


TEXTS = {page: page.read_text() for page in render.PAGES}
CLAIMS = sorted(path for path in run.HERE.glob("*/*.py"))


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_tables_of_a_page_come_from_the_result_files(page):
    assert render.render(TEXTS[page]) == TEXTS[page], "run `make tables`"


def test_every_table_stands_on_one_page():
    marked = [name for text in TEXTS.values() for name in re.findall(r"<!-- table:(\w+) -->", text)]
    assert sorted(marked) == sorted(render.tables())


def test_every_result_file_is_shown():
    shown = {path.name for path, _ in render.tables().values()} - {"goals.json"}  # made of the others
    assert shown | {"recipe_articles.json"} == {path.name for path in RESULTS.glob("*.json")}


def test_figures_of_the_pages_are_drawn_from_the_result_files(tmp_path):
    named = {name for text in TEXTS.values() for name in re.findall(r"figures/(\w+)\.png", text)}
    assert named == set(render.drawings())
    for name in ("growing", "depth"):
        path, draw = render.drawings()[name]
        draw(read_json(path), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_table_that_differs_from_its_result_file_is_made_anew():
    text = "before\n<!-- table:import_time -->\n| old |\n<!-- end -->\nafter"
    made = render.render(text)
    assert made.startswith("before\n<!-- table:import_time -->\n| in a fresh process | seconds |\n|---|---|\n")
    assert made.endswith("|\n<!-- end -->\nafter") and "old" not in made


def test_what_is_thought_of_a_goal_is_about_a_goal_that_is_shown():
    shown = {row[0] for row in goals.table({})[1:]}
    assert set(goals.VERDICTS) <= shown and len(shown) == 23


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_claim_imports_no_other_claim(path):
    folders = {other.parent.name for other in CLAIMS}
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert {name.split(".")[0] for name in names} & folders <= {"common"}


def test_names_of_claims_are_found_without_their_folder():
    assert len(run.claims()) == len(
        [path for path in CLAIMS if path.parent.name != "common" and path.stem != "__init__"]
    )
    assert run.claims()["depth"] == "rezero.depth"


@pytest.mark.parametrize("name", ["import_time", "speed/import_time", "import_time.py"])
def test_a_claim_is_run_by_its_name_and_the_command_is_recorded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(import_time, "STATEMENTS", {"little": "import json"})
    words = [name, "--rounds", "1", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["scripts/reproduce/run.py", *words])
    run.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results["seconds"]) == {"little"}
    assert (
        results["provenance"]["command"] == "python scripts/reproduce/run.py import_time --rounds 1 --output out.json"
    )


@pytest.mark.parametrize("name", ["optim/depth", "nothing"])
def test_a_claim_that_is_not_there_is_named(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", name])
    with pytest.raises(SystemExit):
        run.main()
    assert f"got {name!r}" in capsys.readouterr().err


def test_every_claim_can_be_run_and_says_what_it_is_about():
    for name, module in run.claims().items():
        claim = run.load_claim(module)
        assert callable(claim.main) and f"scripts/reproduce/run.py {name}" in claim.__doc__
