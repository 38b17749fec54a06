"""Optimisers that check a state before they load it."""

import math
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from ..structure.states import check_tensors


class CheckedOptimizer(Optimizer):
    """An optimiser that refuses a state with which its steps would be silently wrong."""

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of another run.

        Raises:
            ValueError: A tensor of the state is not floating point, not finite or not of the shape of its parameter, or a
                number is not finite.
        """
        check_state(self, state_dict)
        super().load_state_dict(state_dict)


def check_state(optimizer: Optimizer, state_dict: Mapping) -> None:
    """Refuse a state dict whose tensors do not fit the parameters of `optimizer`, or whose numbers are not finite.

    Raises:
        ValueError: The message names the tensor or the number.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.ones(3, requires_grad=True)], lr=0.1)
        >>> check_state(sgd, sgd.state_dict() | {"state": {0: {"momentum_buffer": torch.ones(3, dtype=torch.int32)}}})
        Traceback (most recent call last):
        ...
        ValueError: the state of SGD cannot be loaded: momentum_buffer of parameter 0 is of torch.int32, expected floating point as torch.float32. Save it again, or use an earlier one.
    """
    source = f"the state of {type(optimizer).__name__}"
    for group in state_dict["param_groups"]:
        for name, value in group.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{source} cannot be loaded: {name} of a group is {value}, expected a finite number.")
    for key, p, entry in entries(optimizer, state_dict):
        tensors = {
            f"{name} of parameter {key}": v for name, v in entry.items() if isinstance(v, Tensor) and name != "step"
        }
        check_tensors(tensors, dict.fromkeys(tensors, p), source)
        for name, tensor in tensors.items():
            if tensor.shape != p.shape:
                raise ValueError(
                    f"{source} cannot be loaded: {name} has the shape {tuple(tensor.shape)}, and the parameter has "
                    f"{tuple(p.shape)}. Build the model as it was when the state was saved."
                )
        step = entry.get("step", 0)
        if not (float(step) >= 0 and float(step).is_integer()):
            raise ValueError(f"{source} cannot be loaded: step of parameter {key} is {step}, expected a whole number.")


def entries(optimizer: Optimizer, state_dict: Mapping):
    """Key, parameter and saved state of each parameter; torch itself refuses a different number of parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for key, p in zip(keys, params, strict=False):
        yield key, p, state_dict["state"].get(key, {})
