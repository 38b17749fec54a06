"""PNG pictures of a training run."""

import math
import os

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import written_whole


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure as a PNG, whole or not at all."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


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
        points: As `curve.json` of `hf-rezero prune` has them: each with "sparsity", one of "bpb", "bits_per_token"
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


def plot_jacobian(
    panels: dict[str, dict[str, list[float]]], path: str | os.PathLike, *, floor: float = 1e-18, columns: int = 4
) -> None:
    """Draw histograms of log10 of singular values, a panel for each depth or step and a colour for each variant.

    Every value counts: those at or below `floor`, exact zeros too, are gathered in the bar at the left edge.

    Args:
        panels: The singular values by the title of their panel and the name of their variant.
        path: The PNG to write.
        floor: What is drawn as zero; 1e-18 is below what float64 resolves beside values near 1.
        columns: Panels in a row.
    """
    logs = {
        title: {name: [math.log10(max(v, floor)) for v in values] for name, values in variants.items()}
        for title, variants in panels.items()
    }
    pooled = [v for variants in logs.values() for values in variants.values() for v in values]
    edges = _edges(min(pooled), max(pooled))
    names = list(dict.fromkeys(name for variants in logs.values() for name in variants))
    rows, columns = math.ceil(len(logs) / columns), min(len(logs), columns)
    figure = Figure(figsize=(3 + 3 * columns, 1 + 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (title, variants) in zip(grid.flat, logs.items(), strict=False):
        for name, values in variants.items():
            colour, shares = f"C{names.index(name)}", _shares(values, edges)
            axes.stairs(shares, edges, fill=True, alpha=0.2, color=colour)
            axes.stairs(shares, edges, color=colour, label=name)
        axes.set_title(title, fontsize=10)
        # a spike at 1 would flatten everything else; nothing is lost below: one value of a variant is above the edge
        axes.set(yscale="log", ylim=(0.5 / max(len(v) for group in logs.values() for v in group.values()), 1.5))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(logs) :]:
        axes.set_visible(False)
    handles = {h.get_label(): h for axes in grid.flat for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=min(len(names), 4), fontsize=9)
    edge = f" (left edge: {floor:.0e} or less)" if min(pooled) <= math.log10(floor) else ""
    figure.supxlabel(f"log10 of the singular values of the input-output Jacobian{edge}", fontsize=10)
    figure.supylabel("fraction of them", fontsize=10)
    save_figure(figure, path)


def _edges(lowest: float, highest: float) -> list[float]:
    """At most 50 equal bins, one of which is centred on 0: a spectrum of ones is one bar there."""
    lowest, highest = min(lowest, -1.0), max(highest, 1.0)
    width = next((w for w in (0.05, 0.1, 0.2, 0.5) if (highest - lowest) / w <= 48), (highest - lowest) / 48)
    first, last = math.floor(lowest / width + 0.5), math.ceil(highest / width - 0.5)
    return [(i - 0.5) * width for i in range(first, last + 2)]


def _shares(values: list[float], edges: list[float]) -> list[float]:
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(int((value - edges[0]) / (edges[1] - edges[0])), len(counts) - 1)] += 1
    return [count / len(values) for count in counts]


def plot_gradients(profiles: dict, path: str | os.PathLike) -> None:
    """Draw gradient norms by depth on a logarithmic scale; gradients of exactly 0 are triangles at the lower edge.

    Args:
        profiles: `gradient_profile(model)`, plain norms by name, or a dict of either by the name of their variant.
        path: The PNG to write.
    """
    if not isinstance(next(iter(profiles.values())), dict):
        profiles = {"": profiles}
    norms = {v: {name: getattr(g, "norm", g) for name, g in profile.items()} for v, profile in profiles.items()}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bottom = min((n for profile in norms.values() for n in profile.values() if n > 0), default=1.0) / 3
    for i, (variant, profile) in enumerate(norms.items()):
        heights = list(profile.values())
        axes.plot([h if h > 0 else math.nan for h in heights], "o-", color=f"C{i}", label=variant, markersize=3)
        zeros = [x for x, h in enumerate(heights) if not h > 0]
        if zeros:
            axes.plot(zeros, [bottom] * len(zeros), "v", color=f"C{i}", label=f"{variant} exactly 0".strip())
    axes.set_yscale("log")
    names = list(max(norms.values(), key=len))
    step = math.ceil(len(names) / 16)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="gradient norm")
    axes.set_ylim(bottom=bottom / 2)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    save_figure(figure, path)
