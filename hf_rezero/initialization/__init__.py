"""GradInit and MetaInit: initial scales that are learned before training."""

from .gradinit import GradInit, GradInitReport, default_gamma, gradinit_, half_overlap
from .metainit import MetaInitReport, gradient_quotient, metainit_, random_batches


__all__ = [
    "GradInit",
    "GradInitReport",
    "MetaInitReport",
    "default_gamma",
    "gradient_quotient",
    "gradinit_",
    "half_overlap",
    "metainit_",
    "random_batches",
]
