"""What a trained network tells about its depth."""

import torch
from torch import nn

from .optim.param_groups import is_resweight


@torch.no_grad()
def resweight_profile(model: nn.Module) -> dict[str, float]:
    """The residual weights of a model by parameter name, in the order of depth; empty where it has none.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZero
        >>> from hf_rezero.diagnostics import resweight_profile
        >>> resweight_profile(torch.nn.Sequential(ReZero(torch.nn.Linear(2, 2)), ReZero(torch.nn.Linear(2, 2))))
        {'0.resweight': 0.0, '1.resweight': 0.0}
    """
    return {name: p.item() for name, p in model.named_parameters() if is_resweight(name)}
