"""Growing a byte model from 6 to 12 to 24 layers, against 24 layers from scratch with as much computation.

    python scripts/reproduce/run.py growing --train_file enwik8_prefix.xz

Computation is counted in layer passes, steps times layers, and is the same for all arms: a grown model spends a quarter of
it at 6 layers, a quarter at 12 and a half at 24. Each arm takes the best learning rate of a grid on seed 0. The claim is the
remark of Bachlechner et al. 2020, section 3, that layers can be added to a trained net because a new one is the identity.
"""

import argparse
from pathlib import Path

import numpy as np

from common.byte_lm import add_arguments, run_grid, train
from common.curves import byte_models
from common.drawing import light_and_dark
from common.record import FIGURES, RESULTS
from hf_rezero.picture import HEIGHT, WIDTH, Picture, label_lines, plot_seeds


def stages(passes: int, depth: int) -> dict[str, list[tuple[int, int]]]:
    """Layers and steps of each arm."""
    third, half = depth // 4, depth // 2
    return {
        f"{depth} from scratch": [(depth, passes // depth)],
        f"{third} to {half} to {depth}": [
            (third, passes // 4 // third),
            (half, passes // 4 // half),
            (depth, passes // 2 // depth),
        ],
        f"{half} to {depth}": [(half, passes // 2 // half), (depth, passes // 2 // depth)],
        f"{third} from scratch": [(third, passes // third)],
    }


@light_and_dark
def draw(results: dict) -> Picture:
    """Training loss by layer passes, mean and band of the seeds."""
    figure = Picture(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    for color, (arm, best) in enumerate(results["best"].items()):
        keys = [f"{arm} | lr={best['learning_rate']:g} | seed={seed}" for seed in range(len(best["test"]))]
        runs = [np.array(results["runs"][key]["curve"]) for key in keys]
        smooth = [np.convolve(run[:, 2], np.ones(5) / 5, mode="valid") for run in runs]
        plot_seeds(axes, runs[0][4:, 0], smooth, color=f"C{color}", label=f"{arm}: test {best['mean']:.3f}")
    axes.set(xlabel="layer passes", ylabel="training bits per byte, mean of 50 steps", ylim=(None, 5))
    label_lines(axes)
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each way to spend the same layer passes."""
    return byte_models(results, "layers")


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, depth=24, passes=14_400)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[2e-3, 5e-3, 1e-2])
    parser.add_argument("--output", type=Path, default=RESULTS / "growing.json")
    parser.add_argument("--figure", type=Path, default=FIGURES / "growing.png")
    args = parser.parse_args()
    arms = {
        arm: lambda rate, seed, parts=parts: train({}, parts, rate, seed, args)
        for arm, parts in stages(args.passes, args.depth).items()
    }
    results = run_grid(arms, args.learning_rates, args)
    draw(results, args.figure)
    for arm, best in results["best"].items():
        print(f"{arm:20s} {best}")
