"""How the claims draw: in the look of the library, each figure once for a light page and once for a dark one."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from PIL import Image

from common.curves import runs_of, smooth
from hf_rezero.files import written_whole
from hf_rezero.picture import Picture, dark, in_look, plot_seeds


GRAY = "#8a8a8a"  # of what is no result: the entropy of the data, the loss of guessing


def light_and_dark(draw: Callable[[dict], Picture]) -> Callable[[dict, Path], None]:
    """A function that writes the figure of a claim to a path, and its dark twin beside it as `NAME_dark.png`."""

    @wraps(draw)
    def write(results: dict, path: Path) -> None:
        save_small(in_look(draw)(results), path)
        with dark():
            save_small(in_look(draw)(results), path.with_name(f"{path.stem}_dark.png"))

    return write


def save_small(picture: Picture, path: Path) -> None:
    """Write a PNG of at most 256 colours, a third of the size: these files are in the repository."""
    picture.save(path)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with written_whole(path) as temporary:
        few.save(temporary, format="PNG", optimize=True)


def plot_arm(axes: Axes, results: dict, arm: str, **look) -> Line2D | None:
    """Smoothed losses of an arm at its best learning rate, mean and band of the seeds; None where all diverged."""
    curves = [smooth(run["curve"]) for run in runs_of(results, arm) if len(run["curve"]) > 5]
    return plot_seeds(axes, curves[0][0], [losses for _, losses in curves], **look) if curves else None
