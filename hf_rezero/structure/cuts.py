"""The entries of a tensor that belong to a unit."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .modules import output_dim


class Cut(NamedTuple):
    """Unit i owns the entries from `offset + i * size` to `offset + (i + 1) * size` of dimension `dim` of a tensor."""

    tensor: str
    dim: int
    size: int = 1
    offset: int = 0


def rows(name: str, module: nn.Module, size: int = 1, offset: int = 0) -> Iterator[Cut]:
    """The entries that produce outputs: of the weight, and of the bias where there is one."""
    yield Cut(f"{name}.weight", output_dim(module), size, offset)
    if module.bias is not None:
        yield Cut(f"{name}.bias", 0, size, offset)


def columns(name: str, module: nn.Module, size: int = 1) -> Cut:
    """The entries that read inputs, of the weight."""
    return Cut(f"{name}.weight", 1 - output_dim(module), size)
