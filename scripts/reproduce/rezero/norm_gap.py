"""Why a norm is ahead in longer runs: one change at a time to ReZero, and what the streams look like at the end.

    python scripts/reproduce/run.py norm_gap --train_file enwik8_prefix.xz

Byte models of 12 layers on the same batches; the sizes are those on 64 windows of the test text: the root mean
square of the last hidden states, the largest logit, the mean size of the residual weights.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from common.byte_lm import adamw, add_arguments, run_grid, train
from common.curves import STRIDE, by_seed, mean_of, runs_of
from common.record import RESULTS
from hf_rezero.data.windows import collate_bytes, evaluation_windows


INIT = 24**-0.5  # 1/sqrt(2L)
REZERO = {"resweight_init": INIT}
PRE = {**REZERO, "norm_position": "pre"}
# config, learning rate (the best of `convergence` with and without norms), share of warmup, optimizer, bf16
ARMS = {
    "ReZero": (REZERO, 1e-2, 0, adamw, False),
    "pre-norm, x + cF(N(x)), + warmup": ({**PRE, "resweight_trainable": False}, 3e-3, 0.1, adamw, False),
    "ReZero + pre-norm, x + wF(N(x))": (PRE, 3e-3, 0, adamw, False),
    "ReZero, learning rate 3e-3": (REZERO, 3e-3, 0, adamw, False),
    "ReZero + final norm": ({**REZERO, "final_norm": True}, 1e-2, 0, adamw, False),
    "ReZero, w from 0": ({}, 1e-2, 0, adamw, False),
    "ReZero, w fixed": ({**REZERO, "resweight_trainable": False}, 1e-2, 0, adamw, False),
    "ReZero, rate of w x 0.1": (REZERO, 1e-2, 0, partial(adamw, resweight_factor=0.1), False),
    "ReZero, weight decay 0": (REZERO, 1e-2, 0, partial(adamw, weight_decay=0.0), False),
    "ReZero, weight decay 0.5": (REZERO, 1e-2, 0, partial(adamw, weight_decay=0.5), False),
    "ReZero, warmup": (REZERO, 1e-2, 0.1, adamw, False),
    "ReZero, bf16": (REZERO, 1e-2, 0, adamw, True),
    "ReZero, dropout 0.1": ({**REZERO, "hidden_dropout": 0.1}, 1e-2, 0, adamw, False),
    "ReZero, learning rate 1e-3": (REZERO, 1e-3, 0, adamw, False),
    "ReZero, 3e-3, rate of w x 0.1": (REZERO, 3e-3, 0, partial(adamw, resweight_factor=0.1), False),
    "ReZero + pre-norm, rate of w x 0.1": (PRE, 3e-3, 0, partial(adamw, resweight_factor=0.1), False),
    "ReZero, 3e-3, warmup": (REZERO, 3e-3, 0.1, adamw, False),
    "ReZero, 3e-3, weight decay 0.5": (REZERO, 3e-3, 0, partial(adamw, weight_decay=0.5), False),
    "ReZero + final norm, 3e-3": ({**REZERO, "final_norm": True}, 3e-3, 0, adamw, False),
    "ReZero + pre-norm, 1e-2": (PRE, 1e-2, 0, adamw, False),
}


@torch.no_grad()
def sizes(model: nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Root mean square of the last hidden states, largest logit, mean |resweight|."""
    batch = collate_bytes(evaluation_windows(args.corpus.test, args.block_size).__getitems__(range(64)))
    stream = model.model(input_ids=batch["input_ids"].to(args.device)).last_hidden_state
    weights = [p.abs().mean() for name, p in model.named_parameters() if name.endswith("resweight")]
    found = {
        "stream": stream.pow(2).mean().sqrt(),
        "logit": model.lm_head(stream).abs().max(),
        "resweight": torch.stack(weights).mean(),
    }
    return {name: round(value.item(), 4) for name, value in found.items()}


def table(results: dict) -> list[list[str]]:
    """One row for each change, means of its seeds."""
    head = ["12 layers x 64, 2,000 steps", "lr", "training bpb, last 200 steps", "worst since step 500"]
    rows = [[*head, "test bpb, mean", "by seed", "stream, rms", "largest logit", "mean size of w"]]
    for arm, best in results["best"].items():
        runs, cells = runs_of(results, arm), [arm, f"{best['learning_rate']:g}"]
        if math.isfinite(best["mean"]):
            losses = [[loss for *_, loss in run["curve"]] for run in runs]
            training, worst = mean(median(x[-20:]) for x in losses), max(max(x[50:]) for x in losses)
            sizes = ((mean_of(runs, name), digits) for name, digits in (("stream", 2), ("logit", 1), ("resweight", 3)))
            cells += [f"{training:.3f}", f"{worst:.1f}", f"{best['mean']:.3f}", by_seed(best)]
            cells += [f"{x:.{digits}f}" for x, digits in sizes]
        else:
            cells += ["", "", "", f"diverged by step {(len(runs[0]['curve']) + 1) * STRIDE}", "", "", ""]
        rows.append(cells)
    return rows


def goals(results: dict) -> list[list[str]]:
    """How far ReZero stays above pre-norm at 12 layers, at first and with slower residual weights."""
    best = {arm: found["mean"] for arm, found in results["best"].items()}
    rival = best["pre-norm, x + cF(N(x)), + warmup"]
    above = ", ".join(f"{best[arm] - rival:.2f}" for arm in ("ReZero", "ReZero, 3e-3, rate of w x 0.1"))
    goal = "12 x 64, 2,000 steps: test bpb above scaled pre-norm, at first and with slower residual weights"
    return [[goal, "0", above, ""]]


def main() -> None:
    """Run the comparison and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, layers=12, steps=2000, seeds=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=RESULTS / "norm_gap.json")
    args = parser.parse_args()

    for name in args.arms:
        config, rate, warmup, optimizer, bf16 = ARMS[name]

        def run(rate, seed, config=config, warmup=warmup, optimizer=optimizer, bf16=bf16):
            own = argparse.Namespace(**vars(args) | {"bf16": bf16})
            return train(config, [(args.layers, args.steps)], rate, seed, own, warmup, optimizer, sizes)

        run_grid({name: run}, [rate], args)
