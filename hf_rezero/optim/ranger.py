"""Ranger: RAdam, gradient centralisation and Lookahead."""

import torch

from .adamw import adam_state
from .centralization import centralize_
from .foreach import WholeMatrices, buckets, evaluate, gradients
from .lookahead import (
    give_defaults,
    give_modes,
    keep_precision,
    lookahead_defaults,
    refuse_step_in_eval,
    slow_copy,
    synchronize,
)
from .radam import RAdam, radam_


class Ranger(WholeMatrices, RAdam):
    """RAdam with centralised gradients inside Lookahead (Wright 2019), in one class.

    It takes the steps of `lookahead(centralize_gradients(RAdam(...)), k, alpha)` with the same state, but faster.

    Args:
        params: Parameters, or better the groups of `param_groups`, which know what is to be centralised.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the uncorrected second moment.
        weight_decay: Decoupled: p shrinks by lr * weight_decay in every step.
        k: Steps between two moves of the slow weights.
        alpha: How far the slow weights move.
        centralize: Whether gradients of weight matrices are centralised, in place.
        degenerated_to_sgd: What the first five steps do, see `RAdam`.
        evaluate_slow: Give the optimiser `eval()` and `train()`, see `lookahead`.
        fused: False for the foreach path; None takes the fused kernel wherever torch has one.

    Raises:
        ValueError: A hyper-parameter is out of its range, or FSDP1 or DeepSpeed has flattened the parameters.

    Example:
        >>> from hf_rezero import ReZero, param_groups
        >>> model = ReZero(torch.nn.Linear(3, 3))
        >>> optimizer = Ranger(param_groups(model, weight_decay=0.01), lr=1e-3)
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
        degenerated_to_sgd: bool = True,
        evaluate_slow: bool = False,
        fused: bool | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, degenerated_to_sgd=degenerated_to_sgd, fused=fused)
        give_defaults(self, lookahead_defaults(k, alpha) | ({"gc_conv_only": False} if centralize else {}))
        keep_precision(self)
        if evaluate_slow:
            give_modes(self)

    def __setstate__(self, state: dict) -> None:
        is_copy = "_optimizer_load_state_dict_pre_hooks" not in self.__dict__  # copies come without hooks
        super().__setstate__(state)
        if is_copy:
            keep_precision(self)

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride] torch has overloads
        """Update every parameter that has a gradient; returns the loss of the closure."""
        refuse_step_in_eval(self)
        loss = evaluate(closure)
        for group in self.param_groups:
            for step, params in buckets(group, self.state, ranger_state):
                grads = gradients(params)
                if "gc_conv_only" in group:
                    centralize_(group, params, grads, group["gc_conv_only"])
                self.update_(params, grads, step, group)
            synchronize(group, self.state)
        return loss

    def update_(self, params, grads, step: int, group: dict) -> None:
        """One step of RAdam on a list of tensors."""
        radam_(params, grads, [self.state[p] for p in params], step, group)


def ranger_state(p: torch.Tensor) -> dict:
    """Moments of zero, and the initial weights as slow weights."""
    return adam_state(p) | {"slow": slow_copy(p)}
