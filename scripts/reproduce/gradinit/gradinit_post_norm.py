"""A deep post-norm Transformer from the first step: default initialisation, warmup, GradInit, and nets that need neither.

    python scripts/reproduce/run.py gradinit_post_norm --train_file enwik8_prefix.xz

Every arm takes the same batches at a constant learning rate, over a grid of learning rates, then again with more seeds
at its best one; the arms with warmup rise linearly over the first share of the steps. Post-norm starts in two ways: from
this library's weights, N(0, 1 / sqrt(fan_in)), and from N(0, 0.02) in every layer. GradInit runs for Adam with eta = the
learning rate to come, on batches of its own; its steps are not counted among those of the training. gamma is 1 / eta,
as in the official run of a Transformer, or 0.1 / eta, the paper's rule. Results are written after every run and a
repeated call goes on where it stopped.
The claim is Zhu et al. 2021: post-norm Transformers train without warmup after GradInit.
"""

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from common import first_steps
from common.drawing import GRAY, light_and_dark
from common.first_steps import add_arguments, batches, byte_model, unigram_bpb
from common.record import FIGURES, RESULTS, once, read_json, write_json
from common.rules import PLAIN
from hf_rezero import ReZeroForCausalLM, gradinit_, load_corpus
from hf_rezero.data.corpora import Corpus
from hf_rezero.picture import Picture, plot_seeds


POST = {"norm_position": "post", **PLAIN}
PRE = {"norm_position": "pre", **PLAIN}


@dataclass(frozen=True)
class Arm:
    """What differs from the other arms, and the look of its curves."""

    config: dict
    color: str
    style: str = "-"
    std: float | None = None  # of the weights of all layers, by default 1 / sqrt(fan_in)
    eta_gamma: float | None = None  # None: no GradInit
    warmup: bool = False


ARMS = {
    "post-norm": Arm(POST, "C0"),
    "post-norm, warmup": Arm(POST, "C0", "--", warmup=True),
    "post-norm, GradInit": Arm(POST, "C0", ":", eta_gamma=1.0),
    "post-norm 0.02": Arm(POST, "C1", std=0.02),
    "post-norm 0.02, warmup": Arm(POST, "C1", "--", std=0.02, warmup=True),
    "post-norm 0.02, GradInit": Arm(POST, "C1", ":", std=0.02, eta_gamma=1.0),
    "post-norm 0.02, GradInit, eta gamma 0.1": Arm(POST, "C1", "-.", std=0.02, eta_gamma=0.1),
    "pre-norm": Arm(PRE, "C2"),
    "pre-norm, GradInit": Arm(PRE, "C2", ":", eta_gamma=1.0),
    "ReZero": Arm({}, "C3"),
    "ReZero, GradInit": Arm({}, "C3", ":", eta_gamma=1.0),
}


def build(arm: Arm, seed: int, args: argparse.Namespace) -> ReZeroForCausalLM:
    """A model before its training."""
    model = byte_model(arm.config, seed, args)
    if arm.std:
        for name, weight in model.named_parameters():
            if "layers." in name and weight.ndim == 2:
                torch.nn.init.normal_(weight, std=arm.std)
    return model


def initialise(model: ReZeroForCausalLM, eta: float, gamma: float, source: list, args: argparse.Namespace) -> dict:
    """Run GradInit and return what is worth keeping of its report."""
    options = {"eta": eta, "gamma": gamma, "scale_lr": args.scale_lr, "max_scale": 100.0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "frozen parameters")  # the residual weights of 1
        report = gradinit_(model, source, num_steps=args.init_steps, **options)
    first, last = report.history[0], report.history[-1]
    return {
        "scales": {name: round(scale, 4) for name, scale in report.scales.items()},
        "constrained_steps": report.constrained_steps,
        "grad_norm": [round(first["grad_norm"], 2), round(last["grad_norm"], 2)],
        "init_seconds": round(report.seconds, 1),
    }


def train(arm: Arm, rate: float, seed: int, text: np.ndarray, args: argparse.Namespace) -> dict:
    """Initialise and train one model; the curve is the training loss of every step in bits per byte."""
    model, start = build(arm, seed, args), time.perf_counter()
    found = {}
    if arm.eta_gamma:
        source = batches(text, seed + 1000, args.init_steps + 1, args)
        found = initialise(model, rate, arm.eta_gamma / rate, source, args)
    warmup = int(args.warmup_share * args.steps) if arm.warmup else 1
    losses = first_steps.train(model, batches(text, seed, args.steps, args), rate, warmup)
    return losses | {"seconds": round(time.perf_counter() - start, 1), **found}


def run_all(args: argparse.Namespace, corpus: Corpus) -> dict:
    """Run what the result file does not hold yet: the grid of each arm, then its other seeds."""
    kept = ("layers", "hidden_size", "block_size", "batch_size", "steps", "init_steps", "scale_lr", "warmup_share")
    results = read_json(args.output) or {"runs": {}, "best": {}}
    results["settings"] = {"corpus": Path(corpus.name).name} | {name: getattr(args, name) for name in kept}
    results["unigram_bpb"] = unigram_bpb(corpus.train)

    def run(arm: str, learning_rate: float, seed: int) -> float:
        key = f"{arm} | lr={learning_rate:g} | seed={seed}"
        run = once(args.output, results, key, lambda: train(ARMS[arm], learning_rate, seed, corpus.train, args))
        return run["final"]

    # All arms with one seed first: an interrupted run has something to show.
    grids = {arm: {rate: run(arm, rate, 0) for rate in args.learning_rates} for arm in args.arms}
    for seeds in range(1, args.seeds + 1):
        for arm, grid in grids.items():
            rate = min(grid, key=grid.__getitem__)
            finals = [run(arm, rate, seed) for seed in range(seeds)]
            results["best"][arm] = {"learning_rate": rate, "final_by_seed": finals, "mean": mean(finals)}
            write_json(args.output, results)
    return results


@light_and_dark
def draw(results: dict) -> Picture:
    """Smoothed curves at the best learning rate of each arm, and the final loss over the grid."""
    figure = Picture(figsize=(12, 4.4))
    curves, grid = figure.subplots(1, 2)
    for arm, best in results["best"].items():
        look = {"color": ARMS[arm].color, "linestyle": ARMS[arm].style, "linewidth": 1.2}
        keys = [f"{arm} | lr={best['learning_rate']:g} | seed={seed}" for seed in range(len(best["final_by_seed"]))]
        runs = [results["runs"][key]["curve"] for key in keys]
        window = min(10, *map(len, runs))
        smooth = [np.convolve(curve, np.ones(window) / window, mode="valid") for curve in runs]
        label = f"{arm}, lr {best['learning_rate']:g}"
        plot_seeds(curves, np.arange(min(map(len, smooth))) + window, smooth, shade=0.1, label=label, **look)
        keys = [key.split(" | ") for key in results["runs"] if key.endswith("seed=0")]
        rates = sorted(float(rate[3:]) for name, rate, _ in keys if name == arm)
        finals = [results["runs"][f"{arm} | lr={rate:g} | seed=0"]["final"] for rate in rates]
        grid.semilogx(rates, finals, marker="o", markersize=4, label=arm, **look)
    for axes in (curves, grid):
        axes.axhline(results["unigram_bpb"], color=GRAY, linestyle=":", label="unigram entropy")
        axes.set(ylabel="training bits per byte", ylim=(3.8, 6))
    curves.set(xlabel="optimiser step", title="each at its best learning rate, band of the seeds")
    grid.set(xlabel="learning rate", title="last tenth of the steps, seed 0")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each arm at its best rate."""
    rows = [["12 layers x 64, no warmup unless named", "best lr", "bpb, mean of the seeds", "by seed"]]
    for arm, best in results["best"].items():
        by_seed = ", ".join(f"{final:.2f}" for final in best["final_by_seed"])
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.2f}", by_seed])
    return [*rows, ["unigram entropy of the corpus", "", f"{results['unigram_bpb']:.2f}", ""]]


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, layers=12, block_size=64, steps=200, seeds=3)
    parser.add_argument("--init_steps", type=int, default=60, help="iterations of GradInit")
    parser.add_argument("--scale_lr", type=float, default=0.03, help="learning rate of its scales")
    parser.add_argument("--warmup_share", type=float, default=0.25, help="of the steps, in the arm with warmup")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--output", type=Path, default=RESULTS / "gradinit_post_norm.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = run_all(args, load_corpus(args.train_file))
    draw(results, args.figures / "gradinit_post_norm.png")
    for arm, best in results["best"].items():
        print(f"{arm:40s} lr {best['learning_rate']:<6g} {best['mean']:.3f} of {best['final_by_seed']}")
