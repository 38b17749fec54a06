"""Structured pruning with learned masks or scores, ending in a physically smaller model; torch only, any module."""

from ..structure.cuts import Cut
from ..structure.reset import reinitialize_
from .activations import mean_activations, output_of, recalibrate_batchnorm_
from .costs import weight_seconds, weight_uses
from .groups import PruningGroup
from .mask_layers import L0MaskLayer, L1MaskLayer
from .masks import Masks, attach_masks, finalize_masks
from .report import PruningReport
from .rules import find_groups
from .scores import apoz, first_k, magnitude, random, taylor
from .select import Sizes, select, unit_costs
from .storage import load_pruned, save_pruned
from .surgery import carry_state_, prune_, remove_pruned_


__all__ = [
    "Cut",
    "L0MaskLayer",
    "L1MaskLayer",
    "Masks",
    "PruningGroup",
    "PruningReport",
    "Sizes",
    "apoz",
    "attach_masks",
    "carry_state_",
    "finalize_masks",
    "find_groups",
    "first_k",
    "load_pruned",
    "magnitude",
    "mean_activations",
    "output_of",
    "prune_",
    "random",
    "recalibrate_batchnorm_",
    "reinitialize_",
    "remove_pruned_",
    "save_pruned",
    "select",
    "taylor",
    "unit_costs",
    "weight_seconds",
    "weight_uses",
]
