"""128 layers from the first step: ReZero without norm or warmup, against post-norm and pre-norm of the same shape.

    python scripts/reproduce/run.py deep_without_warmup --train_file enwik8_prefix.xz

Every arm takes the same batches at a constant learning rate with no warmup, over a grid of learning rates, then again
with more seeds at its best one. Results are written after every run and a repeated call goes on where it stopped.
The claim is Bachlechner et al. 2020, sections 1 and 5: deep post-norm Transformers do not train, ReZero does at once.
"""

import argparse
import re
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from common.drawing import GRAY, light_and_dark
from common.first_steps import add_arguments, batches, byte_model, train, unigram_bpb
from common.record import FIGURES, RESULTS, once, read_json, write_json
from common.rules import PLAIN
from hf_rezero import load_corpus
from hf_rezero.data.corpora import Corpus
from hf_rezero.picture import HEIGHT, WIDTH, Picture, label_lines, plot_seeds


ARMS = {
    "ReZero": {},
    "post-norm": {"norm_position": "post", **PLAIN},
    "pre-norm": {"norm_position": "pre", **PLAIN},
}


def run_all(args: argparse.Namespace, corpus: Corpus) -> dict:
    """Run what the result file does not hold yet: the grid of each arm, then the other seeds at its best rate."""
    kept = {
        name: value for name, value in vars(args).items() if name not in ("output", "figure", "train_file", "arms")
    }
    results = read_json(args.output) or {"settings": kept | {"corpus": Path(corpus.name).name}, "runs": {}}
    results["unigram_bpb"] = unigram_bpb(corpus.train)

    def train_arm(arm: str, rate: float, seed: int) -> dict:
        return train(byte_model(ARMS[arm], seed, args), batches(corpus.train, seed, args.steps, args), rate)

    def run(arm: str, rate: float, seed: int) -> float:
        key = f"{arm} lr={rate:g} seed={seed}"
        return once(args.output, results, key, lambda: train_arm(arm, rate, seed))["final"]

    for arm in args.arms:
        best = min(args.learning_rates, key=lambda rate: run(arm, rate, 0))
        finals = [run(arm, best, seed) for seed in range(args.seeds)]
        results.setdefault("best", {})[arm] = {"learning_rate": best, "final_by_seed": finals, "mean": mean(finals)}
        write_json(args.output, results)
    return results


@light_and_dark
def draw(results: dict) -> Picture:
    """Smoothed curves of the best learning rate of each arm, mean and band of its seeds."""
    figure = Picture(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    for color, (arm, best) in enumerate(results["best"].items()):
        keys = [f"{arm} lr={best['learning_rate']:g} seed={seed}" for seed in range(len(best["final_by_seed"]))]
        curves = [np.convolve(results["runs"][key]["curve"], np.ones(10) / 10, mode="valid") for key in keys]
        label = f"{arm}, lr {best['learning_rate']:g}"
        plot_seeds(axes, np.arange(len(curves[0])) + 10, curves, color=f"C{color}", label=label)
    axes.axhline(results["unigram_bpb"], color=GRAY, linestyle=":", label="unigram entropy")
    settings = results["settings"]
    axes.set(xlabel="optimiser step, no warmup", ylabel="training bits per byte (10-step mean)", ylim=(3, 7))
    axes.set_title(f"{settings['layers']} layers x {settings['hidden_size']}, each at its best learning rate")
    label_lines(axes)
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each arm, with all learning rates that were tried."""
    rows = [["128 layers x 64", "best lr", "bpb at the best lr, mean of the seeds", "bpb by lr, seed 0"]]
    for arm, best in results["best"].items():
        grid = {key: run["final"] for key, run in results["runs"].items() if re.match(rf"{arm} lr=.* seed=0$", key)}
        by_rate = ", ".join(f"{key.split('lr=')[1].split()[0]}: {final:.2f}" for key, final in grid.items())
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.2f}", by_rate])
    return [*rows, ["unigram entropy of the corpus", "", f"{results['unigram_bpb']:.2f}", ""]]


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, layers=128, block_size=128, steps=120, seeds=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ReZero", "post-norm"])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--threads", type=int, default=1, help="more is slower for layers this narrow")
    parser.add_argument("--output", type=Path, default=RESULTS / "deep_without_warmup.json")
    parser.add_argument("--figure", type=Path, default=FIGURES / "deep_without_warmup.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = run_all(args, load_corpus(args.train_file))
    draw(results, args.figure)
    for arm, best in results["best"].items():
        print(f"{arm:10s} lr {best['learning_rate']:g}: {best['mean']:.3f} bits per byte, mean of {args.seeds} seeds")
