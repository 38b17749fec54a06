"""The input-output Jacobian by depth, before and during training: post-norm, pre-norm and ReZero.

    python scripts/reproduce/run.py jacobian --train_file enwik8_prefix.xz

At initialisation the recipe is that of the official code: width 16, 4 tokens of N(0, 1), 4 heads, feed-forward width
64, Xavier-uniform weights, 10 repetitions, without a final norm, and ReZero also with resweight 0.1, "since 0 gives a
trivial spike". Then byte models of 64 layers are trained without warmup, all with the same batches and learning rate,
and the Jacobian goes from the embeddings of 8 bytes to the last hidden state. Singular values are computed in float64.
Results are written after every run and a repeated call goes on where it stopped.
The claim is Bachlechner et al. 2020, section 5.1 and figure 5.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.drawing import light_and_dark
from common.first_steps import batches, byte_model, steps
from common.record import FIGURES, RESULTS, read_json, save
from common.rules import PLAIN
from hf_rezero import ReZeroForCausalLM, RZTXEncoderLayer, load_corpus
from hf_rezero.data.corpora import Corpus
from hf_rezero.data.windows import ByteDataset, collate_bytes
from hf_rezero.diagnostics.jacobian import jacobian_spectrum
from hf_rezero.diagnostics.resweights import resweight_profile
from hf_rezero.picture import Picture
from hf_rezero.plots import plot_jacobian


WIDTH, TOKENS, HEADS, FEED_FORWARD = 16, 4, 4, 64
INITIAL = ("post-norm", "pre-norm", "ReZero, resweight 0.1", "ReZero")
TRAINED = {
    "post-norm": {"norm_position": "post", **PLAIN},
    "pre-norm": {"norm_position": "pre", **PLAIN},
    "ReZero": {},
}
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def encoder(arm: str, layers: int) -> nn.Sequential:
    """The stack of the official recipe; biases as torch has them."""
    sizes = (WIDTH, HEADS, FEED_FORWARD, 0.0)
    if arm.startswith("ReZero"):
        stack = nn.Sequential(*(RZTXEncoderLayer(*sizes, batch_first=True) for _ in range(layers)))
    else:
        options = {"batch_first": True, "norm_first": arm == "pre-norm"}
        stack = nn.Sequential(*(nn.TransformerEncoderLayer(*sizes, **options) for _ in range(layers)))
    for name, parameter in stack.named_parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        if name.endswith("resweight") and arm != "ReZero":
            nn.init.constant_(parameter, 0.1)
    return stack


def measure_initial(arm: str, layers: int, repetitions: int) -> dict:
    """Fresh weights and fresh inputs in every repetition."""
    spectra = []
    for seed in range(repetitions):
        torch.manual_seed(seed)
        spectra.append(jacobian_spectrum(encoder(arm, layers), torch.randn(1, TOKENS, WIDTH)))
    return summary(torch.cat(spectra))


def summary(sigma: torch.Tensor) -> dict:
    """What is kept of spectra (N, n): moments, the share at zero, and 128 evenly spaced order statistics."""
    squares = sigma.square().mean(1)
    ordered = sigma.flatten().sort().values
    kept = ordered[torch.linspace(0, len(ordered) - 1, 128).round().long()]
    return {
        "mean": sigma.mean().item(),
        "mean_square": squares.mean().item(),
        "mean_square_standard_error": squares.std().item() / len(squares) ** 0.5,
        "median": sigma.median().item(),
        "min": sigma.min().item(),
        "max": sigma.max().item(),
        "share_at_zero": {k: (sigma <= eps * sigma[:, :1]).double().mean().item() for k, eps in EPS.items()},
        "order_statistics": [float(f"{value:.4g}") for value in kept.tolist()],
    }


def train(arm: str, corpus: Corpus, args: argparse.Namespace) -> dict:
    """The spectrum at each of the wanted steps of one training run, and its loss in bits per byte."""
    model = byte_model(TRAINED[arm], 0, args)
    run = steps(model, batches(corpus.train, 0, max(args.at_steps), args), args.learning_rate)
    found, losses = {}, []
    for step in sorted(args.at_steps):
        losses += islice(run, step - len(losses))
        found[str(step)] = measure_trained(model, corpus.validation, args) | {"loss": mean_of_last(losses)}
    return found


def measure_trained(model: ReZeroForCausalLM, text: np.ndarray, args: argparse.Namespace) -> dict:
    """The spectrum at some bytes of the validation text, and how far the residual weights have gone."""
    windows = ByteDataset(text, TOKENS * 2)
    chosen = [i * len(windows) // args.repetitions for i in range(args.repetitions)]
    sigma = jacobian_spectrum(model, {"input_ids": collate_bytes(windows.__getitems__(chosen))["input_ids"]})
    weights = [abs(value) for value in resweight_profile(model).values()]
    return summary(sigma) | {"mean_abs_resweight": sum(weights) / len(weights)}


def mean_of_last(losses: list[float], count: int = 20) -> float | None:
    """The training loss of the last steps, None before the first."""
    return sum(losses[-count:]) / len(losses[-count:]) if losses else None


def verdicts(results: dict) -> dict:
    """The claims of the paper, held against the figures."""
    initial, training, depths = results["initial"], results["training"], results["settings"]["depths"]
    zeros = {k: {d: initial[f"post-norm | {d}"]["share_at_zero"][k] for d in depths} for k in EPS}
    shallow, deep = depths[0], 64 if 64 in depths else depths[-1]
    spread = max(initial[f"ReZero | {d}"]["max"] - initial[f"ReZero | {d}"]["min"] for d in depths)
    means = {step: run["mean"] for step, run in training["ReZero"].items()}
    post = {step: run["share_at_zero"]["float32"] for step, run in training["post-norm"].items()}
    pre = {d: initial[f"pre-norm | {d}"]["mean_square"] for d in depths}
    return {
        "post-norm: most singular values are zero to float32 at 64 layers, few at the least depth": {
            "holds": zeros["float32"][deep] > 0.5 and zeros["float32"][shallow] < 0.25,
            "share_by_depth": zeros,
            "taken_by_the_norm_at_any_depth": 2 / WIDTH,
        },
        "pre-norm: the mean square grows with depth": {
            "holds": all(pre[a] < pre[b] for a, b in zip(depths, depths[1:], strict=False)),
            "mean_square_by_depth": pre,
        },
        "ReZero: all singular values are 1 at any depth before training": {"holds": spread < 1e-9, "spread": spread},
        "ReZero: the mean is about 1 (0.5 to 2) before and during training": {
            "holds": all(0.5 < value < 2 for value in means.values()),
            "mean_by_step": means,
            "median_by_step": {step: run["median"] for step, run in training["ReZero"].items()},
            "largest_by_step": {step: run["max"] for step, run in training["ReZero"].items()},
        },
        "post-norm: the zeros stay during training": {
            "holds": all(value > 0.5 for value in post.values()),
            "share_by_step": post,
        },
    }


def run_all(args: argparse.Namespace, corpus: Corpus) -> dict:
    """Run what the result file does not hold yet."""
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "figures", "train_file", "threads")}
    settings |= {"corpus": Path(corpus.name).name, "width": WIDTH, "tokens": TOKENS, "heads": HEADS}
    results = read_json(args.output) or {"settings": settings, "initial": {}, "training": {}}
    for layers in args.depths:
        for arm in INITIAL:
            key = f"{arm} | {layers}"
            if key not in results["initial"]:
                results["initial"][key] = measure_initial(arm, layers, args.repetitions)
                save(args.output, results)
                print(f"{layers} layers, {arm}: {describe(results['initial'][key])}", flush=True)
    for arm in TRAINED:
        if arm not in results["training"]:
            results["training"][arm] = train(arm, corpus, args)
            save(args.output, results)
            for step, found in results["training"][arm].items():
                print(f"step {step}, {arm}: {describe(found)}, loss {found['loss']}", flush=True)
    results["verdicts"] = verdicts(results)
    save(args.output, results)
    return results


def describe(found: dict) -> str:
    """One line on a spectrum."""
    share = found["share_at_zero"]["float32"]
    return (
        f"mean {found['mean']:.3g}, mean square {found['mean_square']:.3g} ± {found['mean_square_standard_error']:.2g}, "
        f"{found['min']:.2g} to {found['max']:.3g}, {share:.0%} zero to float32"
    )


@light_and_dark
def draw(results: dict) -> Picture:
    """The depths in the first row, the steps of training in the second."""
    panels = {
        f"{d} layers, at initialisation": {
            arm: results["initial"][f"{arm} | {d}"]["order_statistics"] for arm in INITIAL
        }
        for d in results["settings"]["depths"]
    }
    for step in results["settings"]["at_steps"]:
        panels[f"{results['settings']['layers']} layers, {step} training steps"] = {
            arm: runs[str(step)]["order_statistics"] for arm, runs in results["training"].items()
        }
    return plot_jacobian(panels)


def table(results: dict) -> list[list[str]]:
    """One row for each kind of net: by depth before training, and by steps during it."""
    depths, steps = results["settings"]["depths"], list(next(iter(results["training"].values())))
    rows = [["mean σ² (σ zero to float32)", *(f"{depth} layers" for depth in depths), *(f"step {s}" for s in steps)]]
    for arm in dict.fromkeys(key.split(" | ")[0] for key in results["initial"]):
        found = [results["initial"][f"{arm} | {depth}"] for depth in depths]
        found += [results["training"].get(arm, {}).get(step) for step in steps]
        cells = (f"{r['mean_square']:.3g} ({r['share_at_zero']['float32']:.0%})" if r else "" for r in found)
        rows.append([arm, *cells])
    return rows


def main() -> None:
    """Run the measurements, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 12, 64, 128])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--layers", type=int, default=64, help="of the trained models")
    parser.add_argument("--hidden_size", type=int, default=32)
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--at_steps", nargs="+", type=int, default=[0, 20, 100, 500])
    parser.add_argument("--output", type=Path, default=RESULTS / "jacobian.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--threads", type=int, default=1, help="more is slower for layers this narrow")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = run_all(args, load_corpus(args.train_file))
    draw(results, args.figures / "jacobian.png")
    for claim, verdict in results["verdicts"].items():
        print(f"{'holds' if verdict['holds'] else 'DOES NOT HOLD'}: {claim}")
