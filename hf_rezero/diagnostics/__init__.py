"""Pictures of a network: Jacobians, gradients by depth, residual weights."""

from .jacobian import (
    GradientStatistics,
    JacobianBounds,
    JacobianMoments,
    gradient_profile,
    jacobian_bounds,
    jacobian_moments,
    jacobian_spectrum,
    resweight_profile,
)
from .resweights import blocked_branches, warn_of_blocked_branches


__all__ = [
    "GradientStatistics",
    "JacobianBounds",
    "JacobianMoments",
    "blocked_branches",
    "gradient_profile",
    "jacobian_bounds",
    "jacobian_moments",
    "jacobian_spectrum",
    "resweight_profile",
    "warn_of_blocked_branches",
]
