"""Whether a parameter is a residual weight, and whether weight decay applies to it."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, never to residual weights, gains, biases or other vectors."""
    return parameter.ndim >= 2


def is_resweight(name: str) -> bool:
    """Whether the parameter of this qualified name is a residual weight."""
    return name.rpartition(".")[2] == "resweight"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered from all processes if it is sharded; each of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_plain(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be cut: quantised, sharded, or without values.

    Raises:
        ValueError: The model has such a weight.
    """
    for name, parameter in model.named_parameters():
        # the tensors decide: a model read from GGUF has a quantizer and weights in floating point
        plain = type(parameter.data) is torch.Tensor and parameter.dtype in FLOATS
        if not plain or parameter.is_meta:
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__} of {parameter.dtype} on {parameter.device}: prune the "
                f"whole model in floating point first, then quantise or shard it."
            )
