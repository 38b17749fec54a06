"""ReZero with and without norms, and the norms without ReZero: test bits per byte at equal steps.

    python scripts/reproduce/run.py norm_variants --train_file enwik8_prefix.xz

Byte models of 12 layers on the same batches, each at the best learning rate of a grid on seed 0, without warmup.
"""

import argparse
from pathlib import Path

from common.byte_lm import add_arguments, run_grid, train
from common.curves import byte_models
from common.record import RESULTS
from common.rules import PLAIN


VARIANTS = {
    "ReZero, x + w F(x)": {},
    "ReZero + final norm": {"final_norm": True},
    "ReZero + pre, x + w F(N(x))": {"norm_position": "pre"},
    "ReZero + branch, x + w N(F(x))": {"norm_position": "branch"},
    "ReZero + post, N(x + w F(x))": {"norm_position": "post"},
    "ReZero + pre, RMS": {"norm_position": "pre", "norm_type": "rmsnorm"},
    "ReZero + pre, DyT": {"norm_position": "pre", "norm_type": "dyt"},
    "pre-norm, x + F(N(x))": {"norm_position": "pre", **PLAIN},
    "post-norm, N(x + F(x))": {"norm_position": "post", **PLAIN},
    "residual, x + F(x)": PLAIN,
}


def table(results: dict) -> list[list[str]]:
    """One row for each residual rule."""
    return byte_models(results, "12 layers x 64")


def main() -> None:
    """Run the comparison and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, layers=12, steps=500)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS / "norm_variants.json")
    args = parser.parse_args()
    arms = {
        name: lambda rate, seed, name=name: train(VARIANTS[name], [(args.layers, args.steps)], rate, seed, args)
        for name in args.variants
    }
    results = run_grid(arms, args.learning_rates, args)
    for variant, best in results["best"].items():
        print(f"{variant:32s} {best}")
