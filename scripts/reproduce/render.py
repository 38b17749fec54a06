"""Result files -> the tables of the pages and the figures, without any training.

    python scripts/reproduce/render.py

A table stands between `<!-- table:NAME -->` and `<!-- end -->` in the README or in `docs`. A claim makes the one of its own
name from its result file by `table`, and its figure by `draw`; one with several names them in `TABLES` and `DRAWINGS`, and each is
made from the result file of its own name where there is one.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import goals
from common.record import FIGURES, RESULTS, read_json, write_text
from run import claims, load_claim


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def of_claim(name: str, claim: ModuleType, many: str, one: str) -> dict[str, Callable]:
    """The tables or the figures of a claim, by name."""
    if hasattr(claim, many):
        return getattr(claim, many)
    return {name: getattr(claim, one)} if hasattr(claim, one) else {}


def everything(many: str, one: str) -> dict[str, tuple[Path, Callable]]:
    """The result file and the function of every table or figure of all claims that were run."""
    modules = {name: load_claim(module) for name, module in claims().items()} | {"goals": goals}
    made = [
        (claim, shown) for claim, module in modules.items() for shown in of_claim(claim, module, many, one).items()
    ]
    found = {name: (source(claim, name), function) for claim, (name, function) in made}
    return {name: (path, function) for name, (path, function) in found.items() if name == "goals" or path.exists()}


def source(claim: str, name: str) -> Path:
    """The result file of that name, else the one of the claim."""
    own = RESULTS / f"{name}.json"
    return own if own.exists() else RESULTS / f"{claim}.json"


def tables() -> dict[str, tuple[Path, Callable]]:
    """The result file of each table, and what makes its rows."""
    return everything("TABLES", "table")


def drawings() -> dict[str, tuple[Path, Callable]]:
    """The result file of each figure, and what draws it."""
    return everything("DRAWINGS", "draw")


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def render(text: str) -> str:
    """The page with every marked table made anew from its result file."""
    known = tables()

    def replace(match: re.Match) -> str:
        path, rows = known[match[1]]
        return f"<!-- table:{match[1]} -->\n{markdown(rows(read_json(path)))}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> None:
    """Write the tables of all pages that have one, and all figures."""
    for page in PAGES:
        before = page.read_text()
        if (after := render(before)) != before:
            write_text(page, after)
    for name, (path, draw) in drawings().items():
        draw(read_json(path), FIGURES / f"{name}.png")


if __name__ == "__main__":
    main()
