"""Which parameters are decayed, and at which learning rate the residual weights move: one policy for every loop."""

from torch import nn


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, never to residual weights, gains, biases or other vectors."""
    return parameter.ndim >= 2


def is_resweight(name: str) -> bool:
    """Whether the parameter of this qualified name is a residual weight."""
    return name.rpartition(".")[2] == "resweight"


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, resweight_learning_rate: float | None = None
) -> list[dict]:
    """Split the trainable parameters into the groups that a torch optimizer takes, the decayed matrices first.

    Args:
        model: Any module.
        weight_decay: Decay of the tensors with two or more dimensions; the others get 0.
        resweight_learning_rate: Own learning rate of the residual weights; `None` leaves it to the optimizer.

    Returns:
        Up to three groups, without empty ones: matrices, vectors, residual weights.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZero, param_groups
        >>> groups = param_groups(ReZero(torch.nn.Linear(4, 4)), weight_decay=0.1, resweight_learning_rate=0.01)
        >>> [(len(group["params"]), group["weight_decay"], group.get("lr")) for group in groups]
        [(1, 0.1, None), (1, 0.0, None), (1, 0.0, 0.01)]
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    resweights = {"params": [p for name, p in named if is_resweight(name)], "weight_decay": 0.0}
    if resweight_learning_rate is not None:
        resweights["lr"] = resweight_learning_rate
    rest = [p for name, p in named if not is_resweight(name)]
    groups = [
        {"params": [p for p in rest if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in rest if not decays(p)], "weight_decay": 0.0},
        resweights,
    ]
    return [group for group in groups if group["params"]]
