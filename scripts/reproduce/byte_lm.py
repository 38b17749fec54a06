"""Training of byte models under one budget, for the comparisons of this folder: same batches, same schedule, test bits per byte."""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from record import provenance, read_json, write_json
from torch import nn

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, grow_, load_corpus, param_groups
from hf_rezero.data import ByteDataset, collate_bytes, evaluation_windows


PLAIN = {"resweight_init": 1.0, "resweight_trainable": False}
STRIDE = 10


def add_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """The corpus, the sizes and the budget."""
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "block_size": 128, "batch_size": 4, "seeds": 2, "threads": 1}
    for name, default in (sizes | defaults).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--windows", type=int, default=512, help="of the test text, spread over all of it")


def train(config: dict, stages: Sequence[tuple[int, int]], rate: float, seed: int, args: argparse.Namespace) -> dict:
    """Train through stages of (layers, steps), grown from one to the next, and score the test text.

    AdamW, gradients clipped to 1, no warmup; the learning rate falls linearly to 0 over the last 30 % of the layer
    passes. `curve` has layer passes, seconds and the mean training loss of every `STRIDE` steps in bits per byte.
    """
    torch.manual_seed(seed)
    shape = {name: getattr(args, name) for name in ("hidden_size", "num_attention_heads")}
    shape |= {"max_position_embeddings": args.block_size, "num_hidden_layers": stages[0][0], "use_cache": False}
    model = ReZeroForCausalLM(ReZeroConfig(**shape | config))
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), rate, betas=(0.9, 0.95), fused=True)
    total, passes, start = sum(layers * steps for layers, steps in stages), 0, time.perf_counter()
    batches, losses, curve = row_batches(args, sum(steps for _, steps in stages), seed), [], []
    for layers, steps in stages:
        if layers > len(model.model.layers):
            grow_(model, layers - len(model.model.layers), optimizer=optimizer)
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (total - passes) / (0.3 * total))
            losses.append(step(model, optimizer, next(batches), args))
            passes += layers
            if not math.isfinite(losses[-1]):
                return {"curve": curve, "test": math.inf}
            if len(losses) % STRIDE == 0:
                curve.append([passes, round(time.perf_counter() - start, 1), round(mean(losses[-STRIDE:]), 4)])
    return {"curve": curve, "test": round(evaluate(model, args), 4), "seconds": curve[-1][1]}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: np.ndarray, args: argparse.Namespace) -> float:
    """One step; returns the loss in bits per byte."""
    loss = model(**collate_bytes(args.dataset.__getitems__(rows))).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item() / math.log(2)


def row_batches(args: argparse.Namespace, steps: int, seed: int):
    """The rows of each step, in a new order for each pass."""
    rng, count = np.random.default_rng(seed), len(args.dataset)
    order = np.concatenate([rng.permutation(count) for _ in range(math.ceil(steps * args.batch_size / count))])
    yield from order[: steps * args.batch_size].reshape(steps, args.batch_size)


@torch.no_grad()
def evaluate(model: nn.Module, args: argparse.Namespace) -> float:
    """Bits per byte of windows from all over the test text, each byte but the first ones behind half a block."""
    model.eval()
    windows = evaluation_windows(args.corpus.test, args.block_size, args.block_size // 2)
    total = count = 0
    rows = np.linspace(0, len(windows) - 1, min(args.windows, len(windows)), dtype=int)
    for part in np.array_split(rows, math.ceil(len(rows) / 64)):
        batch = collate_bytes(windows.__getitems__(part))
        scored = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).loss.item() * scored, count + scored
    return total / count / math.log(2)


def run_grid(arms: dict[str, Callable[[float, int], dict]], rates: Sequence[float], args: argparse.Namespace) -> dict:
    """Each arm over the learning rates on seed 0, then at its best one on the other seeds; goes on where it stopped."""
    torch.set_num_threads(args.threads)
    args.corpus = load_corpus(args.train_file)
    args.dataset = ByteDataset(args.corpus.train, args.block_size)
    results = read_json(args.output) or {"runs": {}, "best": {}}
    hidden = ("corpus", "dataset", "output", "figure", "train_file")
    results["settings"] = {name: value for name, value in vars(args).items() if name not in hidden}
    results["settings"]["corpus"] = Path(args.train_file).name

    def run(arm: str, rate: float, seed: int) -> float:
        key = f"{arm} | lr={rate:g} | seed={seed}"
        if key not in results["runs"]:
            results["runs"][key] = arms[arm](rate, seed)
            results["provenance"] = provenance()
            write_json(args.output, results)
            print(f"{key}: {results['runs'][key]['test']} in {results['runs'][key].get('seconds')} s", flush=True)
        return results["runs"][key]["test"]

    for arm in arms:
        best = min(rates, key=lambda rate: run(arm, rate, 0))
        tests = [run(arm, best, seed) for seed in range(args.seeds)]
        results["best"][arm] = {"learning_rate": best, "test": tests, "mean": round(mean(tests), 4)}
        write_json(args.output, results)
    return results
