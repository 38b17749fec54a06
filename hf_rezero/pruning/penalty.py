"""How strongly masks are pulled to zero: a fixed factor, or a controller that steers to a wanted sparsity."""

import torch
from torch import nn


class Penalty(nn.Module):
    """lambda * min(1, step / warmup_steps) * sum of weight_i * penalty_i.

    Args:
        lambda_: The factor.
        warmup_steps: Steps in which it grows from 0.
        target_sparsity: Fraction of the prunable parameters to remove, to which the subclasses steer.
    """

    def __init__(self, lambda_: float, warmup_steps: int = 0, target_sparsity: float | None = None):
        super().__init__()
        if target_sparsity is not None and not 0 < target_sparsity < 1:
            raise ValueError(f"got target_sparsity={target_sparsity}: expected a fraction between 0 and 1.")
        self.warmup_steps, self.target_sparsity = warmup_steps, target_sparsity
        self.register_buffer("lambda_", torch.tensor(float(lambda_)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def warmup(self) -> float:
        """The fraction of the warmup that is done."""
        return min(1.0, (int(self.steps) + 1) / max(1, self.warmup_steps))

    def forward(self, masks) -> torch.Tensor:
        """The penalty of a step."""
        return self.warmup() * self.lambda_ * (masks.weights * masks.layer.penalties()).sum()

    def after_step(self, masks) -> None:
        """Count the step, and steer."""
        self.steps += 1


class LambdaController(Penalty):
    """lambda <- lambda exp(gain (target_t - sparsity)), for L1: the factor grows while too few units are caught.

    The target grows linearly over the warmup. While it is met nothing more is caught and the penalty is 0: pulling the
    masks that stay would only cost quality.
    """

    gain = 0.05

    def gap(self, masks) -> float:
        """Target of this step minus sparsity."""
        return self.warmup() * self.target_sparsity - float(masks.expected_sparsity())

    def forward(self, masks) -> torch.Tensor:
        pull = self.lambda_ if self.gap(masks) > 0 else 0.0
        return pull * (masks.weights * masks.layer.penalties()).sum()

    def after_step(self, masks) -> None:
        self.lambda_ *= torch.tensor(self.gain * self.gap(masks)).exp()
        super().after_step(masks)


class Lagrangian(Penalty):
    """l1 max(0, t - s) + l2 (t - s)^2, for L0, where s is the expected sparsity and l1, l2 rise with the gap t - s.

    After Wang, Wohlwend and Lei 2020 (FLOP, arXiv:1910.04732), section 4, whose first term is l1 (t - s): that term
    continues to close gates beyond the target until l1 has fallen to 0. t grows linearly over the warmup.
    """

    rate = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("multipliers", torch.zeros(2))

    def gap(self, masks) -> torch.Tensor:
        """Target of this step minus expected sparsity."""
        return self.warmup() * self.target_sparsity - masks.expected_sparsity()

    def forward(self, masks) -> torch.Tensor:
        gap = self.gap(masks)
        return self.multipliers[0] * gap.clamp(min=0) + self.multipliers[1] * gap.square()

    @torch.no_grad()
    def after_step(self, masks) -> None:
        gap = self.gap(masks)
        self.multipliers += self.rate * torch.stack([gap, gap.square()]).to(self.multipliers)
        self.multipliers.clamp_(min=0)
        super().after_step(masks)
