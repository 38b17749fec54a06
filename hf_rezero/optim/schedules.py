"""Piecewise linear schedules of learning rates and momentum, and groups that keep their learning rate."""

from collections.abc import Sequence

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


Points = Sequence[Sequence[float]]


class PiecewiseLinear(LambdaLR):
    """Straight lines between points (share of the training done, factor of the learning rate).

    The one-cycle policy of superconvergence (Smith & Topin 2018, arXiv:1708.07120) is a rise and a fall, while the
    momentum moves in the opposite direction.

    Args:
        optimizer: The learning rates of its groups keep their proportions.
        num_training_steps: Steps from share 0 to share 1.
        points: For example `[(0, 0.1), (0.4, 1), (1, 0)]`; the first and last factors hold before and after.
        momentum: Points (share, value) of the momentum, or of the first of two `betas`; by default it stays.
        last_epoch: As in torch.

    Raises:
        ValueError: Points are not pairs or their shares do not increase, or the optimiser has no momentum.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4, momentum=0.9)
        >>> scheduler = PiecewiseLinear(sgd, 4, [(0, 0), (0.5, 1), (1, 0)], momentum=[(0, 0.95), (0.5, 0.85)])
        >>> for _ in range(4):
        ...     print(round(sgd.param_groups[0]["lr"], 3), round(sgd.param_groups[0]["momentum"], 3))
        ...     sgd.step()
        ...     scheduler.step()
        0.0 0.95
        0.2 0.9
        0.4 0.85
        0.2 0.85
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_training_steps: int,
        points: Points,
        momentum: Points | None = None,
        last_epoch: int = -1,
    ):
        self.num_training_steps = num_training_steps
        points, self.momentum = _checked(points), None if momentum is None else _checked(momentum)
        if momentum is not None and not all("momentum" in g or "betas" in g for g in optimizer.param_groups):
            raise ValueError(
                f"got momentum points for {type(optimizer).__name__}, which has no momentum: leave them out."
            )
        if momentum is not None:
            for group in optimizer.param_groups:
                group.setdefault("initial_momentum", _momentum(group))
        super().__init__(optimizer, lambda step: _value(points, step / num_training_steps), last_epoch)

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue where another run stopped.

        Raises:
            ValueError: A learning rate of the state is not a finite number, or its step is not a whole number.
        """
        rates, step = [*state_dict["base_lrs"], *state_dict.get("_last_lr", [])], state_dict["last_epoch"]
        if not (np.isfinite(rates).all() and isinstance(step, int) and step >= 0):
            raise ValueError(f"got a state of step {step} with the learning rates {rates}: expected finite numbers.")
        super().load_state_dict(state_dict)

    def step(self, epoch: int | None = None) -> None:
        """Advance by one step."""
        super().step(epoch)
        if self.momentum is not None:
            momentum = _value(self.momentum, self.last_epoch / self.num_training_steps)
            for group, factor in zip(self.optimizer.param_groups, self.lr_lambdas, strict=True):
                if factor is not _constant:
                    _set_momentum(group, momentum)


def _checked(points: Points) -> tuple[tuple[float, float], ...]:
    try:
        checked = tuple((float(share), float(value)) for share, value in points)
    except (TypeError, ValueError):
        checked = ()
    shares = [share for share, _ in checked]
    if not checked or shares != sorted(set(shares)):
        raise ValueError(
            f"got points={points!r}: expected pairs (share, value) with increasing shares of the training."
        )
    return checked


def _value(points: Points, share: float) -> float:
    shares, values = zip(*points, strict=True)
    return float(np.interp(share, shares, values))


def _momentum(group: dict) -> float:
    return group["momentum"] if "momentum" in group else group["betas"][0]


def _set_momentum(group: dict, momentum: float) -> None:
    if "momentum" in group:
        group["momentum"] = momentum
    else:
        group["betas"] = (momentum, *group["betas"][1:])


def _constant(step: int) -> float:
    return 1.0


def keep_constant(scheduler: LRScheduler, groups: Sequence[int]) -> None:
    """Reset the groups of these indices to their initial learning rate and momentum, and keep them there.

    Raises:
        ValueError: The scheduler does not give each group its own factor. Of those of transformers this is true of
            `reduce_lr_on_plateau` and `greedy`.

    Example:
        >>> import torch
        >>> w, a = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> sgd = torch.optim.SGD([{"params": [w]}, {"params": [a], "lr": 0.1}], lr=1.0)
        >>> scheduler = LambdaLR(sgd, lambda step: 0.5**step)
        >>> keep_constant(scheduler, [1])
        >>> sgd.step()
        >>> scheduler.step()
        >>> [group["lr"] for group in sgd.param_groups]
        [0.5, 0.1]
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"got a constant learning rate for some parameters with {type(scheduler).__name__}, which moves all "
            f"groups together: use another lr_scheduler_type, such as linear."
        )
    for index in groups:
        group = scheduler.optimizer.param_groups[index]
        scheduler.lr_lambdas[index] = _constant
        group["lr"] = scheduler._last_lr[index] = scheduler.base_lrs[index]
        if "initial_momentum" in group:
            _set_momentum(group, group["initial_momentum"])
