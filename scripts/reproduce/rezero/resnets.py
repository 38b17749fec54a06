"""ResNet-20, 56 and 110 with and without ReZero: epochs to an accuracy, and the error at the end.

    python scripts/reproduce/run.py resnets --image_file cifar10_subset.npz

The recipe is the paper's at a smaller size: SGD with momentum 0.9 and weight decay 5e-4, not on residual weights, batches
of 128, the learning rate divided by 10 after a half and three quarters of the epochs; pictures are averaged to 16 x 16,
shifted by up to 2 pixels and flipped. Each arm takes the learning rate that was best for it on seed 0, by the error of
the last epochs. The claims are Bachlechner et al. 2020, section 6: ResNet-56 needs a third fewer epochs to 15 % error, and
ends with a lower error; ResNet-110 starts as fast as ResNet-20. Results are written after every run, and a repeated call
goes on where it stopped.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from common.drawing import light_and_dark
from common.images import BATCH, HELP, accuracy, augment, final_error, standardized
from common.record import FIGURES, RESULTS, once, read_json, write_json
from common.rules import PLAIN_RESNET
from hf_rezero import ReZeroResNetConfig, ReZeroResNetForImageClassification, param_groups
from hf_rezero.picture import Picture, label_lines, plot_seeds


ARMS = {"ReZero": {}, "plain": PLAIN_RESNET, "zero gamma": {"zero_init_residual": True, **PLAIN_RESNET}}
# blocks in each of three stages, epochs, learning rates
NETS: dict[str, tuple[int, int, tuple[float, ...]]] = {
    "ResNet-20": (3, 12, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "ResNet-56": (9, 6, (0.01, 0.03, 0.1, 0.3)),
    "ResNet-110": (18, 3, (0.01, 0.03, 0.1)),
}
ACCURACIES = (35.0, 45.0)


def train(net: str, arm: str, rate: float, seed: int, data: dict[str, Tensor], epochs: int) -> dict:
    """The test accuracy and the mean training loss of every epoch."""
    torch.manual_seed(seed)
    config = ReZeroResNetConfig(depths=[NETS[net][0]] * 3, num_labels=10, **ARMS[arm])
    model = ReZeroResNetForImageClassification(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    record, start = {"accuracy": [], "loss": []}, time.perf_counter()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.1 ** (2 * epoch // epochs + (4 * epoch // epochs == 3))
        losses = []
        model.train()
        for rows in torch.randperm(len(data["train_y"]), generator=generator).split(BATCH)[:-1]:
            x = augment(data["train_x"][rows], generator).contiguous(memory_format=torch.channels_last)
            loss = model(x, labels=data["train_y"][rows].long()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        record["accuracy"].append(round(accuracy(model, data), 2))
        record["loss"].append(round(mean(losses), 4))
    return record | {"seconds": round(time.perf_counter() - start)}


def epochs_to(curve: list[float], wanted: float) -> float | None:
    """When the accuracy passes `wanted`, between epochs by a straight line from 10 % at the start; None if never."""
    points = [10.0, *curve]
    for epoch, (a, b) in enumerate(zip(points, points[1:], strict=False)):
        if b >= wanted:
            return round(epoch + max(0.0, (wanted - a) / (b - a)), 2)
    return None


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet: the grid on seed 0, then the best rate on the other seeds."""
    data, results = standardized(args.image_file, args.pictures), read_json(args.output) or {"runs": {}, "best": {}}
    results["settings"] = {"pictures": {part: len(data[f"{part}_y"]) for part in ("train", "test")}}

    def run(net: str, arm: str, rate: float, seed: int) -> dict:
        key = f"{net} | {arm} | lr={rate:g} | seed={seed}"
        epochs = args.epochs or NETS[net][1]
        return once(args.output, results, key, lambda: train(net, arm, rate, seed, data, epochs))

    for net in args.nets:
        for arm in args.arms:
            best = min(NETS[net][2], key=lambda rate: final_error(run(net, arm, rate, 0)["accuracy"]))
            runs = [run(net, arm, best, seed) for seed in range(args.seeds)]
            results["best"][f"{net} | {arm}"] = {
                "learning_rate": best,
                "error": [round(final_error(r["accuracy"]), 2) for r in runs],
            } | {f"epochs to {wanted:g} %": [epochs_to(r["accuracy"], wanted) for r in runs] for wanted in ACCURACIES}
            write_json(args.output, results)
    return results


@light_and_dark
def draw(results: dict) -> Picture:
    """Accuracy by epoch, one panel for each net, mean and band of the seeds."""
    nets = list(dict.fromkeys(key.split(" | ")[0] for key in results["best"]))
    figure = Picture(figsize=(4.2 * len(nets), 3.6))
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        for color, arm in enumerate(ARMS):
            best = results["best"].get(f"{net} | {arm}", {"error": []})
            keys = [f"{net} | {arm} | lr={best['learning_rate']:g} | seed={s}" for s in range(len(best["error"]))]
            curves = [results["runs"][key]["accuracy"] for key in keys]
            if curves:
                label = f"{arm}, lr {best['learning_rate']:g}"
                plot_seeds(axes, range(1, len(curves[0]) + 1), curves, color=f"C{color}", label=label)
        axes.set(title=net, xlabel="epoch", ylabel="test accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_lines(axes)
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each net and rule: error at the end and epochs to each accuracy, means and seeds."""
    marks = [name for name in next(iter(results["best"].values())) if name.startswith("epochs")]
    rows = [["", "best lr", "test error, %, mean", "by seed", *(f"{mark}, mean" for mark in marks)]]
    for name, best in results["best"].items():
        by_seed = ", ".join(f"{error:.1f}" for error in best["error"])
        waits = [f"{mean(best[mark]):.1f}" if None not in best[mark] else "not by all" for mark in marks]
        error = f"{mean(best['error']):.1f}"
        rows.append([name.replace(" | ", ", "), f"{best['learning_rate']:g}", error, by_seed, *waits])
    return rows


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_file", required=True, help=HELP)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ReZero", "plain"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of those of each net")
    parser.add_argument("--pictures", type=int, help="at most so many of each part")
    parser.add_argument("--output", type=Path, default=RESULTS / "resnets.json")
    parser.add_argument("--figure", type=Path, default=FIGURES / "resnets.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = run_all(args)
    draw(results, args.figure)
    for name, best in results["best"].items():
        print(name, best)
