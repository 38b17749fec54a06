"""Table 3 of GradInit: VGG-19 and ResNet-110 with and without BatchNorm on CIFAR-10, started in five ways.

    python scripts/reproduce/run.py gradinit_images --image_file cifar10_subset.npz

The default arguments are those of the paper's runs (full width, 200 epochs, batches of 128, 390 steps of GradInit) and
are meant for a GPU; the recorded command says how far it is from them. SGD with momentum 0.9, the learning rate falls to
0 along a cosine, weight decay 1e-4 on matrices, crops and flips, gradients clipped to norm 1 in nets without BatchNorm.
"+ 1 epoch" trains one epoch more, before the others, at the constant rate or rising to it. "First epoch" is the test
accuracy after the first epoch of the cosine, "best" the highest of all epochs; both are of the test images, as in the
paper, and nothing is tuned by them.

Also: the variance of the gradient between batches by layer, before and after GradInit; the scales it found; and what
becomes of one net when batch overlap and gamma are changed or the scales are simply trained.

Results are written after every run and a repeated call goes on where it stopped.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.drawing import light_and_dark
from common.images import HELP, endless_rows, floats, read_images, shifted
from common.record import FIGURES, RESULTS, once, read_json, write_json
from hf_rezero import gradinit_, metainit_, param_groups
from hf_rezero.initialization.gradinit import GradInit, half_overlap
from hf_rezero.initialization.metainit import random_batches
from hf_rezero.picture import Picture, ink, label_lines


PAPER_STEPS = 390
VARIANCE_BATCHES = 16
Batch = tuple[Tensor, Tensor]


# --- networks, as in the official code: Kaiming normal by fan out, no zero initialisation of the last BatchNorm


def convolution(inputs: int, outputs: int, norm: bool, stride: int = 1) -> nn.Sequential:
    """3 x 3, and BatchNorm if asked for."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if norm else nn.Sequential(conv)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + conv(relu(conv(x)))); the shortcut drops pixels and adds empty channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.first, self.second = convolution(inputs, outputs, norm, stride), convolution(outputs, outputs, norm)
        self.stride, self.new = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        return F.relu(shortcut + y)


def resnet(norm: bool, divisor: int, blocks: int) -> nn.Module:
    """6 * blocks + 2 layers: 18 blocks are ResNet-110."""
    layers, inputs = [convolution(3, 16 // divisor, norm), nn.ReLU()], 16 // divisor
    for stage, width in enumerate((16, 32, 64)):
        for block in range(blocks):
            layers.append(BasicBlock(inputs, width // divisor, 2 if stage and not block else 1, norm))
            inputs = width // divisor
    head = nn.Linear(inputs, 10)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def vgg(norm: bool, divisor: int, blocks: tuple[int, ...]) -> nn.Module:
    """Blocks of convolutions, halved by pooling after each: (2, 2, 4, 4, 4) are VGG-19 with one linear layer."""
    layers, inputs = [], 3
    for width, count in zip((64, 128, 256, 512, 512), blocks, strict=True):
        for _ in range(count):
            layers += [convolution(inputs, width // divisor, norm), nn.ReLU()]
            inputs = width // divisor
        layers.append(nn.MaxPool2d(2))
    head = nn.Linear(inputs, 10)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@dataclass(frozen=True)
class Network:
    """Which net, and the learning rate of its scales in the official runs of 390 steps."""

    family: str
    norm: bool
    scale_lr: float


NETWORKS = {
    "VGG-19": Network("vgg", False, 1e-2),
    "VGG-19 BN": Network("vgg", True, 1e-1),
    "ResNet-110": Network("resnet", False, 5e-2),
    "ResNet-110 BN": Network("resnet", True, 1e-3),
}


def build(name: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """The net with its Kaiming initialisation."""
    torch.manual_seed(seed)
    network = NETWORKS[name]
    if network.family == "vgg":
        model = vgg(network.norm, args.vgg_divisor, (1,) * 5 if args.shallow else (2, 2, 4, 4, 4))
    else:
        model = resnet(network.norm, args.resnet_divisor, 1 if args.shallow else 18)
    return model.to(args.device, memory_format=torch.channels_last)


# --- data


class Images:
    """Training and test images in memory, uint8 to normalised floats, averaged to fewer pixels if asked for."""

    def __init__(self, args: argparse.Namespace, size: int) -> None:
        data = read_images(args.image_file)
        keep = slice(0, args.train_images or None)
        self.train = F.adaptive_avg_pool2d(floats(data["train_x"][keep]), size), data["train_y"][keep].long()
        self.test = F.adaptive_avg_pool2d(floats(data["test_x"]), size), data["test_y"].long()
        self.batch_size, self.device = min(args.batch_size, len(self.train[1])), args.device

    def forever(self, seed: int) -> Iterator[Batch]:
        """Batches of training images in a random order, cropped and flipped; what does not fill a batch is left out."""
        rng = np.random.default_rng(seed)
        for rows in map(torch.from_numpy, endless_rows(len(self.train[1]), self.batch_size, rng)):
            yield self._to(augment(self.train[0][rows], rng), self.train[1][rows])

    def accuracy(self, model: nn.Module) -> float:
        """Per cent of the test images."""
        model.eval()
        with torch.no_grad():
            pairs = zip(self.test[0].split(256), self.test[1].split(256), strict=True)
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in (self._to(*pair) for pair in pairs))
        model.train()
        return 100 * right / len(self.test[1])

    def _to(self, x: Tensor, y: Tensor) -> Batch:
        return x.to(self.device, memory_format=torch.channels_last), y.to(self.device)


def augment(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image flipped or not, and shifted by up to an eighth of its size, with black at the border."""
    pad = x.shape[-1] // 8
    rows, columns = (torch.from_numpy(rng.integers(0, 2 * pad + 1, len(x))) for _ in range(2))
    moved = shifted(x, rows, columns, pad)
    flipped = torch.from_numpy(rng.random(len(x)) < 0.5)[:, None, None, None]
    return torch.where(flipped, moved.flip(3), moved)


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


# --- training


def rates(arm: str, per_epoch: int, epochs: int) -> list[float]:
    """The share of the learning rate of every step; an extra epoch comes first."""
    extra = {
        "+ 1 epoch, constant": [1.0] * per_epoch,
        "+ 1 epoch, warmup": [(step + 1) / per_epoch for step in range(per_epoch)],
    }
    total = per_epoch * epochs
    return extra.get(arm, []) + [(1 + math.cos(math.pi * step / total)) / 2 for step in range(total)]


def train(model: nn.Module, name: str, arm: str, images: Images, lr: float, seed: int, args) -> dict:
    """Train and evaluate after every epoch; a loss that is not finite ends the run."""
    per_epoch = len(images.train[1]) // images.batch_size
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=1e-4), lr=lr, momentum=0.9)
    losses, accuracies = [], []
    plan = rates(arm, per_epoch, args.epochs)
    for step, (share, batch) in enumerate(zip(plan, images.forever(seed), strict=False), 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        loss = image_loss(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        if not NETWORKS[name].norm:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % per_epoch == 0:
            accuracies.append(round(images.accuracy(model), 2))
    first = len(plan) // per_epoch - args.epochs
    return {
        "first_epoch": accuracies[first] if len(accuracies) > first else 0.0,
        "best": max(accuracies, default=0.0),
        "accuracies": accuracies,
        "losses": [float(f"{mean(losses[i : i + per_epoch]):.4g}") for i in range(0, len(losses), per_epoch)],
        "finished": len(losses) == len(plan),
    }


# --- the ways to start


def scale_lr(name: str, args: argparse.Namespace) -> float:
    """That of the official runs; larger, but at most 0.1, where there are fewer steps: the way is as long."""
    return min(0.1, NETWORKS[name].scale_lr * PAPER_STEPS / args.init_steps)


def kaiming(model: nn.Module, name: str, images: Images, lr: float, seed: int, args) -> dict:
    """Leave the net as it is."""
    return {}


def metainit(model: nn.Module, name: str, images: Images, lr: float, seed: int, args) -> dict:
    """MetaInit on random images and labels."""
    size = (images.batch_size, *images.train[0].shape[1:])
    batches = (images._to(*batch) for batch in random_batches(size, 10))
    steps = args.metainit_steps
    report = metainit_(model, batches, scale_lr=args.metainit_lr, num_steps=steps, loss_fn=image_loss)
    quotients = [float(f"{report.history[i]['gradient_quotient']:.4g}") for i in (0, -1)]
    return {"scales": rounded(report.scales), "gradient_quotient": quotients}


def gradinit(model: nn.Module, name: str, images: Images, lr: float, seed: int, args) -> dict:
    """GradInit for SGD with steps of length eta = lr, gamma = 0.1 / eta."""
    options = {"eta": lr, "algorithm": "sgd_normalized", "scale_lr": scale_lr(name, args), "max_scale": 100.0}
    source = images.forever(seed + 1000)
    report = gradinit_(model, source, num_steps=args.init_steps, loss_fn=image_loss, **options)
    return described(report)


def varied(overlap: str = "half", gamma: float = 1.0, speed: float = 1.0) -> Callable:
    """GradInit with another overlap of the two batches, or gamma or the learning rate of the scales times a factor."""
    trial_batches = {"none": lambda a, b: [b], "half": half_overlap, "full": lambda a, b: [a]}[overlap]

    def start(model: nn.Module, name: str, images: Images, lr: float, seed: int, args) -> dict:
        options = {"eta": lr, "gamma": 0.1 / lr * gamma, "scale_lr": scale_lr(name, args) * speed, "max_scale": 100.0}
        init = GradInit(model, algorithm="sgd_normalized", loss_fn=image_loss, **options)
        source = images.forever(seed + 1000)
        batch = next(source)
        for _ in range(args.init_steps):
            fresh = next(source)
            init.step(batch, trial_batches(batch, fresh))
            batch = fresh
        return described(init.fold_())

    return start


def trained_scales(optimizer: Callable) -> Callable:
    """Train the scales on the loss, as if they were weights, for as many steps as GradInit takes."""

    def start(model: nn.Module, name: str, images: Images, lr: float, seed: int, args) -> dict:
        weights = {n: p.detach() for n, p in model.named_parameters() if p.detach().any()}
        scales = {n: torch.ones((), device=p.device, requires_grad=True) for n, p in weights.items()}
        made = optimizer(list(scales.values()), lr if optimizer is torch.optim.SGD else scale_lr(name, args))
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        for _, (x, y) in zip(range(args.init_steps), images.forever(seed + 1000), strict=False):
            theta = {n: w * scales[n] for n, w in weights.items()}
            F.cross_entropy(functional_call(model, theta | buffers, (x,)), y).backward()
            nn.utils.clip_grad_value_(scales.values(), 1.0)
            made.step()
            made.zero_grad()
            for scale in scales.values():
                scale.data.clamp_(min=0.01)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.mul_(scales.get(n, 1.0))
        return {"scales": rounded({n: s.item() for n, s in scales.items()})}

    return start


def rounded(scales: dict[str, float]) -> dict[str, float]:
    """Four digits are enough."""
    return {name: float(f"{scale:.4g}") for name, scale in scales.items()}


def described(report) -> dict:
    """What is worth keeping of a report of GradInit."""
    norms = [float(f"{report.history[i]['grad_norm']:.4g}") for i in (0, -1)]
    return {"scales": rounded(report.scales), "constrained_steps": report.constrained_steps, "grad_norm": norms}


STARTS = {
    "Kaiming": kaiming,
    "+ 1 epoch, constant": kaiming,
    "+ 1 epoch, warmup": kaiming,
    "MetaInit": metainit,
    "GradInit": gradinit,
}
ABLATIONS = {
    "GradInit, no overlap": varied("none"),
    "GradInit, full overlap": varied("full"),
    "GradInit, gamma x 0.1": varied(gamma=0.1),
    "GradInit, gamma x 10": varied(gamma=10.0),
    "GradInit, scale lr x 0.1": varied(speed=0.1),
    "scales trained by SGD": trained_scales(torch.optim.SGD),
    "scales trained by Adam": trained_scales(torch.optim.Adam),
}
# Where GradInit is so short that the gradient norm does not reach gamma at the learning rate of the official run.
FASTER = {("ResNet-110 BN", "GradInit, scale lr x 5"): varied(speed=5.0)}


# --- variance


def relative_variance(model: nn.Module, images: Images) -> dict[str, float]:
    """E ||g - E g||^2 / ||E g||^2 over batches, for every weight with two or more dimensions, by name."""
    model = deepcopy(model)  # its running statistics move
    weights = {n: p for n, p in model.named_parameters() if p.ndim >= 2}
    total, squares = {n: torch.zeros_like(p) for n, p in weights.items()}, dict.fromkeys(weights, 0.0)
    for _, batch in zip(range(VARIANCE_BATCHES), images.forever(77), strict=False):
        for (n, _), g in zip(
            weights.items(), torch.autograd.grad(image_loss(model, batch), weights.values()), strict=True
        ):
            total[n] += g / VARIANCE_BATCHES
            squares[n] += g.double().square().sum().item() / VARIANCE_BATCHES
    means = {n: total[n].double().square().sum().item() for n in weights}
    return {n: float(f"{max(squares[n] - means[n], 0) / max(means[n], 1e-300):.4g}") for n in weights}


# --- all runs


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet: seed by seed the table, then the ablations."""
    left_out = ("image_file", "output", "figures", "device", "networks", "ablated", "faster")
    results = read_json(args.output) or {"runs": {}}
    results["settings"] = {name: value for name, value in vars(args).items() if name not in left_out}
    sizes = {"vgg": 32, "resnet": args.resnet_image_size}
    data = {family: Images(args, size) for family, size in sizes.items()}
    plan = [(n, arm, seed) for seed in range(args.seeds) for n in args.networks for arm in STARTS]
    plan += [(args.ablated, arm, seed) for seed in range(args.seeds) for arm in ABLATIONS if args.ablated]
    plan += [(*pair, seed) for seed in range(args.seeds) for pair in FASTER if args.faster]
    for name, arm, seed in plan:
        for lr in args.learning_rates:
            key = f"{name} | {arm} | lr={lr:g} | seed={seed}"
            images = data[NETWORKS[name].family]
            once(args.output, results, key, partial(run, name, arm, images, lr, seed, args))
    return results


def run(name: str, arm: str, images: Images, lr: float, seed: int, args: argparse.Namespace) -> dict:
    """One way to start and the training after it."""
    model = build(name, seed, args)
    start = time.perf_counter()
    begin = FASTER.get((name, arm)) or (STARTS | ABLATIONS)[arm]
    found = begin(model, name, images, lr, seed, args)
    initialised = time.perf_counter()
    if arm in ("Kaiming", "GradInit") and seed == 0:
        found["relative_variance"] = relative_variance(model, images)
    trained = time.perf_counter()
    figures = train(model, name, arm, images, lr, seed, args)
    seconds = [round(initialised - start, 1), round(time.perf_counter() - trained, 1)]
    return figures | {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())} | found


def averages(results: dict) -> dict[str, list[float]]:
    """Mean over the seeds of first-epoch and best accuracy, by what else a run is named."""
    groups: dict[str, list[dict]] = {}
    for key, figures in results["runs"].items():
        groups.setdefault(key.rpartition(" | ")[0], []).append(figures)
    return {
        key: [round(mean(run[figure] for run in runs), 1) for figure in ("first_epoch", "best")]
        for key, runs in groups.items()
    }


def table(results: dict) -> list[list[str]]:
    """One row for each initialisation, one column for each net: accuracy after the first epoch, and the best."""
    cells = {}
    for key, (first, best) in results["table"].items():
        net, arm, rate = key.split(" | ")
        cells.setdefault(arm, {}).setdefault(net, []).append((best, f"{first:.1f} / {best:.1f} ({rate[3:]})"))
    nets = list(cells["Kaiming"])
    rows = [["first-epoch / best test accuracy, % (lr)", *nets]]
    return [*rows, *([arm, *(max(row.get(net, [(0, "")]))[1] for net in nets)] for arm, row in cells.items())]


# --- figures


def panels(results: dict, figure_of: str) -> dict[str, dict[str, dict]]:
    """By net: the runs of seed 0 at the first learning rate that hold a figure, by arm."""
    tail = f" | lr={results['settings']['learning_rates'][0]:g} | seed=0"
    found: dict[str, dict[str, dict]] = {}
    for key, figures in results["runs"].items():
        name, arm = key.split(" | ")[:2]
        if key.endswith(tail) and figure_of in figures and arm in STARTS:
            found.setdefault(name, {})[arm] = figures[figure_of]
    return found


@light_and_dark
def draw_variance(results: dict) -> Picture:
    """Relative variance of the gradient by layer, before and after GradInit."""
    by_net = panels(results, "relative_variance")
    figure = Picture(figsize=(11, 7))
    for axes, (name, arms) in zip(figure.subplots(2, 2).flatten(), by_net.items(), strict=False):
        for arm, values in arms.items():
            axes.semilogy(list(values.values()), ".-", label=arm, linewidth=0.8)
        axes.set(title=name, xlabel="weight, from the input to the output", ylabel="gradient variance / mean squared")
        label_lines(axes)
    return figure


@light_and_dark
def draw_scales(results: dict) -> Picture:
    """The factors that GradInit found: convolutions, BatchNorm weights by their place, the head."""
    by_net = panels(results, "scales")
    figure = Picture(figsize=(11, 7))
    for axes, (name, arms) in zip(figure.subplots(2, 2).flatten(), by_net.items(), strict=False):
        scales = list(arms.get("GradInit", {}).items())
        for label, belongs in KINDS.items():
            places = [i for i, (tensor, _) in enumerate(scales) if belongs(tensor, i == len(scales) - 1)]
            if places:
                axes.semilogy(places, [scales[i][1] for i in places], ".", label=label)
        axes.axhline(1, color=ink(), linewidth=0.5)
        axes.set(title=name, xlabel="tensor, from the input to the output", ylabel="scale found by GradInit")
        label_lines(axes)
    return figure


# Of a tensor's name and whether it is the last one: layer 0 of a `convolution` is the filter, layer 1 the BatchNorm.
KINDS = {
    "convolution": lambda tensor, last: tensor.endswith(".0.weight") and not last,
    "last BatchNorm of a block": lambda tensor, last: tensor.endswith("second.1.weight"),
    "other BatchNorm": lambda tensor, last: tensor.endswith(".1.weight") and "second" not in tensor,
    "linear layer": lambda tensor, last: last,
}


DRAWINGS = {"gradinit_variance": draw_variance, "gradinit_scales": draw_scales}


def main() -> None:
    """Run the comparison, write the result file and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_file", required=True, help=HELP)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ablated", choices=["", *NETWORKS], default="VGG-19 BN", help="net of the ablations")
    parser.add_argument("--faster", action="store_true", help="ResNet-110 BN also with 5 times the lr of the scales")
    parser.add_argument("--vgg_divisor", type=int, default=1, help="divides the width of VGG-19")
    parser.add_argument("--resnet_divisor", type=int, default=1, help="divides the width of ResNet-110")
    parser.add_argument("--resnet_image_size", type=int, default=32)
    parser.add_argument("--shallow", action="store_true", help="one convolution or block a stage: for tests")
    parser.add_argument("--train_images", type=int, default=0, help="0: all")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--init_steps", type=int, default=PAPER_STEPS, help="of GradInit")
    parser.add_argument("--metainit_steps", type=int, default=500)
    parser.add_argument("--metainit_lr", type=float, default=0.1, help="by which a norm changes in the first step")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[0.1], help="each has its own rows")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "gradinit_images.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = run_all(args)
    results["table"] = averages(results)
    write_json(args.output, results)
    draw_variance(results, args.figures / "gradinit_variance.png")
    draw_scales(results, args.figures / "gradinit_scales.png")
    for key, (first, best) in results["table"].items():
        print(f"{key:50s} first epoch {first:5.1f}, best {best:5.1f}")
