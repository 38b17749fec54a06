"""What an iteration of GradInit costs, in training steps of the same batch: time and peak memory.

    python scripts/reproduce/run.py gradinit_cost

On a ReZero language model and on a convolutional network with BatchNorm, in interleaved rounds: a training step
(forward, backward, optimizer), an iteration that takes the objective branch, one that takes the constraint branch by
finite difference and by double backward, and, on the convolutional network, the two branches of the official procedure,
which builds the second-order graph every time. The ratio is the median over the rounds of (iteration / training step of
the same round). Peak memory is that of torch's allocator, weights and optimizer state included.

The last figure is what 390 iterations cost in epochs of enwik8, 90 MB of bytes, at the given tokens a step.
"""

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from common.record import RESULTS, save
from hf_rezero import ReZeroConfig, ReZeroForCausalLM
from hf_rezero.initialization.gradinit import GradInit, half_overlap


TARGETS = {"time": 2.0, "memory": 1.4}  # at most, in training steps
NEVER, ALWAYS = 1e30, 1e-30  # values of gamma: the constraint is active ...


def language_model(args: argparse.Namespace) -> tuple[nn.Module, list, None, str]:
    """The model, two batches, the loss (that of the model) and the optimizer of the training to come."""
    config = ReZeroConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        resweight_init=0.1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    ids = [torch.randint(0, 256, (args.batch_size, args.block_size), device=args.device) for _ in range(2)]
    return ReZeroForCausalLM(config), [{"input_ids": x, "labels": x} for x in ids], None, "adam"


def conv_net(args: argparse.Namespace) -> tuple[nn.Module, list, Callable, str]:
    """VGG-like: pairs of convolutions with BatchNorm, each pair at half the resolution and twice the width."""
    layers, channels = [], 3
    for width in (args.width, 2 * args.width, 4 * args.width):
        for _ in range(args.convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    sizes = (args.images, 3, args.image_size, args.image_size)
    batches = [
        (torch.randn(sizes, device=args.device), torch.randint(0, 10, sizes[:1], device=args.device)) for _ in range(2)
    ]
    return model, batches, image_loss, "sgd_normalized"


def image_loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Cross-entropy of a batch of images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def training_step(model: nn.Module, batch, loss_fn: Callable | None, algorithm: str) -> tuple[Callable, list]:
    """A function that trains on the batch, and the tensors that live between two steps."""
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if algorithm == "adam" else sgd

    def step():
        loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the state of the optimizer
    state = [value for s in optimizer.state.values() for value in s.values() if isinstance(value, torch.Tensor)]
    return step, state


def official_iteration(model: nn.Module, batch: tuple, trial: tuple, eta: float, gamma: float) -> None:
    """The loop body of the official code for SGD, on `nn.Parameter`s in place; the scales themselves cost nothing."""
    params = list(model.parameters())
    grads = torch.autograd.grad(image_loss(model, batch), params, create_graph=True)
    norm = sum(g.square().sum() for g in grads).sqrt()
    if norm > gamma:
        norm.backward()
    else:
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p.sub_(g / norm, alpha=eta)
        (image_loss(model, trial) / eta).backward()
        with torch.no_grad():
            for p, w in zip(params, kept, strict=True):
                p.copy_(w)
    with torch.no_grad():
        for p in params:
            p.grad.mul(p).sum()  # the gradient of the scale
            p.grad = None


def iterations(build: Callable, args: argparse.Namespace) -> tuple[nn.Module, dict[str, tuple[Callable, list]]]:
    """By name: a function that does one iteration, and the tensors beside the weights that live between two of them."""
    torch.manual_seed(0)
    model, (batch, fresh), loss_fn, algorithm = build(args)
    model.to(args.device).train()
    (trial,) = half_overlap(batch, fresh)

    def ours(gamma: float, second_order: str = "finite_difference") -> tuple[Callable, list]:
        init = GradInit(
            model,
            eta=1e-3,
            gamma=gamma,
            algorithm=algorithm,
            loss_fn=loss_fn,
            second_order=second_order,
            scale_lr=1e-6,
        )
        return lambda: init.step(batch, [trial]), []

    found = {
        "training step": training_step(model, batch, loss_fn, algorithm),
        "objective": ours(NEVER),
        "constraint, finite difference": ours(ALWAYS),
        "constraint, double backward": ours(ALWAYS, "double_backward"),
    }
    if loss_fn:
        found["official, objective"] = (lambda: official_iteration(model, batch, trial, 1e-3, NEVER), [])
        found["official, constraint"] = (lambda: official_iteration(model, batch, trial, 1e-3, ALWAYS), [])
    return model, found


def seconds(iteration: Callable, device: str) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    iteration()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(iteration: Callable, resident: list[torch.Tensor], device: str) -> int:
    """The most that the allocator held during a call, with the resident tensors."""
    held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in resident}.values())
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        iteration()
        return torch.cuda.max_memory_allocated() - before + held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        iteration()
    # The profiler's table has sums only; the events have every allocation (> 0) and release (< 0) in time.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak + held


def measure(build: Callable, args: argparse.Namespace) -> dict:
    """Ratios to a training step of all iterations on one model."""
    model, found = iterations(build, args)
    weights = [*model.parameters(), *model.buffers()]
    rounds = {name: [] for name in found}
    for round_ in range(args.rounds + 1):
        # in another order each time: what an iteration leaves in the allocator slows or speeds the next one
        for name, (iteration, _) in random.Random(round_).sample(list(found.items()), len(found)):
            took = seconds(iteration, args.device)
            if round_ > 0:  # the first call sets up kernels and caches
                rounds[name].append(took)
    memory = {name: peak_bytes(iteration, weights + own, args.device) for name, (iteration, own) in found.items()}
    steps = rounds["training step"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_step": {"seconds": median(steps), "peak_mib": memory["training step"] / 2**20},
        "ratios": {
            name: {
                "time": round(median(a / b for a, b in zip(rounds[name], steps, strict=True)), 3),
                "memory": round(memory[name] / memory["training step"], 3),
            }
            for name in found
            if name != "training step"
        },
        "seconds": {name: [round(s, 4) for s in values] for name, values in rounds.items()},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--width", type=int, default=32, help="channels of the first pair of convolutions")
    parser.add_argument("--convolutions", type=int, default=2, help="convolutions at each of 3 resolutions")
    parser.add_argument("--images", type=int, default=64, help="images per batch")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens_per_step", type=int, default=32_768, help="for the share of an epoch of enwik8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="gradinit_cost.json", help="file name in results/")
    return parser.parse_args()


def table(results: dict) -> list[list[str]]:
    """One row for each kind of iteration, time and memory for each model."""
    models = list(results["models"])
    rows = [
        ["one iteration, in training steps", *(f"{model}: {what}" for model in models for what in ("time", "memory"))]
    ]
    for name in dict.fromkeys(name for model in models for name in results["models"][model]["ratios"]):
        found = [results["models"][model]["ratios"].get(name) for model in models]
        cells = (f"{ratios[what]:.2f}" if ratios else "" for ratios in found for what in ("time", "memory"))
        rows.append([name, *cells])
    return rows


def main() -> None:
    """Measure both models, print the ratios beside the targets, write the result file."""
    args = parse_args()
    torch.set_num_threads(1)
    models = {"ReZero language model": language_model, "convolutional network": conv_net}
    results = {name: measure(build, args) for name, build in models.items()}
    for name, result in results.items():
        print(f"{name}, {result['parameters']:,} parameters, {result['training_step']['seconds']:.3f} s a step")
        for iteration, ratio in result["ratios"].items():
            print(f"    {iteration:32} time x {ratio['time']:.2f}   memory x {ratio['memory']:.2f}")
    ratios = results["ReZero language model"]["ratios"]
    dearest = max(ratios[name]["time"] for name in ("objective", "constraint, finite difference"))
    epochs = 390 * dearest / (90_000_000 / args.tokens_per_step)
    print(f"390 iterations: {epochs:.2f} epochs of enwik8 at {args.tokens_per_step} tokens a step")
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    content = {"settings": settings, "targets": TARGETS, "models": results}
    save(RESULTS / args.output, {**content, "epochs_of_enwik8_for_390_iterations": round(epochs, 3)})
