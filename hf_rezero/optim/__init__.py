from ..structure.parameters import decays, is_resweight
from .centralization import centralize_gradients
from .lamb import LAMB
from .lars import LARS
from .lookahead import lookahead
from .muon import Muon
from .param_groups import param_groups
from .radam import RAdam
from .ranger import Ranger
from .ranger_lars import RangerLARS


__all__ = [
    "LAMB",
    "LARS",
    "Muon",
    "RAdam",
    "Ranger",
    "RangerLARS",
    "centralize_gradients",
    "decays",
    "is_resweight",
    "lookahead",
    "param_groups",
]
