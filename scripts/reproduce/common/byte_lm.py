"""Training of byte models under one budget, for the comparisons of this folder: same batches, same schedule, test bits per byte."""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.curves import STRIDE
from common.record import once, read_json, write_json
from hf_rezero import grow_, load_corpus, param_groups
from hf_rezero.data.units import NUM_BYTES
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows
from hf_rezero.files import written_whole


def add_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """The corpus, the sizes, the budget and the device."""
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "block_size": 128, "batch_size": 4, "seeds": 2, "threads": 1}
    for name, default in (sizes | defaults).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--windows", type=int, default=512, help="of the test text, spread over all of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--compile", action="store_true", help="compile one layer, reused for all")
    parser.add_argument("--checkpoint_steps", type=int, default=0, help="a killed run goes on from the last multiple")


def build_model(config: dict, layers: int, args: argparse.Namespace) -> nn.Module:
    """A causal model of `config["model_type"]`, ReZero without one, at the sizes of `args`."""
    sizes = {name: getattr(args, name) for name in ("hidden_size", "num_attention_heads")}
    sizes |= {"max_position_embeddings": args.block_size, "num_hidden_layers": layers, "use_cache": False}
    made = AutoConfig.for_model(**{"model_type": "rezero", "vocab_size": 264, **sizes, **config})
    model = AutoModelForCausalLM.from_config(made).to(args.device)
    if args.compile:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile()
    return model


def adamw(
    model: nn.Module, rate: float, weight_decay: float = 0.1, resweight_factor: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all comparisons that are not about optimizers; residual weights may have a rate of their own."""
    own_rate = rate * resweight_factor if resweight_factor else None
    groups = param_groups(model, weight_decay=weight_decay, resweight_learning_rate=own_rate)
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.95), fused=True)


def train(
    config: dict,
    stages: Sequence[tuple[int, int]],
    rate: float,
    seed: int,
    args: argparse.Namespace,
    warmup: float = 0,
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw,
    inspect: Callable[[nn.Module, argparse.Namespace], dict] = lambda model, args: {},
) -> dict:
    """Train through stages of (layers, steps), grown from one to the next, and score the test text.

    Gradients are clipped to 1; the learning rate rises over the share `warmup` of the layer passes and falls to 0 over
    their last 30 %. `curve` has layer passes, seconds and the mean training loss of every `STRIDE` steps in bits per byte;
    what `inspect` finds in the trained model joins them.
    """
    torch.manual_seed(seed)
    model = build_model(config, stages[0][0], args)
    optimizer = make_optimizer(model, rate)
    depths = [layers for layers, steps in stages for _ in range(steps)]
    ends, total, depth = np.cumsum(depths), sum(depths), depths[0]
    saved, run = read_checkpoint(args), {"curve": [], "seconds": 0.0}
    recent, start = [], time.perf_counter()
    for index, rows in enumerate(row_batches(args, len(depths), seed)):
        if depths[index] > depth:
            depth += len(grow_(model, depths[index] - depth, optimizer=optimizer))
        if index < saved.get("step", 0):
            continue
        if index == saved.get("step"):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            run, start = saved["run"], time.perf_counter() - saved["run"]["seconds"]
        passes = int(ends[index])
        rising = passes / (warmup * total) if warmup else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * min(
                1.0, rising, (total - passes + depth) / (0.3 * total)
            )
        recent.append(step(model, optimizer, rows, args))
        if (index + 1) % STRIDE == 0:
            loss, recent = float(torch.stack(recent).mean()) / math.log(2), []
            if not math.isfinite(loss):
                return run | {"test": math.inf}
            run["seconds"] = round(time.perf_counter() - start, 1)
            run["curve"].append([passes, run["seconds"], round(loss, 4)])
            if args.checkpoint_steps and (index + 1) % args.checkpoint_steps == 0:
                write_checkpoint(args, index + 1, model, optimizer, run)
    return run | {"test": round(evaluate(model, args), 4)} | inspect(model, args)


def read_checkpoint(args: argparse.Namespace) -> dict:
    """What `write_checkpoint` left of the run `args.key` with these settings, empty if it left none."""
    path = args.output.with_suffix(".pt")
    saved = torch.load(path, map_location=args.device, weights_only=True) if path.exists() else {}
    return saved if saved.get("of") == [args.key, str(settings_of(args))] else {}


def write_checkpoint(args, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict) -> None:
    """Write the state after so many steps beside the result file; the next run replaces it."""
    path = args.output.with_suffix(".pt")
    state = {
        "of": [args.key, str(settings_of(args))],
        "step": steps,
        "run": run,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with written_whole(path) as temporary:
        torch.save(state, temporary)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: np.ndarray, args: argparse.Namespace
) -> torch.Tensor:
    """One step on some rows of the corpus; returns the loss in nats, on its device."""
    return update(model, optimizer, forward(model, collate_bytes(args.dataset.__getitems__(rows)), args).loss)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """One step along the gradients of a loss, clipped to 1; returns the loss."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def step_seconds(made: dict[str, tuple], args: argparse.Namespace, rounds: int) -> dict[str, float]:
    """Median time of one training step of each (model, optimizer), taken in turn."""
    times = {name: [] for name in made}
    for rows in row_batches(args, rounds + 1, seed=0):
        for name, (model, optimizer) in made.items():
            start = time.perf_counter()
            step(model, optimizer, rows, args).item()
            times[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in times.items()}


def forward(model: nn.Module, batch: dict[str, torch.Tensor], args: argparse.Namespace):
    """The output of the model for a batch, on the device and in the precision of `args`."""
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
        return model(**batch)


def row_batches(args: argparse.Namespace, steps: int, seed: int):
    """The rows of each step, in a new order for each pass."""
    rng, count = np.random.default_rng(seed), len(args.dataset)
    order = np.concatenate([rng.permutation(count) for _ in range(math.ceil(steps * args.batch_size / count))])
    yield from order[: steps * args.batch_size].reshape(steps, args.batch_size)


@torch.no_grad()
def evaluate(model: nn.Module, args: argparse.Namespace) -> float:
    """Bits per byte of windows from all over the test text, each byte but the first ones behind half a block.

    Of windows that a claim gives as `args.scored`, of tokens maybe, all are scored.
    """
    model.eval()
    scored = getattr(args, "scored", None)
    windows = scored or evaluation_windows(args.corpus.test, args.block_size, args.block_size // 2)
    count = len(windows) if scored else min(args.windows, len(windows))
    return bits_per_byte(lambda batch: forward(model, batch, args).loss, windows, count, math.ceil(count / 64))


def bits_per_byte(loss: Callable[[dict], torch.Tensor], windows: ByteDataset, count: int, parts: int) -> float:
    """The loss of `count` windows from all over a text, in some batches, each weighted by what it scores, by its bytes."""
    total = num_bytes = 0
    for rows in np.array_split(np.linspace(0, len(windows) - 1, count, dtype=int), parts):
        batch = collate_bytes(windows.__getitems__(rows))
        weight = int((batch["labels"] != -100).sum())
        num_bytes += int(batch.pop(NUM_BYTES).sum()) if NUM_BYTES in batch else weight
        total += loss(batch).item() * weight
    return total / num_bytes / math.log(2)


def load_text(args: argparse.Namespace) -> None:
    """Give `args` the corpus and its windows."""
    torch.set_num_threads(args.threads)
    args.corpus = load_corpus(args.train_file)
    args.dataset = ByteDataset(args.corpus.train, args.block_size)


MORE_RUNS = {"arms", "seeds", "learning_rates", "threads", "checkpoint_steps"}  # settings that change no run


def settings_of(args: argparse.Namespace) -> dict:
    """All arguments that a result file records."""
    hidden = ("corpus", "dataset", "scored", "output", "figure", "train_file", "key", "rates_of")
    return {name: value for name, value in vars(args).items() if name not in hidden} | {
        "corpus": Path(args.train_file).name
    }


def run_grid(
    arms: dict[str, Callable[[float, int], dict]],
    rates: Sequence[float],
    args: argparse.Namespace,
    start: Callable[[str, dict], float] | None = None,
) -> dict:
    """Each arm over the learning rates on seed 0, then at its best one on the other seeds; goes on where it stopped.

    With `start`, which is given the arm and the best rates so far, an arm goes from there to the better neighbour while
    there is one.
    """
    load_text(args)
    results = read_json(args.output) or {"runs": {}, "best": {}}
    settings = settings_of(args)
    for name in sorted(results.get("settings", {}).keys() - MORE_RUNS):
        if results["settings"][name] != settings.get(name):
            raise SystemExit(
                f"{args.output} has runs with {name}={results['settings'][name]}, now it is {settings.get(name)}: "
                "give the old value, or another --output"
            )
    results["settings"] = settings

    def run(arm: str, rate: float, seed: int) -> float:
        args.key = f"{arm} | lr={rate:g} | seed={seed}"
        return once(args.output, results, args.key, lambda: arms[arm](rate, seed))["test"]

    for arm in arms:
        by_rate = partial(run, arm, seed=0)
        best = walk_down(rates, by_rate, start(arm, results["best"])) if start else min(rates, key=by_rate)
        tests = [run(arm, best, seed) for seed in range(args.seeds)]
        results["best"][arm] = {"learning_rate": best, "test": tests, "mean": round(mean(tests), 4)}
        write_json(args.output, results)
    args.output.with_suffix(".pt").unlink(missing_ok=True)
    return results


def walk_down(rates: Sequence[float], key: Callable[[float], float], start: float) -> float:
    """A rate whose neighbours are no better, found from the one next to `start`: the best where `key` has one minimum."""
    place = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / start)))
    while True:
        near = [i for i in (place, place - 1, place + 1) if 0 <= i < len(rates)]
        best = min(near, key=lambda i: key(rates[i]))
        if best == place:
            return rates[place]
        place = best
