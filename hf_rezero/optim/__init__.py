from .centralization import centralize_gradients as centralize_gradients
from .lamb import LAMB as LAMB
from .lars import LARS as LARS
from .lookahead import lookahead as lookahead
from .muon import Muon as Muon
from .param_groups import decays as decays
from .param_groups import is_resweight as is_resweight
from .param_groups import param_groups as param_groups
from .radam import RAdam as RAdam
from .ranger import Ranger as Ranger
from .ranger_lars import RangerLARS as RangerLARS


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
