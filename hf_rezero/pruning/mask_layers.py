"""Factors that learn which units to keep: L1 mask layers and L0 hard-concrete gates."""

import inspect
import math

import torch
from torch import nn

from .penalty import Lagrangian, LambdaController, Penalty


STRETCH = -0.1, 1.1
LOG_RATIO = math.log(-STRETCH[0] / STRETCH[1])  # -2.398


class MaskLayer(nn.Module):
    """One factor for each unit; the methods here suit decided factors, which have no penalty and are never caught.

    Attributes:
        kind: The name in `attach_masks`.
        catches: Whether `catch` closes units for good; then it has to spare those that a target does not need to lose.
        is_scale: Whether the factors are plain weights, for which the weights that read the units can compensate.
        learning_rate: The constant rate at which Adam trains the factors.
        steered: The class of penalty that steers to a target.
    """

    kind: str
    catches = False
    is_scale = False
    learning_rate: float
    steered: type[Penalty]

    @classmethod
    def options(cls) -> list[str]:
        """The names of the arguments beside the number of units."""
        return [name for name in inspect.signature(cls).parameters if name != "num_units"]

    def estimate(self) -> torch.Tensor:
        """The factors without noise."""
        raise NotImplementedError

    def penalties(self) -> torch.Tensor:
        """The penalty of each unit."""
        return torch.zeros_like(self.estimate())

    def openness(self) -> torch.Tensor:
        """How open each unit is, 0 to 1."""
        return (self.estimate() != 0).float()

    def scores(self) -> torch.Tensor:
        """Higher is more useful."""
        return self.estimate().abs()

    def undecided(self) -> float:
        """The fraction of gates that are neither surely open nor surely closed."""
        return 0.0

    def settle(self) -> None:
        """Undo what a step of the optimiser must not change."""

    def catch(self, protected: torch.Tensor) -> None:
        """Close for good what has become small, except units of `protected`."""


class L1MaskLayer(MaskLayer):
    """Factors that start at 1 and are pulled to 0 by a penalty on their size; small ones are set to 0 for good.

    Args:
        num_units: Number of factors.
        capture: A factor that falls below this stays 0 for ever. It must be larger than one step of the optimiser.

    Example:
        >>> L1MaskLayer(3)()
        tensor([1., 1., 1.], grad_fn=<ViewBackward0>)
    """

    kind = "l1"
    catches = is_scale = True
    learning_rate = 1e-2
    steered = LambdaController

    def __init__(self, num_units: int, capture: float = 0.02):
        super().__init__()
        self.capture = capture
        self.mask = nn.Parameter(torch.ones(num_units))
        self.register_buffer("captured", torch.zeros(num_units, dtype=torch.bool))

    def forward(self, num_examples: int | None = None) -> torch.Tensor:
        return self.mask.view_as(self.mask)

    def penalties(self) -> torch.Tensor:
        """|m| of each unit."""
        return self.mask.abs()

    def estimate(self) -> torch.Tensor:
        """The factors as they are."""
        return self.mask.detach().clone()

    @torch.no_grad()
    def settle(self) -> None:
        """Set what was caught to 0 again: the momentum of an optimiser moves it."""
        self.mask.masked_fill_(self.captured, 0.0)

    def catch(self, protected: torch.Tensor) -> None:
        """Catch what has become small, except units of `protected`."""
        self.captured |= (self.mask.detach().abs() < self.capture) & ~protected
        self.settle()


class L0MaskLayer(MaskLayer):
    """Hard-concrete gates (Louizos et al. 2017, arXiv:1712.01312, equations 10 to 13).

    u ~ U(0, 1), s = sigmoid((log u - log(1 - u) + log_alpha) / beta), z = min(1, max(0, 1.2 s - 0.1)). The penalty is
    P(z != 0) = sigmoid(log_alpha - beta log(0.1 / 1.1)).

    Args:
        num_units: Number of gates.
        beta: Temperature; below 0.1 use `per_example`, or the gradient is all noise.
        log_alpha: Initial location; 2.5 is just above 2.398, where the deterministic gate is exactly 1.
        penalty: "sigmoid", or "hard_sigmoid": clip((log_alpha + 4) / 8, 0, 1), a stronger pull near the start.
        estimator: The gate without noise: "paper", min(1, max(0, 1.2 sigmoid(log_alpha) - 0.1)), or "threshold", 1 where
            log_alpha >= 0, else 0.
        per_example: One sample for each example instead of one for the batch.

    Example:
        >>> L0MaskLayer(2).eval()()
        tensor([1., 1.])
    """

    kind = "l0"
    learning_rate = 5e-2
    steered = Lagrangian

    def __init__(
        self,
        num_units: int,
        beta: float = 2 / 3,
        log_alpha: float = 2.5,
        penalty: str = "sigmoid",
        estimator: str = "paper",
        per_example: bool = False,
    ):
        super().__init__()
        self.penalty, self.estimator, self.per_example = penalty, estimator, per_example
        self.limit = 4.0 if penalty == "hard_sigmoid" else math.log(100)
        self.log_alpha = nn.Parameter(torch.full((num_units,), log_alpha))
        self.register_buffer("beta", torch.tensor(beta))

    def forward(self, num_examples: int | None = None) -> torch.Tensor:
        """Gates of shape (units,), or (num_examples, units) when they are sampled for each example."""
        if not self.training:
            return self.estimate()
        shape = (num_examples, *self.log_alpha.shape) if self.per_example else self.log_alpha.shape
        u = torch.empty(shape, device=self.log_alpha.device).uniform_(1e-6, 1 - 1e-6)
        s = torch.sigmoid((u.log() - (-u).log1p() + self.log_alpha) / self.beta)
        return _stretch(s)

    def penalties(self) -> torch.Tensor:
        """The penalty of each unit."""
        if self.penalty == "hard_sigmoid":
            return ((self.log_alpha + 4) / 8).clamp(0, 1)
        return self.openness()

    def openness(self) -> torch.Tensor:
        """P(z != 0) of each unit."""
        return torch.sigmoid(self.log_alpha - self.beta * LOG_RATIO)

    def estimate(self) -> torch.Tensor:
        """The gates without noise."""
        if self.estimator == "threshold":
            return (self.log_alpha.detach() >= 0).float()
        return _stretch(torch.sigmoid(self.log_alpha.detach()))

    def scores(self) -> torch.Tensor:
        """Higher is more useful."""
        return self.log_alpha.detach()

    def undecided(self) -> float:
        """The fraction of gates that are neither surely open nor surely closed."""
        return float((self.log_alpha.detach().abs() < -LOG_RATIO).float().mean())

    @torch.no_grad()
    def settle(self) -> None:
        """Keep the locations where the penalty has a gradient."""
        self.log_alpha.clamp_(-self.limit, self.limit)

    @torch.no_grad()
    def catch(self, protected: torch.Tensor) -> None:
        """Nothing is caught; units of `protected` stay open."""
        self.log_alpha.copy_(torch.where(protected, self.log_alpha.clamp(min=-LOG_RATIO), self.log_alpha))


def _stretch(s: torch.Tensor) -> torch.Tensor:
    low, high = STRETCH
    return (s * (high - low) + low).clamp(0, 1)


class FixedMaskLayer(MaskLayer):
    """Factors that are decided and no longer learn.

    Args:
        factors: One for each unit.
        kind: The kind of the layer that learned them.
    """

    def __init__(self, factors: torch.Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self.register_buffer("factors", factors)

    def forward(self, num_examples: int | None = None) -> torch.Tensor:
        return self.factors

    def estimate(self) -> torch.Tensor:
        """The factors."""
        return self.factors


# the kinds that `attach_masks` knows by name
MASK_LAYERS: dict[str, type[MaskLayer]] = {layer.kind: layer for layer in (L1MaskLayer, L0MaskLayer)}
