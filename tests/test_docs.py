"""README, docs and docstrings do what they say, and name only what exists."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import hf_rezero
from hf_rezero.commands.__main__ import COMMANDS
from render import drawings, read_json, render, tables
from run import claims


ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
MODULES = [module.name for module in pkgutil.walk_packages(hf_rezero.__path__, "hf_rezero.")]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
# what the names of scripts/ call
OF_SCRIPT = {
    "run_clm": "clm",
    "run_mlm": "mlm",
    "run_classification": "classify-texts",
    "run_image_classification": "classify-images",
    "push_to_hub": "push",
}
# flags of other programs that the pages name
FOREIGN = {
    "--nproc_per_node",
    "--cpu",
    "--num_processes",
    "--no-deps",
    "--trust-remote-code",
    "--config_file",
    "--nnodes",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--rdzv_id",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--cpus-per-task",
    "--signal",
}


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if PYTHON.search(text)])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(PYTHON.findall(TEXTS[page])), {"__name__": page})


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_every_table_stands_on_one_page_and_comes_from_its_result_file():
    found = Counter(name for text in TEXTS.values() for name in re.findall(r"<!-- table:(\w+) -->", text))
    assert found == dict.fromkeys(tables(), 1)
    for page, text in TEXTS.items():
        assert render(text) == text, f"run `make tables`: {page}"


def test_every_figure_is_shown_and_says_in_words_what_it_shows():
    shown = [
        match for text in TEXTS.values() for match in re.findall(r"!\[([^\]]*)\]\([^)]*figures/(\w+)\.png\)", text)
    ]
    assert {name for _, name in shown} == set(drawings())
    assert all(len(words) > 15 for words, _ in shown)


def test_figures_are_drawn_from_the_result_files(tmp_path):
    for name in ("growing", "depth"):
        source, draw = drawings()[name]
        draw(read_json(source), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page} links to {target}"


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as browsers of Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_of_the_pages_exist(page):
    for command, flags in commands_of(TEXTS[page]):
        assert not flags - flags_of(command), f"{page}: {command}"
    known = set().union(FOREIGN, *(flags_of(name) for name in COMMANDS), flags_of_claims())
    prose = re.sub(r"```(?!bash).*?```", "", TEXTS[page], flags=re.DOTALL)
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prose)) - known, page


def commands_of(text: str):
    """The name and the flags of each of our commands, in blocks of shell and between backticks."""
    shell = re.sub(r"\\\n\s*", " ", "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)))
    for line in [*shell.splitlines(), *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]:
        called = re.search(r"(?:hf-rezero |-m hf_rezero\.commands\.|python scripts/)([\w-]+)(?:\.py)?(.*)", line)
        if not called or "reproduce" in line:
            continue
        name = OF_SCRIPT.get(called[1], called[1].replace("_", "-"))
        if name in ("train-plain-torch", "command", "--help"):
            continue
        assert name in COMMANDS, line
        words = shlex.split(called[2].replace("[", " ").replace("]", " "), comments=True)
        yield name, {word.partition("=")[0] for word in words if word.startswith("--")}


@cache
def flags_of(command: str) -> set[str]:
    """What the parser of a command takes."""
    module = importlib.import_module(f"hf_rezero.commands.{command.replace('-', '_')}")
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown.getvalue()))


@cache
def flags_of_claims() -> set[str]:
    """What the claims of scripts/reproduce take, by their sources: to import them all takes long."""
    sources = (ROOT / "scripts" / "reproduce").rglob("*.py")
    return {flag for path in sources for flag in re.findall(r'"(--[a-z]\w*)"', path.read_text())}


@pytest.mark.parametrize("page", PAGES)
def test_claims_of_the_pages_exist(page):
    named = re.findall(r"scripts/reproduce/run\.py (\w+)", TEXTS[page])
    assert set(named) <= {*claims(), "NAME"}


def test_the_citation_names_this_version():
    assert f"\nversion: {hf_rezero.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_is_by_release_and_by_kind():
    releases = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert all(re.match(r"\[(Unreleased\]|\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d)\n", release) for release in releases)
    kinds = {kind for release in releases for kind in re.findall(r"^### (.*)$", release, re.MULTILINE)}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert all(re.search(r"^### \w+\n\n- ", release, re.MULTILINE) for release in releases)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0
