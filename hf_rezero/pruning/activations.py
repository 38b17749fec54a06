"""What a model computes on data: outputs, the values of units, the statistics of batch norm."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..structure.kept import modes_kept
from ..structure.modules import BATCH_NORM
from .groups import PruningGroup


@torch.no_grad()
def output_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """What the model predicts in eval mode for a tensor, or for keyword arguments: its logits or its first output."""
    with modes_kept(model):
        model.eval()
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


@torch.no_grad()
def recalibrate_batchnorm_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measure the running statistics of every batch norm anew, as plain means over the batches.

    Noisy gates change the variances that enter the statistics, so do this once the masks are decided.

    Raises:
        ValueError: No batch was given.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        try:
            for batch in batches:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
                seen += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not seen and norms:
        raise ValueError("got no batches: the running statistics of batch norm need at least one.")


@contextmanager
def watch_readers(model: nn.Module, groups: Sequence[PruningGroup], observe: Callable[[str, torch.Tensor], None]):
    """Call `observe(group name, values (positions, units x size))` whenever the first reader of a group runs."""

    def hook(name: str):
        def observe_input(module, args):
            is_conv = isinstance(module, nn.modules.conv._ConvNd)
            x = args[0].movedim(1, -1) if is_conv else args[0]
            observe(name, x.detach().flatten(0, -2))

        return observe_input

    readers = [(group.name, group.readers[0].tensor.rpartition(".")[0]) for group in groups if group.readers]
    handles = [model.get_submodule(module).register_forward_pre_hook(hook(name)) for name, module in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_activations(
    model: nn.Module, groups: Sequence[PruningGroup], batches: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """The mean value of each entry of each unit where it is read, (units x size,) by group; see `prune_`.

    Adding the mean contribution of removed units to a bias replaces a constant unit exactly, except at the border of
    zero-padded convolutions.
    """
    sums, counts = defaultdict(float), defaultdict(int)

    def observe(name: str, x: torch.Tensor) -> None:
        sums[name] = sums[name] + x.double().sum(0)
        counts[name] += len(x)

    with watch_readers(model, groups, observe):
        for batch in batches:
            output_of(model, batch)
    return {name: (total / counts[name]).float() for name, total in sums.items()}
