"""Pictures of a network: Jacobians, gradients by depth, residual weights."""

from .gradients import GradientProfile, GradientStatistics, gradient_profile
from .jacobian import (
    JacobianBounds,
    JacobianMoments,
    JacobianSpectrum,
    jacobian_bounds,
    jacobian_moments,
    jacobian_spectrum,
)
from .resweights import blocked_branches, resweight_profile, warn_of_blocked_branches


__all__ = [
    "GradientProfile",
    "GradientStatistics",
    "JacobianBounds",
    "JacobianMoments",
    "JacobianSpectrum",
    "blocked_branches",
    "gradient_profile",
    "jacobian_bounds",
    "jacobian_moments",
    "jacobian_spectrum",
    "resweight_profile",
    "warn_of_blocked_branches",
]
