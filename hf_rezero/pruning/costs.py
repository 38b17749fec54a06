"""What a weight costs besides memory: its uses (FLOPs / 2) or the seconds that its module takes."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn

from ..structure.modules import is_conv1d, output_dim
from .activations import output_of


def weight_uses(model: nn.Module, batch: Any) -> dict[str, float]:
    """How many products each weight of a linear layer or convolution takes part in on this batch, by module name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hf_rezero.pruning import weight_uses
        >>> weight_uses(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), torch.ones(1, 3, 5, 5))
        {'0': 25.0}
    """
    uses: dict[str, float] = defaultdict(float)

    def count(name: str, module: nn.Module, output: torch.Tensor) -> None:
        features = module.weight.shape[output_dim(module)]
        uses[name] += output.numel() / features

    with _after(model, count):
        output_of(model, batch)
    return dict(uses)


def weight_seconds(model: nn.Module, batch: Any, repeats: int = 5) -> dict[str, float]:
    """Seconds of each linear layer or convolution on this batch, divided by its weights, by module name.

    It is the median of `repeats` passes, after one that does not count.
    """
    started: dict[str, float] = {}
    seconds: dict[str, list[float]] = defaultdict(list)

    def stop(name: str, module: nn.Module, output: torch.Tensor) -> None:
        _synchronize(output)
        seconds[name].append((time.perf_counter() - started[name]) / module.weight.numel())

    def start(name: str):
        def hook(module, args):
            _synchronize(args[0])
            started[name] = time.perf_counter()

        return hook

    starts = [module.register_forward_pre_hook(start(name)) for name, module in _weighted(model)]
    try:
        with _after(model, stop):
            for _ in range(repeats + 1):
                output_of(model, batch)
    finally:
        for handle in starts:
            handle.remove()
    return {name: median(times[len(times) // (repeats + 1) :]) for name, times in seconds.items()}


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _weighted(model: nn.Module):
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(module):
            yield name, module


@contextmanager
def _after(model: nn.Module, observe: Callable[[str, nn.Module, torch.Tensor], None]):
    def hook(name: str):
        return lambda module, args, output: observe(name, module, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in _weighted(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
