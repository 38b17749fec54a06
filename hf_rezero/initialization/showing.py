"""How a search for scales is shown: its progress, and the factors that it found."""

import math
import sys
from collections.abc import Mapping

from tqdm.auto import tqdm

from ..notebook import farthest, html_table


def steps_bar(name: str, total: int | None, show: bool | None) -> tqdm:
    """A progress bar; by default in a terminal and in a notebook, and not where the output is a file."""
    in_notebook = "ipykernel" in sys.modules
    return tqdm(desc=name, total=total, disable=(False if in_notebook else None) if show is None else not show)


def scale_lines(scales: Mapping[str, float]) -> list[str]:
    """One line for each tensor whose factor is among the farthest from 1, and how many are left out."""
    rows = _farthest_scales(scales)
    width = max(map(len, rows), default=0)
    more = [_left_out(scales, rows)] if len(rows) < len(scales) else []
    return [f"{name:{width}} {scale:8.4f}" for name, scale in rows.items()] + more


def scale_table(caption: str, scales: Mapping[str, float]) -> str:
    """The same as HTML."""
    rows = _farthest_scales(scales)
    cells = [[name, f"{scale:.4f}"] for name, scale in rows.items()]
    more = _left_out(scales, rows) if len(rows) < len(scales) else ""
    return html_table(caption, ["tensor", "factor"], cells, more)


def _farthest_scales(scales: Mapping[str, float]) -> dict[str, float]:
    return {name: scales[name] for name in farthest({name: abs(math.log(scale)) for name, scale in scales.items()})}


def _left_out(scales: Mapping[str, float], rows: Mapping[str, float]) -> str:
    return f"and {len(scales) - len(rows)} more factors, nearer to 1, in .scales"
