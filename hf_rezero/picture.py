"""The look of all pictures: sizes, colours that colour-blind readers tell apart, names at the ends of lines, light and dark.

The colours are those of Okabe and Ito (2008), https://jfly.uni-koeln.de/color/, in an order in which neighbours differ
in lightness too; yellow, which is lost on white, is left out.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from .files import written_whole


WIDTH, HEIGHT = 7.2, 4.0  # inches, of a picture with one panel
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = 7  # C0 to C6: these and that of the text
COMMON = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def _look(ink: str, ground: str, grid: str, colours: Sequence[str]) -> dict[str, Any]:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    grounds = {"figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground}
    cycle = cycler(color=[*colours, ink])
    return COMMON | dict.fromkeys(inked, ink) | grounds | {"grid.color": grid, "axes.prop_cycle": cycle}


LIGHT = _look("#222222", "white", "#dddddd", (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY))
DARK = _look("#dddddd", "#1e2129", "#3d414d", (SKY, VERMILION, GREEN, PURPLE, ORANGE, "#3d8fd1"))
_current: ContextVar[dict[str, Any]] = ContextVar("look", default=LIGHT)


@contextmanager
def dark() -> Iterator[None]:
    """Pictures that are drawn inside have a dark ground.

    Example:
        >>> from hf_rezero.plots import plot_resweights
        >>> with dark():
        ...     picture = plot_resweights({"layers.0.resweight": 0.1, "layers.1.resweight": -0.2})
        >>> picture.get_facecolor()[:3] == (1, 1, 1)
        False
    """
    before = _current.set(DARK)
    try:
        yield
    finally:
        _current.reset(before)


class Picture(Figure):
    """A matplotlib figure in the look of the library, which a notebook shows, with pyplot or without."""

    def __init__(self, *args, **kwargs) -> None:
        self.look = _current.get()
        with rc_context(self.look):
            super().__init__(*args, **kwargs)

    def draw(self, renderer) -> None:
        """Draw in the look that the figure was made in: matplotlib makes ticks as late as here."""
        with rc_context(self.look):
            super().draw(renderer)

    def save(self, path: str | os.PathLike) -> None:
        """Write a PNG, whole or not at all."""
        with written_whole(path) as temporary:
            temporary.write_bytes(self.png())

    def _repr_png_(self) -> bytes:
        """What IPython shows."""
        return self.png()

    def png(self) -> bytes:
        """The content of a PNG file."""
        with rc_context(self.look):
            self.set_dpi(self.look["savefig.dpi"])
            FigureCanvasAgg(self).print_png(file := io.BytesIO())
        return file.getvalue()


def in_look(draw: Callable) -> Callable:
    """A function that makes a `Picture`, made to draw in its look whatever the settings of matplotlib are."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        with rc_context(_current.get()):
            return draw(*args, **kwargs)

    return drawn


def finished(picture: Picture, path: str | os.PathLike | None) -> Picture:
    """The picture, written where there is a path."""
    if path is not None:
        picture.save(path)
    return picture


def ink() -> str:
    """The colour of text and axes."""
    return _current.get()["text.color"]


def label_lines(axes: Axes, lines: Sequence[Line2D] | None = None, *, size: float = 8.5) -> None:
    """Write the name of every labelled line in its colour to the right of the axes, where the line ends.

    Names that would touch are moved apart, each with a thin line to its end. Call it when all else is drawn.

    Args:
        axes: One panel; `constrained_layout` makes room for the names.
        lines: Default: all lines of the panel whose label does not begin with an underscore.
        size: Of the names, in points.
    """
    lines = [line for line in (axes.get_lines() if lines is None else lines) if not _label(line).startswith("_")]
    figure = axes.get_figure()
    figure.draw_without_rendering()  # limits, and the height of the axes, are known after it
    ends = {line: end for line in lines if (end := _end(axes, line)) is not None}
    ordered = sorted(ends, key=lambda line: ends[line][1])
    height = axes.get_window_extent().height / figure.dpi * 72
    places = spread([ends[line][1] for line in ordered], 1.25 * size / height)
    right = axes.transAxes + ScaledTranslation(10 / 72, 0, figure.dpi_scale_trans)
    for line, place in zip(ordered, places, strict=True):
        colour = line.get_color()
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(
            _label(line),
            ends[line],
            (1, place),
            xycoords=axes.transAxes,
            textcoords=right,
            arrowprops=leader,
            annotation_clip=False,
            color=colour,
            size=size,
            va="center",
        )


def _label(line: Line2D) -> str:
    return str(line.get_label())


def _end(axes: Axes, line: Line2D) -> tuple[float, float] | None:
    """The last point of a line inside the axes, in fractions of them; None where it has none."""
    to_axes = line.get_transform() + axes.transAxes.inverted()  # not always that of the data: see axhline
    points = to_axes.transform(line.get_xydata())
    inside = [(x, y) for x, y in points if -0.001 <= x <= 1.001 and -0.001 <= y <= 1.001]
    return inside[-1] if inside else None


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places that are at least `gap` apart, each group of touching ones about the mean of what it wanted.

    Example:
        >>> spread([1, 5, 5], 2)
        [1.0, 4.0, 6.0]
    """
    groups: list[list[float]] = []  # the wanted places of those that touch
    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and _bounds(groups[-2], gap)[1] + gap > _bounds(groups[-1], gap)[0] + 1e-9:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bounds(group, gap)[0] + i * gap for group in groups for i in range(len(group))]


def _bounds(group: list[float], gap: float) -> tuple[float, float]:
    """The lowest and the highest place of a group."""
    middle, half = sum(group) / len(group), gap * (len(group) - 1) / 2
    return middle - half, middle + half


def plot_seeds(
    axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], *, shade: float = 0.2, **look
) -> Line2D:
    """Draw the mean of the curves (seeds, steps) and, where there are several, the band from their least to their greatest.

    Args:
        axes: One panel.
        x: The steps.
        curves: One for each seed.
        shade: How much of its colour the band has; less where many bands overlap.
        look: Of the line, as `axes.plot` takes it.
    """
    columns = list(zip(*curves, strict=True))
    (line,) = axes.plot(x, [sum(column) / len(column) for column in columns], **look)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=shade, linewidth=0)
    return line
