"""Context managers that restore what a block changes, even after an error: modes of modules, and random states."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module):
    """Restore the mode of every module at the end, even after an error; a frozen batch norm stays in eval mode.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
        >>> with modes_kept(net):
        ...     _ = net.eval()
        >>> [module.training for module in net]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_numbers_kept(cuda_devices: Sequence[torch.device] | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch at the end, by default on all CUDA devices."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(cuda_devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
