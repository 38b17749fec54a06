"""Modules by name, and which side of a weight is which."""

from torch import nn


BATCH_NORM = nn.modules.batchnorm._BatchNorm


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule of this dotted name, or None."""
    for part in name.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module


def output_dim(module: nn.Module) -> int:
    """The dimension of the weight that counts the outputs; `Conv1D` of transformers has inputs first."""
    return 1 if type(module).__name__ == "Conv1D" else 0


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
