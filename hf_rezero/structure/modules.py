"""Modules by name, and which dimension of a weight counts its outputs."""

import copy
from typing import Any

from torch import nn


BATCH_NORM = nn.modules.batchnorm._BatchNorm


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule of this dotted name, or None."""
    found: nn.Module | None = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether a module is the `Conv1D` of transformers or made from it."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def output_dim(module: nn.Module) -> int:
    """The dimension of the weight that counts the outputs; `Conv1D` of transformers has inputs first."""
    return 1 if is_conv1d(module) else 0


def join(*parts: str) -> str:
    """A dotted name of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer, of torch or the `Conv1D` of transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def config_of(model: nn.Module) -> Any:
    """The config of a Hugging Face model; None for any other module."""
    return getattr(model, "config", None)


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy that shares the configs."""
    configs = [config for part in module.modules() if (config := config_of(part)) is not None]
    return copy.deepcopy(module, {id(config): config for config in configs})


def can_lack_sublayers(model: nn.Module) -> bool:
    """Whether the config of the model can say that a layer has no attention or no feed-forward sublayer."""
    return getattr(model, "_supports_per_layer_config", False)


def provenance_of(model: nn.Module) -> dict | None:
    """The record of what was pruned from a model: from its config, or from the model itself if it has no config."""
    config = config_of(model)
    return getattr(model, "pruned", None) if config is None else getattr(config, "pruning", None)
