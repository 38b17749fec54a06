"""The best loss in equal time: our recipe, its parts, and GPT-2 and pre-norm with AdamW, as byte models on a CPU.

    python scripts/reproduce/run.py recipe --train_file enwik8_prefix.xz
    python scripts/reproduce/run.py recipe --train_file featured_articles.txt.xz --rates_of scripts/reproduce/results/recipe.json \
        --output scripts/reproduce/results/recipe_articles.json

Every arm has the same shape, batch, bf16 and seconds: its number of steps is the time over the median of its step times, which are
taken in turn before. Each goes to its best learning rate down the same ladder; `--rates_of` takes those of another result file.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn

from common.byte_lm import adamw, add_arguments, build_model, load_text, run_grid, step_seconds, train
from common.curves import by_seed
from common.record import RESULTS, read_json, write_json
from hf_rezero import Muon, lookahead, param_groups


LADDER = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def muon(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Lookahead around Muon, with the decay and betas of `adamw`."""
    return lookahead(Muon(param_groups(model, weight_decay=0.1), rate, betas=(0.9, 0.95)), k=5, alpha=0.5)


START = {muon: 1e-2, adamw: 3e-3}
GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
RECIPE = "recipe: x + w F(N(x)), Muon"
RIVALS = "pre-norm x + c F(N(x)), AdamW, warmup", "GPT-2, AdamW, warmup"
# config, share of warmup, optimizer; c is 1/sqrt(2L)
ARMS = {
    RECIPE: ({"norm_position": "pre"}, 0, muon),
    "pre-norm x + c F(N(x)), Muon": ({"norm_position": "pre", "resweight_trainable": False}, 0, muon),
    "ReZero x + w F(x), Muon": ({}, 0, muon),
    "ReZero x + w F(x), AdamW": ({}, 0, adamw),
    "pre-norm x + c F(N(x)), AdamW, warmup": ({"norm_position": "pre", "resweight_trainable": False}, 0.1, adamw),
    "GPT-2, AdamW, warmup": (GPT2, 0.1, adamw),
}


def config_of(arm: str, layers: int) -> dict:
    """The config of an arm; residual weights start at 1/sqrt(2L) where it does not say otherwise."""
    config = ARMS[arm][0]
    ours = {"hidden_act": "relu2", "resweight_init": (2 * layers) ** -0.5}
    return config if "model_type" in config else ours | config


def table(results: dict) -> list[list[str]]:
    """One row for each arm on both corpora: what as many seconds are enough for."""
    articles = read_json(RESULTS / "recipe_articles.json")
    seconds = results["settings"]["seconds"]
    rows = [
        [
            f"6 layers x 256, {seconds:.0f} s",
            "best lr",
            "steps",
            "enwik8, first 4.15 MB: test bpb, mean",
            "by seed",
            "articles: test bpb",
        ]
    ]
    for arm, best in results["best"].items():
        steps = next(run["steps"] for key, run in results["runs"].items() if key.startswith(f"{arm} |"))
        found = f"{articles['best'][arm]['mean']:.3f}" if arm in articles["best"] else ""
        rows.append([arm, f"{best['learning_rate']:g}", f"{steps}", f"{best['mean']:.3f}", by_seed(best), found])
    return rows


def goals(results: dict) -> list[list[str]]:
    """The lead of the recipe in equal time on both corpora."""
    articles = read_json(RESULTS / "recipe_articles.json")
    return [
        ["recipe: bpb below its rivals in equal time, prefix", "0.05", f"{lead(results):.2f}", ""],
        ["recipe: the same, featured articles", "0.05", f"{lead(articles):.2f}", ""],
    ]


def lead(results: dict) -> float:
    """Bits per byte by which the recipe is below the better one of its rivals."""
    best = {arm: found["mean"] for arm, found in results["best"].items()}
    return min(best[arm] for arm in RIVALS) - best[RECIPE]


def main() -> None:
    """Time the steps, run the comparison, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, hidden_size=256, num_attention_heads=2, block_size=256, batch_size=8, seeds=1, layers=6)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, for each run")
    parser.add_argument("--rounds", type=int, default=15, help="of step times")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LADDER)
    parser.add_argument(
        "--rates_of", type=Path, help="a result file whose best learning rates are taken, without a search"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=RESULTS / "recipe.json")
    parser.set_defaults(bf16=True)
    args = parser.parse_args()
    load_text(args)
    results = read_json(args.output) or {"runs": {}, "best": {}}
    if "step_seconds" not in results:
        made = {arm: build_model(config_of(arm, args.layers), args.layers, args) for arm in args.arms}
        made = {arm: (model, ARMS[arm][2](model, 1e-5)) for arm, model in made.items()}
        results["step_seconds"] = step_seconds(made, args, args.rounds)
        write_json(args.output, results)
    steps = {arm: math.ceil(args.seconds / seconds) for arm, seconds in results["step_seconds"].items()}
    known = read_json(args.rates_of)["best"] if args.rates_of else {}

    for arm in args.arms:
        _, warmup, optimizer = ARMS[arm]
        config, stages = config_of(arm, args.layers), [(args.layers, steps[arm])]

        def run(rate, seed, config=config, stages=stages, warmup=warmup, optimizer=optimizer):
            return train(config, stages, rate, seed, args, warmup, optimizer) | {"steps": stages[0][1]}

        rates = [known[arm]["learning_rate"]] if known else args.learning_rates
        best = run_grid({arm: run}, rates, args, lambda *_, start=START[optimizer]: start)["best"][arm]
        print(f"{arm:40s} {steps[arm]} steps, lr {best['learning_rate']:g}, test {best['mean']}", flush=True)
