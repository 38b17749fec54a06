"""A network changed from outside into another form: deeper, folded, laid out for generation, or from official weights."""

from .fold import fold_resweight_
from .grow import grow_
from .layout import layout_
from .rztx import rezero_to_rztx, rztx_to_rezero


__all__ = ["fold_resweight_", "grow_", "layout_", "rezero_to_rztx", "rztx_to_rezero"]
