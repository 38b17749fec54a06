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

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.record import FIGURES, RESULTS, provenance, read_json, write_json
from hf_rezero import ReZeroResNetConfig, ReZeroResNetForImageClassification, param_groups
from hf_rezero.plots import save_figure


PLAIN = {"activation_position": "sum", "resweight_init": 1.0, "resweight_trainable": False}
ARMS = {"ReZero": {}, "plain": PLAIN, "zero gamma": {"zero_init_residual": True, **PLAIN}}
# blocks in each of three stages, epochs, learning rates
NETS: dict[str, tuple[int, int, tuple[float, ...]]] = {
    "ResNet-20": (3, 12, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "ResNet-56": (9, 6, (0.01, 0.03, 0.1, 0.3)),
    "ResNet-110": (18, 3, (0.01, 0.03, 0.1)),
}
BATCH, ACCURACIES = 128, (35.0, 45.0)


def load(path: str, count: int | None) -> dict[str, Tensor]:
    """Pictures as floats with mean 0 and deviation 1 by channel of the training part, and their classes."""
    with np.load(path) as file:
        data = {name: torch.from_numpy(file[name])[:count] for name in ("train_x", "train_y", "test_x", "test_y")}
    pictures = {
        name: nn.functional.adaptive_avg_pool2d(data[name].permute(0, 3, 1, 2) / 255, 16)
        for name in ("train_x", "test_x")
    }
    center, spread = (f(pictures["train_x"], dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return data | {name: (x - center) / spread for name, x in pictures.items()}


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip and shift each picture, 0 beyond the border."""
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    rows, columns = (torch.randint(5, (len(x), 1), generator=generator) + torch.arange(16) for _ in range(2))
    return padded[
        torch.arange(len(x))[:, None, None, None],
        torch.arange(3)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    ]


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, Tensor]) -> float:
    """Per cent of the test pictures."""
    model.eval()
    right = [
        (model(x).logits.argmax(1) == y).sum()
        for x, y in zip(data["test_x"].split(256), data["test_y"].split(256), strict=True)
    ]
    return 100 * float(sum(right)) / len(data["test_y"])


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


def final(record: dict) -> float:
    """Mean error of the last two epochs, per cent."""
    return 100 - mean(record["accuracy"][-2:])


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet: the grid on seed 0, then the best rate on the other seeds."""
    data, results = load(args.image_file, args.pictures), read_json(args.output) or {"runs": {}, "best": {}}
    results["settings"] = {"pictures": {part: len(data[f"{part}_y"]) for part in ("train", "test")}}

    def run(net: str, arm: str, rate: float, seed: int) -> dict:
        key = f"{net} | {arm} | lr={rate:g} | seed={seed}"
        if key not in results["runs"]:
            results["runs"][key] = train(net, arm, rate, seed, data, args.epochs or NETS[net][1])
            results["provenance"] = provenance()
            write_json(args.output, results)
            print(f"{key}: {results['runs'][key]['accuracy']} in {results['runs'][key]['seconds']} s", flush=True)
        return results["runs"][key]

    for net in args.nets:
        for arm in args.arms:
            best = min(NETS[net][2], key=lambda rate: final(run(net, arm, rate, 0)))
            runs = [run(net, arm, best, seed) for seed in range(args.seeds)]
            results["best"][f"{net} | {arm}"] = {
                "learning_rate": best,
                "error": [round(final(r), 2) for r in runs],
            } | {f"epochs to {wanted:g} %": [epochs_to(r["accuracy"], wanted) for r in runs] for wanted in ACCURACIES}
            write_json(args.output, results)
    return results


def draw(results: dict, path: Path) -> None:
    """Accuracy by epoch, one panel for each net, one line for each seed."""
    nets = list(dict.fromkeys(key.split(" | ")[0] for key in results["best"]))
    figure = Figure(figsize=(4.5 * len(nets), 3.8), layout="constrained")
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        for color, arm in enumerate(ARMS):
            best = results["best"].get(f"{net} | {arm}", {"error": []})
            for seed in range(len(best["error"])):
                curve = results["runs"][f"{net} | {arm} | lr={best['learning_rate']:g} | seed={seed}"]["accuracy"]
                label = f"{arm}, lr {best['learning_rate']:g}" if seed == 0 else None
                axes.plot(range(1, len(curve) + 1), curve, f"C{color}", linewidth=1, label=label)
        axes.set(title=net, xlabel="epoch", ylabel="test accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_file", required=True, help=".npz with train_x, train_y, test_x, test_y (uint8, NHWC)")
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
