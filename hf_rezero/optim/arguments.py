"""Whether an optimizer can work with its arguments: their types, and a few steps on four numbers."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


# what optimizers raise for arguments that they did not expect, in the constructor or in a step
UNEXPECTED = (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError, LookupError, AttributeError)
_STEPS = 7  # RAdam takes other steps before the sixth


def is_number(value: object) -> bool:
    """Whether a value is a finite real number; a tensor of one, as torch takes for a learning rate, is.

    Example:
        >>> [is_number(value) for value in (1, 0.5, torch.tensor(0.5), True, "1", float("nan"), 10**400, None)]
        [True, True, True, False, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        return False
    try:
        return math.isfinite(value)
    except (OverflowError, TypeError, ValueError, RuntimeError):  # too large for a float; several numbers in a tensor
        return False


def are_numbers(*values: object) -> bool:
    """Whether all values are numbers."""
    return all(map(is_number, values))


def check_arguments(
    make: Callable[..., Optimizer], arguments: Mapping[str, Any], source: str, device: torch.device | str = "cpu"
) -> None:
    """Refuse arguments of an optimizer that would fail in its constructor or in its steps, or make NaN of the weights.

    Args:
        make: Its class.
        arguments: All of its arguments but the parameters.
        source: What the user gave, for the message.
        device: Where it will run: some arguments are for GPUs alone.

    Raises:
        ValueError: An argument has another type than its default, or the steps fail.

    Example:
        >>> check_arguments(torch.optim.AdamW, {"eps": 1e-6}, "eps=1e-6")
        >>> check_arguments(torch.optim.AdamW, {"eps": 0.0}, "eps=0.0")
        Traceback (most recent call last):
        ...
        ValueError: got eps=0.0: the steps of AdamW are not finite with it.
    """
    parameters = inspect.signature(make).parameters
    for name, value in arguments.items():
        kind = _expected(parameters[name])
        if kind and not _KINDS[kind](value, parameters[name].default):
            raise ValueError(f"got {source} with {name}={value!r}: expected {kind}.")
    weights = torch.nn.Parameter(torch.ones(2, 2, device=device))
    try:
        optimizer = make([weights], **arguments)
        for _ in range(_STEPS):
            weights.grad = torch.tensor([[0.0, 0.0], [1.0, 2.0]], device=device)  # zeros: those of an unused row
            optimizer.step()
    except UNEXPECTED as error:
        name = getattr(make, "__name__", str(make))
        raise ValueError(f"got {source}, with which {name} cannot work: {error or type(error).__name__}.") from None
    if not torch.isfinite(weights).all():
        raise ValueError(f"got {source}: the steps of {getattr(make, '__name__', make)} are not finite with it.")


_KINDS: dict[str, Callable[[Any, Any], bool]] = {
    "True or False": lambda value, default: isinstance(value, bool) or value is default is None,
    "a whole number": lambda value, default: isinstance(value, int) and not isinstance(value, bool),
    "a finite number": lambda value, default: is_number(value),
    "as many numbers as the default has": lambda value, default: (
        isinstance(value, (tuple, list)) and len(value) == len(default) and are_numbers(*value)
    ),
}


def _expected(parameter: inspect.Parameter) -> str | None:
    """Which kind of value a parameter takes, by its annotation and its default; None where neither says."""
    annotation, default = parameter.annotation, parameter.default
    if isinstance(default, bool) or annotation in (bool, bool | None):
        return "True or False"
    if annotation is int:
        return "a whole number"
    if isinstance(default, tuple):
        return "as many numbers as the default has"
    return "a finite number" if isinstance(default, (int, float)) or annotation is float else None
