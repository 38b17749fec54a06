"""One-cycle training of ResNet-20: with ReZero at a constant or a scheduled rate of the residual weights, and without.

    python scripts/reproduce/run.py superconvergence --image_file cifar10_subset.npz

The schedule is that of the authors' superconvergence run in shares of the training: the learning rate rises from 0.027 to 1
times its maximum in the first tenth, falls to 0.027 in the next eight, and to 0.001 in the last; the momentum moves from
0.95 to 0.85 and back. "steps" is the usual division by 10 after a half and three quarters. Pictures, net, weight decay
and batches are those of `resnets`; each arm takes the best maximum of a grid on seed 0. The claim, from the same code:
one cycle is faster with residual weights that keep a rate of their own. Results are written after every run, and a repeated
call goes on where it stopped.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import torch

from common.images import BATCH, HELP, accuracy, augment, final_error, standardized
from common.record import RESULTS, once, read_json, write_json
from common.rules import PLAIN_RESNET
from hf_rezero import ReZeroResNetConfig, ReZeroResNetForImageClassification, param_groups
from hf_rezero.optim.schedules import PiecewiseLinear, keep_constant


CYCLE = [(0, 0.027), (0.1, 1), (0.9, 0.027), (1, 0.001)]
STEPS = [(0, 1), (0.5, 1), (0.5001, 0.1), (0.75, 0.1), (0.7501, 0.01)]
MOMENTUM = [(0, 0.95), (0.1, 0.85), (0.9, 0.95)]
# config, points of the learning rate, constant rate of the residual weights
ARMS: dict[str, tuple[dict, list, float | None]] = {
    "one cycle, ReZero, constant rate 0.1 of resweights": ({}, CYCLE, 0.1),
    "one cycle, ReZero, resweights scheduled": ({}, CYCLE, None),
    "one cycle, plain": (PLAIN_RESNET, CYCLE, None),
    "steps, ReZero": ({}, STEPS, None),
}


def train(arm: str, rate: float, seed: int, data: dict[str, torch.Tensor], epochs: int) -> dict:
    """The test accuracy of every epoch."""
    torch.manual_seed(seed)
    config, points, constant = ARMS[arm]
    model = ReZeroResNetForImageClassification(ReZeroResNetConfig(num_labels=10, **config))
    model.to(memory_format=torch.channels_last)
    groups = param_groups(model, weight_decay=5e-4, resweight_learning_rate=constant)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    steps = epochs * (len(data["train_y"]) // BATCH)
    scheduler = PiecewiseLinear(optimizer, steps, points, momentum=MOMENTUM if points is CYCLE else None)
    if constant is not None:
        keep_constant(scheduler, [len(groups) - 1])
    generator, start, curve = torch.Generator().manual_seed(seed), time.perf_counter(), []
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(data["train_y"]), generator=generator)
        for rows in order[: steps // epochs * BATCH].split(BATCH):
            x = augment(data["train_x"][rows], generator).contiguous(memory_format=torch.channels_last)
            model(x, labels=data["train_y"][rows].long()).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        curve.append(round(accuracy(model, data), 2))
    return {"accuracy": curve, "seconds": round(time.perf_counter() - start)}


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet: the grid on seed 0, then the best maximum on the other seeds."""
    data, results = standardized(args.image_file, args.pictures), read_json(args.output) or {"runs": {}, "best": {}}

    def run(arm: str, rate: float, seed: int) -> dict:
        key = f"{arm} | lr={rate:g} | seed={seed}"
        return once(args.output, results, key, lambda: train(arm, rate, seed, data, args.epochs))

    for arm in args.arms:
        best = min(args.rates, key=lambda rate: final_error(run(arm, rate, 0)["accuracy"]))
        errors = [round(final_error(run(arm, best, seed)["accuracy"]), 2) for seed in range(args.seeds)]
        results["best"][arm] = {"learning_rate": best, "error": errors, "mean": round(mean(errors), 2)}
        write_json(args.output, results)
    return results


def table(results: dict) -> list[list[str]]:
    """One row for each schedule and rule."""
    rows = [["ResNet-20, 6 epochs", "best maximal lr", "test error, %", "by maximal lr"]]
    for arm, best in results["best"].items():
        grid = {
            key.split("lr=")[1].split(" ")[0]: run
            for key, run in results["runs"].items()
            if key.startswith(f"{arm} | ")
        }
        by_rate = ", ".join(
            f"{rate}: {100 - mean(grid[rate]['accuracy'][-2:]):.1f}" for rate in sorted(grid, key=float)
        )
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.1f}", by_rate])
    return rows


def main() -> None:
    """Run the comparison and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_file", required=True, help=HELP)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pictures", type=int, help="at most so many of each part")
    parser.add_argument("--output", type=Path, default=RESULTS / "superconvergence.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for arm, best in run_all(args)["best"].items():
        print(f"{arm:52s} {best}")
