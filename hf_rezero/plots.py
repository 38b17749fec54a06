"""Pictures of a run and of what was found about a network: each is returned, and written as a PNG where a path is given."""

import math
import os
from collections.abc import Mapping, Sequence

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .picture import HEIGHT, WIDTH, Picture, finished, in_look, ink, label_lines


Path = str | os.PathLike | None
ROWS = 40  # that are labelled one by one


@in_look
def plot_training(log_history: list[dict], path: Path = None) -> Picture:
    """Draw training loss and evaluation loss (or bits per byte) by step from `trainer.state.log_history`.

    A training loss is the mean of the steps since the entry before it, so it stands in the middle of them; an evaluation
    stands at its own step. A run that ended before its first log has the mean of all of its steps.

    Args:
        log_history: The entries that the Trainer logged; losses in nats.
        path: The PNG to write; default: none.
    """
    picture = Picture(figsize=(WIDTH, HEIGHT))
    axes = picture.subplots()
    has_bpb = any("eval_bpb" in entry or "bpb" in entry for entry in log_history)
    unit = math.log(2) if has_bpb else 1.0
    training = _means(log_history, "loss") or _means(log_history, "train_loss")
    validation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    for points, name, style in ((training, "training", ".-"), (validation, "validation", "o-")):
        if points:
            axes.plot([step for step, _ in points], [loss / unit for _, loss in points], style, label=name)
    axes.set(xlabel="optimiser step", ylabel="bits per byte" if has_bpb else "loss, nats")
    label_lines(axes)
    return finished(picture, path)


def _means(log_history: list[dict], key: str) -> list[tuple[float, float]]:
    """The mean losses of the Trainer, each at the middle of the steps that it is the mean of."""
    found, before = [], 0
    for entry in log_history:
        if key in entry:
            found.append(((before + 1 + entry["step"]) / 2, entry[key]))
            before = entry["step"]
    return found


@in_look
def plot_resweights(profile: dict[str, float], path: Path = None) -> Picture:
    """Draw the residual weights by depth from `resweight_profile(model)`."""
    picture = Picture(figsize=(WIDTH, HEIGHT))
    axes = picture.subplots()
    axes.bar(range(len(profile)), list(profile.values()))
    axes.axhline(0, color=ink(), linewidth=0.5)
    axes.set(xlabel="residual connection, from the input to the output", ylabel="residual weight")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")
    return finished(picture, path)


@in_look
def plot_gradinit(report, path: Path = None) -> Picture:
    """Draw loss and gradient norm by step, and the scale of every tensor by its name, from a `GradInitReport`."""
    picture, losses, norms, scales = _search_panels(report.scales)
    losses.plot([entry["loss"] for entry in report.history], label="scaled weights")
    # None where there was no trial step; NaN leaves a gap in the line.
    trial = [math.nan if entry["trial_loss"] is None else entry["trial_loss"] for entry in report.history]
    losses.plot(trial, ".", label="after trial step", markersize=3)
    losses.set(xlabel="step", ylabel="loss")
    norms.semilogy([entry["grad_norm"] for entry in report.history], label="_norm")
    norms.axhline(report.gamma, color=ink(), linewidth=0.8, linestyle="--", label="bound, gamma")
    norms.set(xlabel="step", ylabel="gradient norm")
    _draw_scales(scales, report.scales)
    label_lines(losses)
    label_lines(norms)
    return finished(picture, path)


@in_look
def plot_metainit(report, path: Path = None) -> Picture:
    """Draw loss and gradient quotient by step, and the scale of every tensor by its name, from a `MetaInitReport`."""
    picture, losses, quotients, scales = _search_panels(report.scales)
    losses.plot([entry["loss"] for entry in report.history])
    losses.set(xlabel="step", ylabel="loss on random data")
    quotients.semilogy([entry["gradient_quotient"] for entry in report.history])
    quotients.set(xlabel="step", ylabel="gradient quotient")
    _draw_scales(scales, report.scales)
    return finished(picture, path)


def _search_panels(scales: Mapping[str, float]) -> tuple[Picture, Axes, Axes, Axes]:
    """Two panels by step above one with a row for each tensor."""
    heights = (2.4, 0.7 + 0.17 * min(len(scales), ROWS))
    picture = Picture(figsize=(1.25 * WIDTH, sum(heights)))
    grid = picture.add_gridspec(2, 2, height_ratios=heights)
    left, right, below = (
        picture.add_subplot(grid[0, 0]),
        picture.add_subplot(grid[0, 1]),
        picture.add_subplot(grid[1, :]),
    )
    return picture, left, right, below


def _draw_scales(axes: Axes, scales: Mapping[str, float]) -> None:
    axes.semilogx(list(scales.values()), range(len(scales)), "o")
    axes.axvline(1, color=ink(), linewidth=0.8)
    axes.set(xlabel="factor of the tensor", ylim=(len(scales) - 0.5, -0.5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}" if _spans_little(scales.values()) else "")
    _label_rows(axes, list(scales))


def _spans_little(values) -> bool:
    """Whether a logarithmic axis of these would have no more than one power of ten on it."""
    return max(values) / max(min(values), 1e-12) < 30


@in_look
def plot_kept(report, path: Path = None) -> Picture:
    """Draw which units are left, one panel for each kind: a row for each group, and beside it the fraction kept.

    Neighbouring units share a pixel column where a group has more than 128; its shade is how many of them are left.

    Args:
        report: A `PruningReport`, or the dict that it has saved as JSON.
        path: The PNG to write; default: none.
    """
    units, kept = (report["units"], report["kept"]) if isinstance(report, dict) else (report.units, report.kept)
    kinds = {kind: [name for name in units if units[name][0] == kind] for kind, _ in units.values()}
    heights = [0.9 + min(6.0, 0.16 * len(names)) for names in kinds.values()]
    picture = Picture(figsize=(1.25 * WIDTH, sum(heights)))
    grid = picture.subplots(
        len(kinds), 2, squeeze=False, gridspec_kw={"width_ratios": (4, 1), "height_ratios": heights}
    )
    for (left, right), (kind, names) in zip(grid, kinds.items(), strict=True):
        masks = [_mask(kept[name], units[name][1]) for name in names]
        _draw_units(left, masks, kind)
        _label_rows(left, names)
        fractions = [sum(mask) / len(mask) for mask in masks]
        right.barh(range(len(names)), fractions, height=0.9)
        right.grid(visible=False, axis="y")
        right.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=left.get_ylim(), yticks=[], xlabel="fraction kept")
        right.set_title(f"{sum(map(sum, masks))} of {sum(map(len, masks))}", fontsize=9)
    return finished(picture, path)


def _mask(kept: str | list[int], count: int) -> list[int]:
    """1 for each kept unit, 0 for each other; JSON has the kept ones as "0-2,5"."""
    if isinstance(kept, str):
        runs = [part.partition("-") for part in kept.split(",") if part]
        kept = [unit for a, _, b in runs for unit in range(int(a), int(b or a) + 1)]
    left = set(kept)
    return [int(unit in left) for unit in range(count)]


def _draw_units(axes: Axes, masks: list[list[int]], kind: str, columns: int = 128) -> None:
    widest = max(map(len, masks))
    columns = min(columns, widest)
    rows = [
        [_shade(mask, widest * i // columns, widest * (i + 1) // columns) for i in range(columns)] for mask in masks
    ]
    extent = (-0.5, widest - 0.5, len(masks) - 0.5, -0.5)
    axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1, extent=extent)
    axes.grid(visible=False)
    axes.set_facecolor(rcParams["grid.color"])  # seen where a group has fewer units than the widest
    axes.set(xlabel=f"unit (dark: kept, white: removed{', mixed: by share' if columns < widest else ''})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(kind, fontsize=9)


def _shade(mask: list[int], start: int, stop: int) -> float:
    """The kept fraction of these units; nan, drawn as background, beyond the last."""
    inside = mask[start:stop]
    return sum(inside) / len(inside) if inside else math.nan


def _label_rows(axes: Axes, names: list[str]) -> None:
    """The names of groups or tensors by what tells them apart, at most `ROWS` of them."""
    step = math.ceil(len(names) / ROWS)
    labels = _differences(names)
    axes.set_yticks(range(0, len(names), step), labels[::step], fontsize=7)


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


@in_look
def plot_sparsity_curve(points: list[dict], path: Path = None) -> Picture:
    """Draw quality over sparsity, a line for each score.

    Args:
        points: As `curve.json` of `hf-rezero prune` has them: each with "sparsity", one of "bpb", "bits_per_token"
            and "loss", and the name of its "score" if there are several.
        path: The PNG to write; default: none.
    """
    units = {"bpb": "bits per byte", "bits_per_token": "bits per token", "loss": "loss, nats"}
    key = next(name for name in units if all(name in point for point in points))
    picture = Picture(figsize=(WIDTH, HEIGHT))
    axes = picture.subplots()
    for score in dict.fromkeys(point.get("score") for point in points):
        line = sorted((100 * point["sparsity"], point[key]) for point in points if point.get("score") == score)
        axes.plot(*zip(*line, strict=True), "o-", label=score or "_only")
    axes.set(xlabel="prunable parameters removed, %", ylabel=units[key])
    label_lines(axes)
    return finished(picture, path)


@in_look
def plot_jacobian(
    panels: dict[str, dict[str, Sequence[float]]], path: Path = None, *, floor: float = 1e-18, columns: int = 4
) -> Picture:
    """Draw histograms of log10 of singular values, a panel for each depth or step and a colour for each variant.

    Every value counts: those at or below `floor`, exact zeros too, are gathered in the bar at the left edge.

    Args:
        panels: The singular values by the title of their panel and the name of their variant.
        path: The PNG to write; default: none.
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
    picture = Picture(figsize=(max(WIDTH, 2.4 + 2.6 * columns), 1 + max(2.3 * rows, 3)))
    grid = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (title, variants) in zip(grid.flat, logs.items(), strict=False):
        for name, values in variants.items():
            colour, shares = f"C{names.index(name)}", _shares(values, edges)
            axes.stairs(shares, edges, fill=True, alpha=0.2, color=colour)
            axes.stairs(shares, edges, color=colour, label=name)
        axes.set_title(title, fontsize=10)
        # a spike at 1 would flatten everything else; nothing is lost below: one value of a variant is above the edge
        axes.set(yscale="log", ylim=(0.5 / max(len(v) for group in logs.values() for v in group.values()), 1.5))
    for axes in grid.flat[len(logs) :]:
        axes.set_visible(False)
    handles = {h.get_label(): h for axes in grid.flat for h in axes.get_legend_handles_labels()[0]}
    if names != [""]:
        picture.legend(handles=list(handles.values()), loc="outside upper center", ncols=min(len(names), 4))
    edge = f" (left edge: {floor:.0e} or less)" if min(pooled) <= math.log10(floor) else ""
    picture.supxlabel(f"log10 of the singular values of the input-output Jacobian{edge}", fontsize=10)
    picture.supylabel("fraction of them", fontsize=10)
    return finished(picture, path)


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


@in_look
def plot_gradients(profiles: Mapping, path: Path = None) -> Picture:
    """Draw gradient norms by depth on a logarithmic scale; gradients of exactly 0 are triangles at the lower edge.

    Args:
        profiles: `gradient_profile(model)`, plain norms by name, or a dict of either by the name of their variant.
        path: The PNG to write; default: none.
    """
    if not isinstance(next(iter(profiles.values())), dict):
        profiles = {"": profiles}
    norms = {v: {name: getattr(g, "norm", g) for name, g in profile.items()} for v, profile in profiles.items()}
    picture = Picture(figsize=(WIDTH, HEIGHT))
    axes = picture.subplots()
    bottom = min((n for profile in norms.values() for n in profile.values() if n > 0), default=1.0) / 3
    for i, (variant, profile) in enumerate(norms.items()):
        heights = list(profile.values())
        axes.plot([h if h > 0 else math.nan for h in heights], "o-", color=f"C{i}", label=variant or "_only")
        zeros = [x for x, h in enumerate(heights) if not h > 0]
        if zeros:
            label = f"{variant} exactly 0".strip()
            axes.plot(zeros, [bottom] * len(zeros), "v", color=f"C{i}", label=label, markersize=6)
    axes.set_yscale("log")
    names = list(max(norms.values(), key=len))
    step = math.ceil(len(names) / 16)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="gradient norm")
    axes.set_ylim(bottom=bottom / 2)
    label_lines(axes)
    return finished(picture, path)
