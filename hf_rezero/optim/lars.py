"""LARS: momentum SGD with a learning rate for each layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adamw import has_fused_kernel
from .arguments import are_numbers
from .foreach import WholeMatrices, buckets, evaluate, gradients, lie_alike, mesh_of, norms, scale_


class LARS(WholeMatrices):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888, algorithm 1).

    ratio = eta |p| / (|g| + wd |p|);  u <- momentum u + lr ratio (g + wd p);  p <- p - u

    Tensors with fewer than two dimensions, that is biases, gains and residual weights, have the ratio 1 and no decay.
    The ratio is also 1 where a norm is zero. The learning rate is inside the momentum, as in the paper: after it falls, the
    momentum still carries the larger steps. `p.grad` is left as it is.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: Momentum of the updates.
        weight_decay: wd.
        trust_coefficient: eta.
        nesterov: Step along lr ratio (g + wd p) + momentum u instead of u.
        clip: LARC: the ratio is min(eta |p| / (|g| + wd |p|) / lr, 1), so that no layer moves faster than lr.

    Raises:
        ValueError: A hyper-parameter is out of its range, or FSDP1 or DeepSpeed has flattened the parameters.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LARS(model.parameters(), lr=1.0)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        clip: bool = False,
    ):
        if not are_numbers(lr, momentum, weight_decay, trust_coefficient) or not (
            lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and trust_coefficient > 0
        ):
            raise ValueError(
                f"got lr={lr}, momentum={momentum}, weight_decay={weight_decay}, trust_coefficient={trust_coefficient}"
                f": expected lr >= 0, 0 <= momentum < 1, weight_decay >= 0, trust_coefficient > 0."
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(
            params, defaults | {"trust_coefficient": trust_coefficient, "nesterov": nesterov, "clip": clip}
        )

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride] torch has overloads
        """Update every parameter that has a gradient; returns the loss of the closure."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for _, params in buckets(group, self.state, _momentum_state):
                steps = scaled_gradients(params, gradients(params), group)
                _momentum_step(params, steps, [self.state[p]["momentum_buffer"] for p in params], group)
        return loss


def _momentum_state(p: Tensor) -> dict:
    return {"step": 0, "momentum_buffer": torch.zeros_like(p)}


def scaled_gradients(params: list[Tensor], grads: list[Tensor], group: dict) -> Sequence[Tensor]:
    """lr ratio (g + wd p) for a list of matrices, lr g for one of vectors."""
    lr, wd = group["lr"], group["weight_decay"]
    if params[0].ndim < 2:
        return torch._foreach_mul(grads, lr)
    weight_norms, grad_norms = norms(params), norms(grads)
    ratios = group["trust_coefficient"] * weight_norms / (grad_norms + wd * weight_norms)
    if group["clip"]:
        ratios = (ratios / lr).clamp(max=1.0)
    ratios = torch.where((weight_norms > 0) & (grad_norms > 0), ratios, 1.0)
    steps = torch._foreach_add(grads, params, alpha=wd)
    scale_(steps, lr * ratios)
    return steps


def _momentum_step(params, steps, buffers, group):
    """u <- momentum u + step;  p <- p - u, or p - (step + momentum u) with Nesterov."""
    momentum, nesterov = group["momentum"], group["nesterov"]
    # torch's fused SGD knows no sharded tensors, and on a CPU fills bf16 and fp16 momentum with uninitialised memory
    is_safe = mesh_of(params[0]) is None and torch.finfo(params[0].dtype).bits >= 32
    if momentum and is_safe and has_fused_kernel(params[0]) and lie_alike(params, steps, buffers):
        options = {"weight_decay": 0.0, "dampening": 0.0, "maximize": False, "is_first_step": False}
        torch._fused_sgd_(params, steps, buffers, lr=1.0, momentum=momentum, nesterov=nesterov, **options)
        return
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, steps)
    if nesterov:
        torch._foreach_add_(steps, buffers, alpha=momentum)
    torch._foreach_sub_(params, steps if nesterov else buffers)
