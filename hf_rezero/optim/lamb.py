"""LAMB: Adam with steps in proportion to the norm of each layer's weights."""

import torch
from torch import Tensor

from .adamw import adam_state, adamw_, check_hyperparameters
from .foreach import WholeMatrices, buckets, evaluate, gradients, norms, scale_


@torch.no_grad()
def trust_scaled_(params: list[Tensor], updates: list[Tensor], lr: float, weight_decay: float) -> None:
    """p <- p - lr |p| / |u + wd p| (u + wd p) for each tensor; the ratio is 1 where a norm is zero.

    You et al. 2020 (arXiv:1904.00962), algorithm 2, with the norm of the update, not of the new weights.

    Args:
        params: Weights w.
        updates: u; overwritten.
        lr: Learning rate.
        weight_decay: wd.
    """
    if weight_decay:
        torch._foreach_add_(updates, params, alpha=weight_decay)
    weight_norms, update_norms = norms(params), norms(updates)
    ratios = torch.where((weight_norms > 0) & (update_norms > 0), weight_norms / update_norms, 1.0)
    scale_(updates, -lr * ratios)
    torch._foreach_add_(params, updates)


class LAMB(WholeMatrices):
    """Layer-wise adaptive Adam for large batches (You et al. 2020, arXiv:1904.00962).

    Tensors with fewer than two dimensions, that is biases, gains and residual weights, take the plain step of Adam
    without decay: with steps in proportion to its norm, a gate at zero would never open.

    Args:
        params: Parameters or groups.
        lr: Learning rate, the relative change of each weight matrix in a step.
        betas: Decay of the first and of the second moment.
        eps: Added to the corrected root of the second moment.
        weight_decay: Added to the update before its norm is taken.
        fused: False for the foreach path; None takes the fused kernel wherever torch has one.

    Raises:
        ValueError: A hyper-parameter is out of its range, or FSDP1 or DeepSpeed has flattened the parameters.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LAMB(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        fused: bool | None = None,
    ):
        check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride] torch has overloads
        """Update every parameter that has a gradient; returns the loss of the closure."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for step, params in buckets(group, self.state, adam_state):
                lamb_(params, gradients(params), [self.state[p] for p in params], step, group)
        return loss


def lamb_(params, grads, states, step: int, group: dict, rectification: float = 1.0) -> None:
    """One step of LAMB on a list of tensors, either all matrices or all vectors, shortened by `rectification`."""
    lr, options = group["lr"] * rectification, {key: group[key] for key in ("betas", "eps", "fused")}
    if params[0].ndim < 2:
        return adamw_(params, grads, states, step=step, lr=lr, weight_decay=0.0, **options)
    updates = [torch.zeros_like(p) for p in params]
    # at lr = -1 AdamW takes zeros to its update m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    adamw_(updates, grads, states, step=step, lr=-1.0, weight_decay=0.0, **options)
    trust_scaled_(params, updates, lr, group["weight_decay"])
