"""PNG pictures of a training run."""

import math
import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure as a PNG, under a temporary name first, so that no reader sees half a file."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    temporary.replace(path)


def plot_training(log_history: list[dict], path: str | os.PathLike) -> None:
    """Draw training loss and evaluation loss (or bits per byte) by step from `trainer.state.log_history`.

    Args:
        log_history: The entries that the Trainer logged; losses in nats.
        path: The PNG to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    has_bpb = any("eval_bpb" in entry for entry in log_history)
    unit = math.log(2) if has_bpb else 1.0
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key] / unit) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="bits per byte" if has_bpb else "loss (nats)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_figure(figure, path)


def plot_resweights(profile: dict[str, float], path: str | os.PathLike) -> None:
    """Draw the residual weights by depth from `resweight_profile(model)`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(profile)), list(profile.values()))
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="residual connection, from the input to the output", ylabel="resweight")
    axes.grid(alpha=0.3, axis="y")
    save_figure(figure, path)


def plot_kept(report, path: str | os.PathLike) -> None:
    """Draw which units are left, one panel for each kind: a row for each group, and beside it the fraction kept.

    Neighbouring units share a pixel column where a group has more than 128; its shade is how many of them are left.

    Args:
        report: A `PruningReport`, or the dict that it has saved as JSON.
        path: The PNG to write.
    """
    units, kept = (report["units"], report["kept"]) if isinstance(report, dict) else (report.units, report.kept)
    kinds = {kind: [name for name in units if units[name][0] == kind] for kind, _ in units.values()}
    heights = [0.9 + min(6.0, 0.16 * len(names)) for names in kinds.values()]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(kinds), 2, squeeze=False, gridspec_kw={"width_ratios": (4, 1), "height_ratios": heights}
    )
    for (left, right), (kind, names) in zip(grid, kinds.items(), strict=True):
        masks = [_mask(kept[name], units[name][1]) for name in names]
        _draw_units(left, masks, kind)
        _label_rows(left, names)
        fractions = [sum(mask) / len(mask) for mask in masks]
        right.barh(range(len(names)), fractions, height=0.9)
        right.set(xlim=(0, 1), ylim=left.get_ylim(), yticks=[], xlabel="fraction kept")
        right.set_title(f"{sum(map(sum, masks))} of {sum(map(len, masks))}", fontsize=9)
    save_figure(figure, path)


def _mask(kept: str | list[int], count: int) -> list[int]:
    """1 for each kept unit, 0 for each other; JSON has the kept ones as "0-2,5"."""
    if isinstance(kept, str):
        runs = [part.partition("-") for part in kept.split(",") if part]
        kept = [unit for a, _, b in runs for unit in range(int(a), int(b or a) + 1)]
    left = set(kept)
    return [int(unit in left) for unit in range(count)]


def _draw_units(axes, masks: list[list[int]], kind: str, columns: int = 128) -> None:
    widest = max(map(len, masks))
    columns = min(columns, widest)
    rows = [
        [_shade(mask, widest * i // columns, widest * (i + 1) // columns) for i in range(columns)] for mask in masks
    ]
    extent = (-0.5, widest - 0.5, len(masks) - 0.5, -0.5)
    axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1, extent=extent)
    axes.set_facecolor("0.8")  # seen where a group has fewer units than the widest
    axes.set(xlabel=f"unit (dark: kept, white: removed{', mixed: by share' if columns < widest else ''})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(kind, fontsize=9)


def _shade(mask: list[int], start: int, stop: int) -> float:
    """The kept fraction of these units; nan, drawn as background, beyond the last."""
    inside = mask[start:stop]
    return sum(inside) / len(inside) if inside else math.nan


def _label_rows(axes, names: list[str]) -> None:
    """The groups by what tells their names apart, at most 32 of them."""
    step = math.ceil(len(names) / 32)
    labels = _differences(names)
    axes.set_yticks(range(0, len(names), step), labels[::step], fontsize=7)
    axes.set_ylabel("group")


def _differences(names: list[str]) -> list[str]:
    """Names without the dotted parts that all of them begin or end with."""
    parts = [name.split(".") for name in names]
    if len(names) == 1:
        return names
    while len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[1:] for part in parts]
    while len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def plot_sparsity_curve(points: list[dict], path: str | os.PathLike) -> None:
    """Draw quality over sparsity, a line for each score.

    Args:
        points: As `curve.json` of `scripts/prune.py` has them: each with "sparsity", one of "bpb", "bits_per_token"
            and "loss", and the name of its "score" if there are several.
        path: The PNG to write.
    """
    units = {"bpb": "bits per byte", "bits_per_token": "bits per token", "loss": "loss (nats)"}
    key = next(name for name in units if all(name in point for point in points))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for score in dict.fromkeys(point.get("score") for point in points):
        line = sorted((point["sparsity"], point[key]) for point in points if point.get("score") == score)
        axes.plot(*zip(*line, strict=True), "o-", label=score, markersize=4)
    axes.set(xlabel="fraction of the prunable parameters removed", ylabel=units[key])
    axes.grid(alpha=0.3)
    if points[0].get("score"):
        axes.legend()
    save_figure(figure, path)
