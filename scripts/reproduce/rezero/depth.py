"""Table 3 of the paper: byte models of 12, 64 and 128 layers at equal tokens, ReZero against pre-norm and post-norm.

    python scripts/reproduce/run.py depth --train_file enwik8_prefix.xz
    python scripts/reproduce/run.py depth --train_file enwik8.zip --hidden_size 256 --block_size 512 --batch_size 64 --steps 20000 \
        --bf16 --compile --checkpoint_steps 1000 --output enwik8_depth.json

The second line is the paper's model, for a GPU. Learning rates, seeds and losses are those of `convergence`
(Bachlechner et al. 2020, section 5).
"""

import argparse
from pathlib import Path

from common.byte_lm import add_arguments, run_grid, train
from common.curves import mean_steps_to, steps_to_losses
from common.drawing import light_and_dark, plot_arm
from common.record import FIGURES, RESULTS
from common.rules import ARMS, LADDER, START, config_of
from hf_rezero.picture import HEIGHT, Picture, label_lines


RULES = [
    "ReZero, w = 0",
    "pre-norm, x + cF(N(x)), + warmup",
    "pre-norm + warmup",
    "ReZero, w = 1/sqrt(2L)",
    "post-norm + warmup",
]


@light_and_dark
def draw(results: dict) -> Picture:
    """Training loss by step, a panel for each depth."""
    depths = sorted({int(arm.split()[0]) for arm in results["best"]})
    figure = Picture(figsize=(0.8 + 3.1 * len(depths), HEIGHT))
    panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for depth, axes in zip(depths, panels, strict=True):
        for color, rule in enumerate(RULES):
            arm = f"{depth} {rule}"
            if arm in results["best"]:
                plot_arm(axes, results, arm, color=f"C{color}", label=rule)
        axes.set(title=f"{depth} layers", xlabel="step", ylim=(None, 5.2))
    panels[0].set_ylabel("training bits per byte, mean of 50 steps")
    label_lines(panels[-1])
    named = {line.get_label() for line in panels[-1].lines}
    for line in panels[-2].lines:
        if line.get_label() not in named:  # it was not run at the last depth
            x, y = line.get_xydata()[-1]
            panels[-2].text(x, y - 0.05, line.get_label(), color=line.get_color(), size=8.5, ha="right", va="top")
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each depth and rule."""
    by_depth = dict(sorted(results["best"].items(), key=lambda item: int(item[0].split()[0])))
    return steps_to_losses(results | {"best": by_depth}, "layers x 64", (4.5, 4.0, 3.6, 3.5))


def goals(results: dict) -> list[list[str]]:
    """Steps at 64 layers to two losses: of ReZero, pre-norm, and pre-norm with scaled branches."""

    def steps(target: float) -> str:
        rules = "ReZero, w = 0", "pre-norm + warmup", "pre-norm, x + cF(N(x)), + warmup"
        means = [mean_steps_to(results, f"64 {rule}", target) for rule in rules]
        return ", ".join("never" if mean is None else f"{mean:.0f}" for mean in means)

    return [
        ["64 layers: steps to 4.0 bpb of ReZero, pre-norm, scaled pre-norm", "a third", steps(4.0), ""],
        ["64 layers: the same to 3.6 bpb", "a third", steps(3.6), ""],
    ]


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, steps=400, seeds=1)
    parser.add_argument("--depths", nargs="+", type=int, default=[12, 64, 128])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LADDER)
    parser.add_argument("--output", type=Path, default=RESULTS / "depth.json")
    parser.add_argument("--figure", type=Path, default=FIGURES / "depth.png")
    args = parser.parse_args()

    def arm(depth: int, rule: str):
        config, warmup = config_of(rule, depth, args), ARMS[rule][1]
        return lambda rate, seed: train(config, [(depth, args.steps)], rate, seed, args, warmup)

    def start(name: str, best: dict) -> float:
        depth, rule = name.split(maxsplit=1)
        known = [best[f"{less} {rule}"]["learning_rate"] for less in args.depths if less < int(depth)]
        return known[-1] if known else START

    arms = {f"{depth} {rule}": arm(depth, rule) for depth in args.depths for rule in RULES}
    results = run_grid(arms, args.learning_rates, args, start)
    draw(results, args.figure)
    for name, best in results["best"].items():
        print(f"{name:30s} {best}")
