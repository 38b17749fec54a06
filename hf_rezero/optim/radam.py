"""RAdam: Adam that waits until its second moment can be trusted."""

import math

import torch

from .adamw import adam_state, adamw_, check_hyperparameters
from .foreach import buckets, evaluate, gradients
from .loading import CheckedOptimizer


def huge(dtype: torch.dtype) -> float:
    """An eps beside which Adam's sqrt(v) vanishes; with a learning rate as large, the step follows the momentum alone."""
    return min(1e12, torch.finfo(dtype).max / 2)


def rectification(step: int, beta2: float) -> float:
    """The r_t by which RAdam shortens the step of Adam; 0 while the variance is intractable, rho_t <= 5.

    r_t = sqrt((rho_t - 4)(rho_t - 2) rho / ((rho - 4)(rho - 2) rho_t)), rho = 2 / (1 - b2) - 1,
    rho_t = rho - 2 t b2^t / (1 - b2^t)   (Liu et al. 2020, algorithm 2).

    Example:
        >>> [round(rectification(t, 0.999), 4) for t in (1, 5, 6, 1000)]
        [0.0, 0.0, 0.0258, 0.6453]
    """
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= 5:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def as_adamw(group: dict, step: int, dtype: torch.dtype) -> dict:
    """The scalars with which AdamW takes the step of RAdam.

    lr r_t sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps) is AdamW's step at lr' = lr r_t, eps' = eps / sqrt(1 - b2^t);
    the decay stays lr wd with wd' = wd / r_t. Below the threshold the step is lr m / (1 - b1^t), or nothing.
    """
    lr, beta2, wd = group["lr"], group["betas"][1], group["weight_decay"]
    r = rectification(step, beta2)
    if r > 0:
        return {"lr": lr * r, "weight_decay": wd / r, "eps": group["eps"] / math.sqrt(1 - beta2**step)}
    if group["degenerated_to_sgd"]:
        eps = huge(dtype)
        return {"lr": lr * eps, "weight_decay": wd / eps, "eps": eps}
    return {"lr": 0.0, "weight_decay": 0.0, "eps": 1.0}


class RAdam(CheckedOptimizer):
    """Rectified Adam with decoupled weight decay (Liu et al. 2020, arXiv:1908.03265), on the fused AdamW kernel.

    It takes the steps of `torch.optim.RAdam(decoupled_weight_decay=True)`, several times faster.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the uncorrected second moment, as in all implementations of RAdam.
        weight_decay: Decoupled: p shrinks by lr * weight_decay in every step.
        degenerated_to_sgd: What the first five steps do, while the variance is intractable: take a momentum step of size
            lr * |g| as in the paper (True), or only collect the moments (False).
        fused: False for the foreach path; None takes the fused kernel wherever torch has one.

    Raises:
        ValueError: A hyper-parameter is out of its range.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = RAdam(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        degenerated_to_sgd: bool = True,
        fused: bool | None = None,
    ):
        check_hyperparameters(lr, betas, eps, weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"degenerated_to_sgd": degenerated_to_sgd, "fused": fused})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride] torch has overloads
        """Update every parameter that has a gradient; returns the loss of the closure."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for step, params in buckets(group, self.state, adam_state):
                radam_(params, gradients(params), [self.state[p] for p in params], step, group)
        return loss


def radam_(params, grads, states, step: int, group: dict) -> None:
    """One step of RAdam on a list of tensors."""
    adamw_(
        params,
        grads,
        states,
        step=step,
        betas=group["betas"],
        fused=group["fused"],
        **as_adamw(group, step, params[0].dtype),
    )
