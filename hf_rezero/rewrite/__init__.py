"""A network changed from outside into another form: with residual weights, deeper, folded, laid out, or official weights."""

from .fold import fold_resweight_
from .grow import grow_
from .layout import layout_
from .rezero import ReZeroReport, rezero_
from .rztx import rezero_to_rztx, rztx_to_rezero


__all__ = ["ReZeroReport", "fold_resweight_", "grow_", "layout_", "rezero_", "rezero_to_rztx", "rztx_to_rezero"]
