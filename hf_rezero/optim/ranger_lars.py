"""Ranger-LARS: Ranger with steps in proportion to the norm of each layer's weights."""

from .lamb import lamb_
from .radam import rectification
from .ranger import Ranger


class RangerLARS(Ranger):
    """Ranger with the trust ratio of LARS, taken on the update.

    p <- p - lr r_t |p| / |u + wd p| (u + wd p), where u is the update of Adam for the centralised gradient, inside
    Lookahead.

    The rectification r_t stands outside the ratio: inside, the norm of the update would cancel it, and with it the
    warmup that it provides. While r_t is 0, in the first five steps, only the moments change. Tensors with fewer than
    two dimensions have no ratio and no decay. The code published as RangerLars divides by the norm of the new
    weights, which leaves Ranger with a smaller step on large tensors; this one needs a learning rate some 50 times
    larger than its recipes. Arguments are those of `Ranger`, without `degenerated_to_sgd`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = RangerLARS(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        *,
        k: int = 6,
        alpha: float = 0.5,
        centralize: bool = True,
        evaluate_slow: bool = False,
        fused: bool | None = None,
    ):
        outer = {"k": k, "alpha": alpha, "evaluate_slow": evaluate_slow}
        super().__init__(params, lr, betas, eps, weight_decay, centralize=centralize, fused=fused, **outer)

    def update_(self, params, grads, step: int, group: dict) -> None:
        """One rectified step of LAMB on a list of tensors."""
        states = [self.state[p] for p in params]
        lamb_(params, grads, states, step, group, rectification(step, group["betas"][1]))
