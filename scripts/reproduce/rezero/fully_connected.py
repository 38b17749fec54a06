"""Fully connected nets on pictures: four residual rules at 32 layers, and ReZero at 10,000.

    python scripts/reproduce/run.py fully_connected --image_file cifar10_subset.npz

- rules: 32 layers x 256, the paper's Figure 3: a deep net, residual, layer norm and ReZero, Adagrad, batches of 100, each at
  the learning rate of a grid with the lowest training loss of the last epoch on seed 0, then with more seeds
- depth: 100, 1,000 and 10,000 layers x 150 with ReZero, Adagrad at 0.003 and at most 3 / layers for the residual weights;
  the other rules at 10,000 layers for a few steps. Gradient checkpointing from 1,000 layers on.

The claims are Bachlechner et al. 2020, section 4: ReZero fits 7 to 15 times faster than the others, a residual net without
norm is slower than a plain one, 10,000 layers train. Results are written after every run, and a repeated call goes on where
it stopped.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from common.drawing import GRAY, light_and_dark
from common.images import NAMES, read_images
from common.record import FIGURES, RESULTS, once, read_json, write_json
from common.rules import PLAIN
from hf_rezero import ReZeroMLPConfig, ReZeroMLPForImageClassification
from hf_rezero.picture import HEIGHT, WIDTH, Picture, label_lines, plot_seeds


# the residual net has the smaller weights of the official code
RULES = {
    "ReZero": {},
    "deep net": {"skip_connection": False, **PLAIN},
    "layer norm": {"skip_connection": False, "norm_position": "post", **PLAIN},
    "residual": {"initializer_variance": 0.25, **PLAIN},
}
BATCH, STRIDE = 100, 10


def train(rule: str, shape: dict, rates: tuple[float, float], seed: int, data: tuple[Tensor, Tensor], steps: int):
    """The training loss, a mean for every `STRIDE` steps; stops where the loss is not finite."""
    torch.manual_seed(seed)
    model = ReZeroMLPForImageClassification(ReZeroMLPConfig(num_labels=10, **shape, **RULES[rule])).train()
    if shape["num_hidden_layers"] >= 1000:
        model.gradient_checkpointing_enable()
    named = [(name.endswith("resweight"), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for is_gate, p in named if is_gate == k], "lr": rates[k]} for k in (False, True)]
    optimizer = torch.optim.Adagrad([group for group in groups if group["params"]])
    losses, seconds = [], []
    for rows in batches(len(data[1]), steps, seed):
        start = time.perf_counter()
        loss = model(data[0][rows], labels=data[1][rows]).loss
        if not math.isfinite(loss.item()):
            break
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # at 10,000 layers a second set of gradients would be a gigabyte
        seconds.append(time.perf_counter() - start)
    curve = [round(mean(losses[i : i + STRIDE]), 4) for i in range(0, len(losses), STRIDE)]
    return {"loss": curve, "steps": len(losses), "seconds": round(sum(seconds), 1)}


def batches(count: int, steps: int, seed: int):
    """Row numbers, in a new order for each pass."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(steps * BATCH / count))])
    return rows[: steps * BATCH].split(BATCH)


def final(run: dict, steps: int) -> float:
    """Mean loss of the last tenth of the steps; infinite for a run that broke off."""
    return mean(run["loss"][-max(1, len(run["loss"]) // 10) :]) if run["steps"] == steps else math.inf


def times_faster(results: dict, rule: str, steps: int, seeds: int) -> list[float]:
    """Steps of another rule over those in which ReZero reaches the loss where the other one ends, by seed."""
    ratios = []
    for seed in range(seeds):
        curves = [results["runs"][key_of(results, r, seed)]["loss"] for r in ("ReZero", rule)]
        goal = mean(curves[1][-max(1, len(curves[1]) // 10) :])
        smooth = np.convolve(curves[0], np.ones(4) / 4, mode="valid")
        reached = np.nonzero(smooth <= goal)[0]
        ratios.append(round(steps / ((reached[0] + 4) * STRIDE), 2) if len(reached) else 0.0)
    return ratios


def key_of(results: dict, rule: str, seed: int) -> str:
    """The run of a rule at its best learning rate."""
    return f"32 | {rule} | lr={results['best'][rule]['learning_rate']:g} | seed={seed}"


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet."""
    x, y = (values[: args.pictures] for values in read_images(args.image_file, NAMES[:2]).values())
    data = x.permute(0, 3, 1, 2) / 127.5 - 1, y.long()
    results = read_json(args.output) or {"runs": {}, "best": {}}
    results["settings"] = {"pictures": len(y), "steps": args.steps, "deep_steps": args.deep_steps}

    def run(rule: str, layers: int, width: int, rates: tuple[float, float], seed: int, steps: int) -> dict:
        key = f"{layers} | {rule} | lr={rates[0]:g} | seed={seed}"
        shape = {"num_hidden_layers": layers, "hidden_size": width}
        return once(args.output, results, key, lambda: train(rule, shape, rates, seed, data, steps))

    for rule in RULES if "rules" in args.parts else ():
        best = min(args.rates, key=lambda rate: final(run(rule, 32, 256, (rate, rate), 0, args.steps), args.steps))
        runs = [run(rule, 32, 256, (best, best), seed, args.steps) for seed in range(args.seeds)]
        finals = [round(final(r, args.steps), 4) for r in runs]
        results["best"][rule] = {"learning_rate": best, "loss": finals}
    for rule in results["best"]:
        results["best"][rule]["times_faster"] = times_faster(results, rule, args.steps, args.seeds)
    for layers in args.depths if "depth" in args.parts else ():
        run("ReZero", layers, 150, (3e-3, min(3e-3, 3 / layers)), 0, args.deep_steps)
    for rule in ("deep net", "layer norm", "residual") if "depth" in args.parts else ():
        run(rule, args.depths[-1], 150, (3e-3, 0.0), 0, STRIDE)
    write_json(args.output, results)
    return results


@light_and_dark
def draw(results: dict) -> Picture:
    """Training loss by step: the rules at 32 layers, and ReZero by depth."""
    figure = Picture(figsize=(1.6 * WIDTH, HEIGHT))
    left, right = figure.subplots(1, 2)
    for color, (rule, best) in enumerate(results["best"].items()):
        curves = [results["runs"][key_of(results, rule, seed)]["loss"] for seed in range(len(best["loss"]))]
        label = f"{rule}, lr {best['learning_rate']:g}"
        plot_seeds(left, STRIDE * np.arange(1, len(curves[0]) + 1), curves, color=f"C{color}", label=label)
    left.set(title="32 layers x 256", ylim=(0, 2.6))
    for key, run in results["runs"].items():
        layers, rule = key.split(" | ")[:2]
        if layers != "32" and run["loss"]:
            style = "-" if rule == "ReZero" else "o"
            right.plot(STRIDE * np.arange(1, len(run["loss"]) + 1), run["loss"], style, label=f"{layers}, {rule}")
    right.set(title="x 150, by number of layers", ylim=(1.4, 3.2))
    for axes in (left, right):
        axes.axhline(math.log(10), color=GRAY, linestyle=":", label="guessing")
        axes.set(xlabel=f"step of {BATCH} pictures", ylabel="training loss, nats")
        label_lines(axes)
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each rule at 32 layers."""
    rows = [
        ["32 layers x 256", "best lr", "training loss at the end, by seed", "ReZero is there times faster, by seed"]
    ]
    for rule, best in results["best"].items():
        losses, ratios = (", ".join(f"{x:.{d}f}" for x in best[key]) for key, d in (("loss", 2), ("times_faster", 1)))
        rows.append([rule, f"{best['learning_rate']:g}", losses, "" if rule == "ReZero" else ratios])
    return rows


def depth_table(results: dict) -> list[list[str]]:
    """One row for each deep net."""
    rows = [["layers x 150", "steps with a finite loss", "loss, first steps", "loss, last steps"]]
    for key, run in results["runs"].items():
        layers, rule = key.split(" | ")[:2]
        if layers != "32":
            ends = [f"{loss:.4g}" for loss in (run["loss"][0], run["loss"][-1])] if run["loss"] else ["", ""]
            rows.append([f"{int(layers):,}, {rule}", f"{run['steps']}", *ends])
    return rows


TABLES = {"fully_connected": table, "fully_connected_depth": depth_table}


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_file", required=True, help=".npz with train_x, train_y (uint8, NHWC)")
    parser.add_argument("--parts", nargs="+", choices=("rules", "depth"), default=["rules", "depth"])
    parser.add_argument("--steps", type=int, default=800, help="of 32 layers")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depths", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--deep_steps", type=int, default=160)
    parser.add_argument("--pictures", type=int, help="at most so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "fully_connected.json")
    parser.add_argument("--figure", type=Path, default=FIGURES / "fully_connected.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = run_all(args)
    draw(results, args.figure)
    for rule, best in results["best"].items():
        print(rule, best)
