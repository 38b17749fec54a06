"""128 layers from the first step: ReZero without norm or warmup, against post-norm and pre-norm of the same shape.

    python scripts/reproduce/run.py deep_without_warmup --train_file enwik8_prefix.xz

Every arm takes the same batches at a constant learning rate with no warmup, over a grid of learning rates, then again
with more seeds at its best one. Results are written after every run and a repeated call goes on where it stopped.
The claim is Bachlechner et al. 2020, sections 1 and 5: deep post-norm Transformers do not train, ReZero does at once.
"""

import argparse
import math
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure

from common.record import FIGURES, RESULTS, provenance, read_json, write_json
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, load_corpus, param_groups
from hf_rezero.data.windows import ByteDataset, collate_bytes
from hf_rezero.plots import save_figure


PLAIN = {"resweight_init": 1.0, "resweight_trainable": False}
ARMS = {
    "ReZero": {},
    "post-norm": {"norm_position": "post", **PLAIN},
    "pre-norm": {"norm_position": "pre", **PLAIN},
}


def train(config: dict, learning_rate: float, seed: int, args: argparse.Namespace) -> list[float]:
    """Train one model and return the training loss of every step in bits per byte."""
    torch.manual_seed(seed)
    shape = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": args.block_size, "use_cache": False}
    model = ReZeroForCausalLM(ReZeroConfig(**shape, **config))
    optimizer = torch.optim.AdamW(param_groups(model), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    dataset = ByteDataset(args.corpus.train, args.block_size)
    order = np.random.default_rng(seed).permutation(len(dataset))
    curve = []
    for step in range(args.steps):
        rows = order[step * args.batch_size : (step + 1) * args.batch_size]
        loss = model(**collate_bytes(dataset.__getitems__(rows))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item() / math.log(2))
        if not math.isfinite(curve[-1]):
            break
    return curve


def final(curve: list[float], steps: int) -> float:
    """Mean of the last tenth of the steps; infinite for a run that broke off."""
    return mean(curve[-steps // 10 :]) if len(curve) == steps else math.inf


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet."""
    results = read_json(args.output) or {"settings": vars(args) | {"corpus": Path(args.corpus.name).name}, "runs": {}}
    for name in ("output", "train_file", "arms"):
        results["settings"].pop(name, None)
    results["provenance"] = provenance()
    unigram = np.bincount(args.corpus.train, minlength=256) / len(args.corpus.train)
    results["unigram_bpb"] = float(-(unigram[unigram > 0] * np.log2(unigram[unigram > 0])).sum())

    def run(arm: str, learning_rate: float, seed: int) -> float:
        key = f"{arm} lr={learning_rate:g} seed={seed}"
        if key not in results["runs"]:
            curve = train(ARMS[arm], learning_rate, seed, args)
            results["runs"][key] = {"final": final(curve, args.steps), "curve": [round(x, 4) for x in curve]}
            write_json(args.output, results)
            print(f"{key}: {results['runs'][key]['final']:.3f} bits per byte", flush=True)
        return results["runs"][key]["final"]

    for arm in args.arms:
        best = min(args.learning_rates, key=lambda rate: run(arm, rate, 0))
        finals = [run(arm, best, seed) for seed in range(args.seeds)]
        results.setdefault("best", {})[arm] = {"learning_rate": best, "final_by_seed": finals, "mean": mean(finals)}
        write_json(args.output, results)
    return results


def draw(results: dict, path: Path) -> None:
    """Smoothed curves of the best learning rate of each arm, one line per seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for color, (arm, best) in enumerate(results["best"].items()):
        for seed in range(len(best["final_by_seed"])):
            curve = results["runs"][f"{arm} lr={best['learning_rate']:g} seed={seed}"]["curve"]
            smooth = np.convolve(curve, np.ones(10) / 10, mode="valid")
            label = f"{arm}, lr {best['learning_rate']:g}" if seed == 0 else None
            axes.plot(np.arange(len(smooth)) + 10, smooth, color=f"C{color}", label=label, linewidth=1)
    axes.axhline(results["unigram_bpb"], color="gray", linestyle=":", label="unigram entropy")
    settings = results["settings"]
    axes.set(xlabel="optimizer step, no warmup", ylabel="training bits per byte (10-step mean)", ylim=(3, 7))
    axes.set_title(f"{settings['layers']} layers x {settings['hidden_size']}, each at its best learning rate")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    """Run the comparison, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ReZero", "post-norm"])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--threads", type=int, default=1, help="more is slower for layers this narrow")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output = RESULTS / "deep_without_warmup.json"
    args.corpus = load_corpus(args.train_file)
    results = run_all(args)
    draw(results, FIGURES / "deep_without_warmup.png")
    for arm, best in results["best"].items():
        print(f"{arm:10s} lr {best['learning_rate']:g}: {best['mean']:.3f} bits per byte, mean of {args.seeds} seeds")
