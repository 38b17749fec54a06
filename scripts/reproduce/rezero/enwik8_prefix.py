"""The first 4.15 MB of enwik8: ReZero against pre-norm, the same run but for the norms, and the recipe.

    python scripts/reproduce/run.py enwik8_prefix --train_file enwik8_prefix.xz

Starts `run_clm.py` with `configs/enwik8_prefix_12l.yaml` or `enwik8_prefix_recipe.yaml` for each arm, in two processes of one
thread, and collects their figures. A run that has finished is not repeated; one that was interrupted goes on from its last checkpoint.
Validation and test bits per byte are over the next 5 % and the last 5 % of the file, in windows of 256 bytes that move
by 128, so that each byte has 128 to 255 bytes of context.
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

from common.drawing import light_and_dark
from common.record import FIGURES, RESULTS, read_json, save
from hf_rezero.picture import HEIGHT, WIDTH, Picture, label_lines


SCRIPTS = Path(__file__).parents[2]
CONFIG, RECIPE = (str(SCRIPTS / "configs" / f"enwik8_prefix_{name}.yaml") for name in ("12l", "recipe"))
PRE_NORM = (
    "hidden_size=192,num_hidden_layers=12,num_attention_heads=3,max_position_embeddings=256,"
    "norm_position=pre,resweight_init=1,resweight_trainable=false"
)
SHORTER = [CONFIG, "--max_steps", "4000", "--weight_decay", "0.05"]
ARMS = {
    "ReZero": [CONFIG],
    "ReZero, 4,000 steps": SHORTER,
    "ReZero, 4,000 steps, rate of w x 0.1": [*SHORTER, "--resweight_learning_rate", "3e-4"],
    "pre-norm, 4,000 steps, lr 1.5e-3": [*SHORTER, "--config_overrides", PRE_NORM, "--learning_rate", "1.5e-3"],
    "recipe, 6 layers x 256": [RECIPE],
}


def run(arguments: list[str], folder: Path, train_file: str) -> None:
    """Train and evaluate one arm, or go on with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(SCRIPTS / "run_clm.py")]
    command += [*arguments, "--train_file", train_file, "--output_dir", str(folder)]
    if list(folder.glob("checkpoint-*/trainer_state.json")):
        command += ["--resume_from_checkpoint", "true"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def collect(folder: Path) -> dict:
    """The figures that a finished run left."""
    figures = read_json(folder / "all_results.json")
    log = read_json(folder / "trainer_state.json")["log_history"]
    keys = ["eval_bpb", "test_bpb", "train_loss", "train_steps_per_second", "epoch"]
    keys += ["train_runtime", "eval_runtime", "test_runtime"]
    curve = [(entry["step"], round(entry["loss"], 4)) for entry in log if "loss" in entry]
    sizes = [entry["resweight_mean_abs"] for entry in log if "resweight_mean_abs" in entry]
    return {key: figures[key] for key in keys} | {"curve_nats": curve, "resweight_mean_abs": sizes[-1]}


@light_and_dark
def draw(results: dict) -> Picture:
    """Training loss of each arm in bits per byte, by the time on 2 cores."""
    figure = Picture(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    for arm, result in results["runs"].items():
        steps, nats = zip(*result["curve_nats"], strict=True)
        minutes = [step / result["train_steps_per_second"] / 60 for step in steps]
        axes.plot(minutes, [x / math.log(2) for x in nats], label=f"{arm}: test {result['test_bpb']:.3f}")
    axes.set(xlabel="minutes", ylabel="training bits per byte", ylim=(1.5, 3.5))
    label_lines(axes)
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each arm."""
    rows = [
        [
            "12 layers x 192, or as named",
            "validation bpb",
            "test bpb",
            "training loss, last 500 steps (bpb)",
            "minutes",
        ]
    ]
    for arm, run in results["runs"].items():
        tail = [nats for step, nats in run["curve_nats"] if step > run["curve_nats"][-1][0] - 500]
        loss = sum(tail) / len(tail) / math.log(2)
        minutes = f"{run['train_runtime'] / 60:.0f}"
        rows.append([arm, f"{run['eval_bpb']:.3f}", f"{run['test_bpb']:.3f}", f"{loss:.3f}", minutes])
    return rows


def goals(results: dict) -> list[list[str]]:
    """What the recipe reaches, and what its run spends on other things than steps."""
    run = results["runs"]["recipe, 6 layers x 256"]
    profile = read_json(RESULTS / "training_profile.json")["configs"]["enwik8_prefix_recipe"]["shares"]
    scoring = run["eval_runtime"] + run["test_runtime"]
    shares = profile["batches"], scoring / (run["train_runtime"] + scoring), profile["checkpoints"]
    reached = f"{run['test_bpb']:.3f} in {run['train_runtime'] / 60:.0f} min"
    spent = ", ".join(f"{share:.2%}" for share in shares)
    return [
        ["recipe: test bpb of the prefix, 45 minutes", "1.80", reached, ""],
        ["recipe: batches, evaluation, checkpoints: shares of the run", "2 % each", spent, ""],
    ]


def main() -> None:
    """Run the arms that are not finished, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True, help="the first 4,154,399 bytes of enwik8")
    parser.add_argument("--output_dir", default="outputs/enwik8_prefix", help="where the runs are kept")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    path = RESULTS / "enwik8_prefix.json"
    results = {"runs": read_json(path).get("runs", {})}
    for arm in args.arms:
        folder = Path(args.output_dir, arm.replace(" ", "_"))
        if not (folder / "test_results.json").exists():
            run(ARMS[arm], folder, args.train_file)
        results["runs"][arm] = collect(folder)
        save(path, results)
    draw(results, FIGURES / "enwik8_prefix.png")
