"""Training and evaluation mode, module by module."""

from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module):
    """Give every module its own mode back at the end, also after an error: a frozen batch norm stays in eval mode.

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
