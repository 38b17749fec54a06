"""Residual rules of byte models, and the learning rates that are tried for each."""

import argparse


PLAIN = {"resweight_init": 1.0, "resweight_trainable": False}
PLAIN_RESNET = {"activation_position": "sum", **PLAIN}
WARMUP = 0.1
# config and share of warmup; c is 1/sqrt(2L), as in the initialisation of GPT-2
ARMS = {
    "ReZero, w = 0": ({}, 0),
    "ReZero, w = 1/sqrt(2L)": ({"resweight_init": "1/sqrt(2L)"}, 0),
    "ReZero, w = 1": ({"resweight_init": 1.0}, 0),
    "pre-norm, x + F(N(x))": ({"norm_position": "pre", **PLAIN}, 0),
    "pre-norm + warmup": ({"norm_position": "pre", **PLAIN}, WARMUP),
    "pre-norm, x + cF(N(x)), + warmup": (
        {"norm_position": "pre", "resweight_init": "1/sqrt(2L)", "resweight_trainable": False},
        WARMUP,
    ),
    "branch norm, x + N(F(x))": ({"norm_position": "branch", **PLAIN}, 0),
    "post-norm, N(x + F(x))": ({"norm_position": "post", **PLAIN}, 0),
    "post-norm + warmup": ({"norm_position": "post", **PLAIN}, WARMUP),
    "DyT, x + F(D(x))": ({"norm_position": "pre", "norm_type": "dyt", **PLAIN}, 0),
    "GPT-2 + warmup": ({"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, WARMUP),
    "Llama + warmup": ({"model_type": "llama", "intermediate_size": "8/3 D"}, WARMUP),
}
LADDER = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
START = 3e-3


def config_of(arm: str, layers: int, args: argparse.Namespace) -> dict:
    """The config of an arm with the values that depend on its size."""
    values = {"1/sqrt(2L)": (2 * layers) ** -0.5, "8/3 D": 8 * args.hidden_size // 3}
    return {name: values.get(value, value) for name, value in ARMS[arm][0].items()}
