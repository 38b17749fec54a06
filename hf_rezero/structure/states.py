"""Checks of tensors before they are loaded: each must be of the kind that it replaces, and finite."""

from collections.abc import Mapping
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


M = TypeVar("M", bound=nn.Module)


def fault_of(new: Tensor, old: Tensor) -> str | None:
    """What is wrong with a tensor that is to replace another, as the end of a sentence; None if nothing is wrong.

    torch would silently cast integers and booleans to floating point, and complex numbers to their real part.
    Infinite values are allowed only if the old tensor has some too, as an attention mask may.

    Args:
        new: The tensor that is loaded.
        old: A tensor of the right kind.

    Example:
        >>> fault_of(torch.ones(2, dtype=torch.int64), torch.ones(2))
        'is of torch.int64, expected floating point as torch.float32'
        >>> fault_of(torch.tensor([1.0, torch.nan]), torch.ones(2))
        'holds 1 of 2 values that are infinite or NaN'
        >>> fault_of(torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
    """
    if _kind(new) != _kind(old):
        return f"is of {new.dtype}, expected {_kind(old)} as {old.dtype}"
    bad = _not_finite(new)
    if bad and not _not_finite(old):
        return f"holds {bad} of {new.numel()} values that are infinite or NaN"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "booleans"
    return "complex numbers" if tensor.is_complex() else "floating point" if tensor.is_floating_point() else "integers"


def _not_finite(tensor: Tensor) -> int:
    """The number of values that are infinite or NaN, in the local shard of a sharded tensor; 0 for quantised ones."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.is_meta or type(local) not in (Tensor, nn.Parameter) or _kind(local) in ("booleans", "integers"):
        return 0
    return int((~torch.isfinite(local)).sum())


def faults(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> list[str]:
    """A sentence for each tensor of `new` that must not replace its namesake."""
    found = [(name, fault_of(tensor, old[name])) for name, tensor in new.items() if name in old]
    return [f"{name} {fault}" for name, fault in found if fault]


def check_tensors(new: Mapping[str, Tensor], old: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that must not replace their namesakes.

    Args:
        new: What is loaded, by name.
        old: Tensors of the right kind; names that only one of the two has are ignored.
        source: Where `new` comes from, for the message.

    Raises:
        ValueError: There are such tensors; the message names the first.

    Example:
        >>> check_tensors({"w": torch.tensor([torch.inf])}, {"w": torch.ones(1)}, "a.safetensors")
        Traceback (most recent call last):
        ...
        ValueError: a.safetensors cannot be loaded: w holds 1 of 1 values that are infinite or NaN. Save it again, or use an earlier one.
    """
    if found := faults(new, old):
        more = f", and {len(found) - 1} more tensors have faults" if len(found) > 1 else ""
        raise ValueError(f"{source} cannot be loaded: {found[0]}{more}. Save it again, or use an earlier one.")


def check_finite(model: M, source: str) -> M:
    """Return the model if all its weights are finite; `from_pretrained` loads whatever a file holds.

    Raises:
        ValueError: A weight is infinite or NaN.
    """
    for name, p in model.named_parameters():
        if bad := _not_finite(p.detach()):
            raise ValueError(
                f"{source} holds weights that are not finite: {bad} of {p.numel()} values of {name} are infinite or "
                f"NaN. Copy or download it again, or use an earlier checkpoint."
            )
    return model


def check_loads_of(module: nn.Module) -> None:
    """Let `load_state_dict` of a module, or of a model that contains it, refuse faulty tensors with a `ValueError`."""
    module.register_load_state_dict_pre_hook(_refuse)


def _refuse(module: nn.Module, state_dict: Mapping, prefix: str, *_) -> None:
    own = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    check_tensors(state_dict, {prefix + name: tensor for name, tensor in own}, f"a state of {type(module).__name__}")
