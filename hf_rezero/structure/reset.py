"""Fresh random weights."""

from collections.abc import Callable

import torch
from torch import nn


@torch.no_grad()
def reinitialize_(model: nn.Module, init_weights: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Draw new random weights in the present shapes of a model, to train a pruned net from scratch.

    Args:
        model: Changed in place.
        init_weights: Fills a module; default: `model._init_weights` of transformers, or else `reset_parameters`.
    """
    init_weights = init_weights or getattr(model, "_init_weights", None)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = False  # transformers does not initialise tensors that it has loaded
        if init_weights is not None:
            init_weights(module)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return model
