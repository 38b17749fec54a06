from .param_groups import decays as decays
from .param_groups import is_resweight as is_resweight
from .param_groups import param_groups as param_groups


__all__ = ["decays", "is_resweight", "param_groups"]
