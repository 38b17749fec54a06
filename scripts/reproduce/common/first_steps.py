"""The first steps of byte models at a constant learning rate, for the claims about what trains at once."""

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import mean

import numpy as np
import torch

from common.byte_lm import update
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, param_groups
from hf_rezero.data.windows import ByteDataset, collate_bytes


def add_arguments(parser: argparse.ArgumentParser, layers: int, block_size: int, steps: int, seeds: int) -> None:
    """The corpus, the sizes and the budget."""
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    sizes = {"layers": layers, "hidden_size": 64, "block_size": block_size, "batch_size": 4}
    for name, default in (sizes | {"steps": steps, "seeds": seeds}).items():
        parser.add_argument(f"--{name}", type=int, default=default)


def byte_model(config: dict, seed: int, args: argparse.Namespace) -> ReZeroForCausalLM:
    """A fresh model with two heads at the sizes of `args`."""
    torch.manual_seed(seed)
    shape = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": 2}
    return ReZeroForCausalLM(ReZeroConfig(**shape, max_position_embeddings=args.block_size, use_cache=False, **config))


def batches(text: np.ndarray, seed: int, count: int, args: argparse.Namespace) -> list[Mapping]:
    """The first batches of a random order of the windows of a text."""
    dataset = ByteDataset(text, args.block_size)
    order = np.random.default_rng(seed).permutation(len(dataset))
    rows = [order[i * args.batch_size : (i + 1) * args.batch_size] for i in range(count)]
    return [collate_bytes(dataset.__getitems__(part)) for part in rows]


def steps(model: torch.nn.Module, source: Iterable[Mapping], rate: float, warmup: int = 1) -> Iterator[float]:
    """Take a step of AdamW on each batch and give its loss in bits per byte; the rate rises over `warmup` steps."""
    optimizer = torch.optim.AdamW(param_groups(model), lr=rate, betas=(0.9, 0.95), fused=True)
    for step, batch in enumerate(source):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup)
        yield update(model, optimizer, model(**batch).loss).item() / math.log(2)


def train(model: torch.nn.Module, source: list[Mapping], rate: float, warmup: int = 1) -> dict:
    """The loss of every step up to the first that is not finite, and of the last tenth of them."""
    losses = []
    for loss in steps(model, source, rate, warmup):
        losses.append(loss)
        if not math.isfinite(loss):
            break
    return {"final": final(losses, len(source)), "curve": [round(loss, 4) for loss in losses]}


def final(losses: list[float], count: int) -> float:
    """Mean of the last tenth of the steps; infinite for a run that broke off."""
    return mean(losses[-count // 10 :]) if len(losses) == count else math.inf


def unigram_bpb(text: np.ndarray) -> float:
    """The entropy of single bytes: what a model reaches that ignores its context."""
    share = np.bincount(text, minlength=256) / len(text)
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())
