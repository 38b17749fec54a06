"""Table 2 of the paper: steps and seconds of 12-layer byte models to a stated loss, by residual rule and norm.

    python scripts/reproduce/run.py convergence --train_file enwik8_prefix.xz
    python scripts/reproduce/run.py convergence --train_file enwik8.zip --hidden_size 512 --num_attention_heads 2 --block_size 512 \
        --batch_size 64 --steps 20000 --targets 1.5 1.3 1.2 --bf16 --compile --checkpoint_steps 1000 --output enwik8_12l.json

The second line is the paper's model, for a GPU. All arms see the same batches; each goes to its best learning rate, down a
ladder on seed 0, then runs the other seeds (Bachlechner et al. 2020, section 5). A loss is the mean of 50 training steps, in
bits per byte; at the default sizes no text is seen twice. Seconds are steps times the median of step times that were taken in turn.
"""

import argparse
from pathlib import Path

from common.byte_lm import adamw, add_arguments, build_model, run_grid, step_seconds, train
from common.curves import runs_of, steps_to, steps_to_losses
from common.drawing import light_and_dark, plot_arm
from common.record import FIGURES, RESULTS, write_json
from common.rules import ARMS, LADDER, START, config_of
from hf_rezero.picture import COLOURS, Picture, label_lines


@light_and_dark
def draw(results: dict) -> Picture:
    """Training loss by step, one line for each arm: the mean of its seeds."""
    figure = Picture(figsize=(8.2, 5))
    axes = figure.subplots()
    for place, arm in enumerate(results["best"]):
        plot_arm(
            axes, results, arm, color=f"C{place % COLOURS}", linestyle="-" if place < COLOURS else "--", label=arm
        )
    lowest = min(line.get_ydata().min() for line in axes.lines)
    axes.set(xlabel="step", ylabel="training bits per byte, mean of 50 steps", ylim=(lowest - 0.1, 5.2))
    label_lines(axes)
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each rule: test loss, steps to the targets, and the time of a step."""
    rows = steps_to_losses(results, "12 layers x 64", (4.0, 3.5, 3.0))
    return [[*row, ms] for row, ms in zip(rows, ["ms a step", *_step_times(results)], strict=True)]


def articles_table(results: dict) -> list[list[str]]:
    """One row for each rule: test loss and steps to the targets."""
    return steps_to_losses(results, "12 layers x 64", (4.0, 3.5, 3.0))


def _step_times(results: dict) -> list[str]:
    return [f"{1000 * results['step_seconds'][arm]:.0f}" for arm in results["best"]]


TABLES = {"convergence": table, "convergence_articles": articles_table}
DRAWINGS = {"convergence": draw, "convergence_articles": draw}


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, layers=12, steps=1000, seeds=3)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LADDER)
    parser.add_argument("--targets", nargs="+", type=float, default=[4.0, 3.5, 3.0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=21, help="of step times; 0 leaves them as they are in the file")
    parser.add_argument("--output", type=Path, default=RESULTS / "convergence.json")
    parser.add_argument("--figure", type=Path, default=FIGURES / "convergence.png")
    args = parser.parse_args()
    arms = {
        arm: lambda rate, seed, arm=arm: train(
            config_of(arm, args.layers, args), [(args.layers, args.steps)], rate, seed, args, ARMS[arm][1]
        )
        for arm in args.arms
    }
    results = run_grid(arms, args.learning_rates, args, lambda arm, best: START)
    if args.rounds:
        made = {arm: build_model(config_of(arm, args.layers, args), args.layers, args) for arm in args.arms}
        made = {arm: (model, adamw(model, rate=1e-5)) for arm, model in made.items()}
        results["step_seconds"] = step_seconds(made, args, args.rounds)
    write_json(args.output, results)
    draw(results, args.figure)
    for arm in args.arms:
        steps = [[steps_to(run["curve"], target) for run in runs_of(results, arm)] for target in args.targets]
        print(
            f"{arm:26s} lr {results['best'][arm]['learning_rate']:g}, test {results['best'][arm]['mean']}, steps {steps}"
        )
