"""PNG pictures of a training run."""

import math
import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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
