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
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure

from common.record import FIGURES, RESULTS, provenance, read_json, write_json
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, gradinit_, load_corpus, param_groups
from hf_rezero.data.windows import ByteDataset, collate_bytes
from hf_rezero.plots import save_figure
from rezero.deep_without_warmup import PLAIN, final


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
    torch.manual_seed(seed)
    shape = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": args.block_size, "use_cache": False}
    model = ReZeroForCausalLM(ReZeroConfig(**shape, **arm.config))
    if arm.std:
        for name, weight in model.named_parameters():
            if "layers." in name and weight.ndim == 2:
                torch.nn.init.normal_(weight, std=arm.std)
    return model


def batches(args: argparse.Namespace, seed: int, count: int) -> list[Mapping]:
    """The first batches of a random order of the training text."""
    dataset = ByteDataset(args.corpus.train, args.block_size)
    order = np.random.default_rng(seed).permutation(len(dataset))
    rows = [order[i * args.batch_size : (i + 1) * args.batch_size] for i in range(count)]
    return [collate_bytes(dataset.__getitems__(part)) for part in rows]


def initialise(model: ReZeroForCausalLM, eta: float, gamma: float, seed: int, args: argparse.Namespace) -> dict:
    """Run GradInit and return what is worth keeping of its report."""
    source = batches(args, seed + 1000, args.init_steps + 1)
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


def train(arm: Arm, learning_rate: float, seed: int, args: argparse.Namespace) -> dict:
    """Train one model; the curve is the training loss of every step in bits per byte."""
    model, start = build(arm, seed, args), time.perf_counter()
    found = {}
    if arm.eta_gamma:
        found = initialise(model, learning_rate, arm.eta_gamma / learning_rate, seed, args)
    optimizer = torch.optim.AdamW(param_groups(model), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    warmup = int(args.warmup_share * args.steps) if arm.warmup else 1
    curve = []
    for step, batch in enumerate(batches(args, seed, args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(round(loss.item() / math.log(2), 4))
        if not math.isfinite(curve[-1]):
            break
    seconds = round(time.perf_counter() - start, 1)
    return {"final": final(curve, args.steps), "curve": curve, "seconds": seconds, **found}


def unigram_bpb(corpus: np.ndarray) -> float:
    """The entropy of single bytes: what a model reaches that ignores its context."""
    share = np.bincount(corpus, minlength=256) / len(corpus)
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet: the grid of each arm, then its other seeds."""
    kept = ("layers", "hidden_size", "block_size", "batch_size", "steps", "init_steps", "scale_lr", "warmup_share")
    results = read_json(args.output) or {"runs": {}, "best": {}}
    results["settings"] = {"corpus": Path(args.corpus.name).name} | {name: getattr(args, name) for name in kept}
    results["provenance"] = provenance()
    results["unigram_bpb"] = unigram_bpb(args.corpus.train)

    def run(arm: str, learning_rate: float, seed: int) -> float:
        key = f"{arm} | lr={learning_rate:g} | seed={seed}"
        if key not in results["runs"]:
            results["runs"][key] = train(ARMS[arm], learning_rate, seed, args)
            write_json(args.output, results)
            print("{}: {final:.3f} bits per byte, {seconds} s".format(key, **results["runs"][key]), flush=True)
        return results["runs"][key]["final"]

    # All arms with one seed first: an interrupted run has something to show.
    grids = {arm: {rate: run(arm, rate, 0) for rate in args.learning_rates} for arm in args.arms}
    for seeds in range(1, args.seeds + 1):
        for arm, grid in grids.items():
            rate = min(grid, key=grid.__getitem__)
            finals = [run(arm, rate, seed) for seed in range(seeds)]
            results["best"][arm] = {"learning_rate": rate, "final_by_seed": finals, "mean": mean(finals)}
            write_json(args.output, results)
    return results


def draw(results: dict, path: Path) -> None:
    """Smoothed curves at the best learning rate of each arm, and the final loss over the grid."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    curves, grid = figure.subplots(1, 2)
    for arm, best in results["best"].items():
        look = {"color": ARMS[arm].color, "linestyle": ARMS[arm].style, "linewidth": 1.2}
        for seed in range(len(best["final_by_seed"])):
            curve = results["runs"][f"{arm} | lr={best['learning_rate']:g} | seed={seed}"]["curve"]
            window = min(10, len(curve))
            smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
            label = f"{arm}, lr {best['learning_rate']:g}" if seed == 0 else None
            curves.plot(np.arange(len(smooth)) + window, smooth, label=label, **look)
        keys = [key.split(" | ") for key in results["runs"] if key.endswith("seed=0")]
        rates = sorted(float(rate[3:]) for name, rate, _ in keys if name == arm)
        finals = [results["runs"][f"{arm} | lr={rate:g} | seed=0"]["final"] for rate in rates]
        grid.semilogx(rates, finals, marker="o", markersize=4, label=arm, **look)
    for axes in (curves, grid):
        axes.axhline(results["unigram_bpb"], color="gray", linestyle=":", label="unigram entropy")
        axes.set(ylabel="training bits per byte", ylim=(3.8, 6))
    curves.set(xlabel="optimizer step", title="each at its best learning rate, one line per seed")
    grid.set(xlabel="learning rate", title="last tenth of the steps, seed 0")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--init_steps", type=int, default=60, help="iterations of GradInit")
    parser.add_argument("--scale_lr", type=float, default=0.03, help="learning rate of its scales")
    parser.add_argument("--warmup_share", type=float, default=0.25, help="of the steps, in the arm with warmup")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--output", type=Path, default=RESULTS / "gradinit_post_norm.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.corpus = load_corpus(args.train_file)
    results = run_all(args)
    draw(results, args.figures / "gradinit_post_norm.png")
    for arm, best in results["best"].items():
        print(f"{arm:40s} lr {best['learning_rate']:<6g} {best['mean']:.3f} of {best['final_by_seed']}")
