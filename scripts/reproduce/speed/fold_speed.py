"""What folding the residual weights is worth in inference: ratios of interleaved forward passes.

    python scripts/reproduce/run.py fold_speed

The same model with its residual weights and after `fold_resweight_`, in turn; medians, and the largest difference of logits.
"""

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import torch

from common.record import RESULTS, save
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, fold_resweight_


# width, layers, heads, batch, tokens
CASES = {
    "12 x 512, 256 tokens": (512, 12, 8, 1, 256),
    "128 x 64, 128 tokens": (64, 128, 2, 2, 128),
    "128 x 64, 1 token": (64, 128, 2, 1, 1),
}


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Of one forward pass."""
    start = time.perf_counter()
    model(ids, use_cache=False)
    return time.perf_counter() - start


@torch.no_grad()
def measure(case: str, rounds: int) -> dict[str, float]:
    """Median seconds of both, their ratio, and the difference of logits relative to the largest."""
    width, layers, heads, batch, tokens = CASES[case]
    torch.manual_seed(0)
    config = ReZeroConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, resweight_init=0.1)
    model, ids = ReZeroForCausalLM(config).eval(), torch.randint(0, 256, (batch, tokens))
    folded = fold_resweight_(copy.deepcopy(model))
    expected = model(ids).logits
    difference = (folded(ids).logits - expected).abs().max() / expected.abs().max()
    times = [(seconds(model, ids), seconds(folded, ids)) for _ in range(rounds)]
    before, after = (median(pair[i] for pair in times) for i in (0, 1))
    return {"before": before, "after": after, "ratio": after / before, "difference": float(difference)}


def table(results: dict) -> list[list[str]]:
    """One row for each model."""
    rows = [["forward pass, one thread", "time of the folded model", "largest difference of logits, relative"]]
    return [*rows, *([c, f"{r['ratio']:.2f}", f"{r['difference']:.0e}"] for c, r in results["results"].items())]


def main() -> None:
    """Measure all cases and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS / "fold_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {case: measure(case, args.rounds) for case in args.cases}
    save(args.output, {"results": results})
    for case, figures in results.items():
        print(f"{case}: {figures['ratio']:.3f} of the time, logits differ by {figures['difference']:.1e}")
