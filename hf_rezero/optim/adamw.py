"""The AdamW update of a list of tensors, in one fused kernel where there is one."""

import math

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from .arguments import are_numbers
from .foreach import lie_alike


def adam_state(p: Tensor) -> dict:
    """No steps, and moments of zero."""
    return {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool | None = None,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2) on tensors of one type and device, in place.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- (1 - lr wd) p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params: The tensors to update.
        grads: The gradients.
        states: One dict for each parameter, with `exp_avg` and `exp_avg_sq`.
        step: t, which starts at 1 and counts this step.
        lr: Learning rate.
        betas: b1, b2.
        eps: Added to the corrected root.
        weight_decay: Decoupled.
        fused: True, False, or None to take the fused kernel wherever torch has one. It is never used on tensors that lie
            in memory in different orders, where it would pair the wrong numbers.
    """
    exp_avgs = [state["exp_avg"] for state in states]
    exp_avg_sqs = [state["exp_avg_sq"] for state in states]
    may_fuse = has_fused_kernel(params[0]) if fused is None else fused
    update = _fused if may_fuse and lie_alike(params, grads, exp_avgs, exp_avg_sqs) else _foreach
    update(params, grads, exp_avgs, exp_avg_sqs, step, lr, *betas, weight_decay, eps)


def has_fused_kernel(p: Tensor) -> bool:
    """Whether torch has a fused AdamW kernel for tensors like this one."""
    return p.device.type in _get_fused_kernels_supported_devices() and torch.is_floating_point(p)


def _fused(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, weight_decay, eps):
    steps = [torch.full((), step, dtype=torch.float32, device=params[0].device)] * len(params)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _foreach(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, weight_decay, eps):
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1**step))


def check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Refuse hyper-parameters with which no Adam can work."""
    if not (isinstance(betas, (tuple, list)) and are_numbers(lr, *betas, eps, weight_decay)) or not (
        lr >= 0 and eps >= 0 and weight_decay >= 0 and len(betas) == 2 and all(0 <= b < 1 for b in betas)
    ):
        raise ValueError(
            f"got lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: expected finite lr, eps and "
            f"weight_decay of at least 0 and two betas in [0, 1)."
        )
