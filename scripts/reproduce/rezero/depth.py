"""Table 3 of the paper: byte models of 12, 64 and 128 layers at equal tokens, ReZero against pre-norm and post-norm.

    python scripts/reproduce/run.py depth --train_file enwik8_prefix.xz
    python scripts/reproduce/run.py depth --train_file enwik8.zip --hidden_size 256 --block_size 512 --batch_size 64 --steps 20000 \
        --bf16 --compile --checkpoint_steps 1000 --output enwik8_depth.json

The second line is the paper's model, for a GPU. Learning rates, seeds and losses are those of `convergence`
(Bachlechner et al. 2020, section 5).
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from common.byte_lm import add_arguments, run_grid, train
from common.curves import mean_curve, mean_steps_to, steps_to_losses
from common.record import FIGURES, RESULTS
from common.rules import ARMS, LADDER, START, config_of
from hf_rezero.plots import save_figure


RULES = [
    "ReZero, w = 0",
    "pre-norm, x + cF(N(x)), + warmup",
    "pre-norm + warmup",
    "ReZero, w = 1/sqrt(2L)",
    "post-norm + warmup",
]


def draw(results: dict, path: Path) -> None:
    """Training loss by step, a panel for each depth."""
    depths = sorted({int(arm.split()[0]) for arm in results["best"]})
    figure = Figure(figsize=(4 * len(depths), 4), layout="constrained")
    panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for depth, axes in zip(depths, panels, strict=True):
        for color, rule in enumerate(RULES):
            arm = f"{depth} {rule}"
            if arm in results["best"] and (curve := mean_curve(results, arm)):
                axes.plot(*curve, f"C{color}", label=rule)
        axes.set(title=f"{depth} layers", xlabel="step", ylim=(None, 5.2))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training bits per byte, mean of 50 steps")
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


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
