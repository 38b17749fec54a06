"""Whether a unit goes exactly, found out by taking one out of a copy of its module."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import commonprefix

import torch
from torch import Tensor, nn

from ..structure.modules import copy_of
from ..structure.probe import example_of, first_tensor, run_quietly
from .groups import PruningGroup
from .masks import masks_of, scale
from .surgery import cut_units


# differences that rounding explains, relative to the largest output
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 0.05


def inexact(model: nn.Module, groups: Sequence[PruningGroup]) -> set[str]:
    """The groups whose units cannot go: the model without one computes something else than with the unit masked.

    One group stands for all that have tensors of the same names in modules of the same class. A model that `example_of`
    has no input for is not run, and neither is one with masks, which act on the modules themselves.
    """
    example = example_of(model) if masks_of(model) is None else None
    verdicts: dict[tuple, bool] = {}
    wrong: set[str] = set()
    for group in groups if example is not None else ():
        owner = _owner(group)
        if not owner or group.num_units < 2:
            continue
        tensors = tuple(cut.tensor.removeprefix(owner) for cut in (*group.readers, *group.cuts))
        kind = group.kind, type(model.get_submodule(owner)), tensors
        if kind not in verdicts:
            verdicts[kind] = _goes_exactly(model, group, owner, example)
        if not verdicts[kind]:
            wrong.add(group.name)
    return wrong


def _owner(group: PruningGroup) -> str:
    """The smallest module that holds all tensors of a group."""
    paths = [cut.tensor.split(".")[:-1] for cut in (*group.readers, *group.cuts)]
    paths += [module.split(".") for module, _, _ in group.attributes]
    return ".".join(commonprefix(paths))


def _goes_exactly(model: nn.Module, group: PruningGroup, owner: str, example: Mapping[str, Tensor]) -> bool:
    original, unit = model.get_submodule(owner), group.num_units // 2
    kept = torch.tensor([i for i in range(group.num_units) if i != unit])
    with _in_place_of(model, owner, copy_of(original)):
        with torch.no_grad():
            _mask(model, group, unit)
        masked = _outputs(model, group, example)
    with _in_place_of(model, owner, copy_of(original)):
        cut_units(model, {group.name: group}, {group.name: kept})
        try:
            removed = _outputs(model, group, example)
        except (RuntimeError, ValueError, IndexError):
            return False  # shapes that do not fit together
    tolerance = TOLERANCES.get(next(original.parameters()).dtype, COARSE)
    return all(_agree(one, other, tolerance) for one, other in zip(masked, removed, strict=True))


@contextmanager
def _in_place_of(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    original = model.get_submodule(name)
    model.set_submodule(name, module)
    try:
        yield
    finally:
        model.set_submodule(name, original)


def _mask(model: nn.Module, group: PruningGroup, unit: int) -> None:
    for reader in group.readers:
        tensor = model.get_parameter(reader.tensor)
        factors = torch.ones(group.num_units, device=tensor.device).index_fill_(0, torch.tensor([unit]), 0.0)
        tensor.copy_(scale(tensor, factors, reader))


def _outputs(model: nn.Module, group: PruningGroup, example: Mapping[str, Tensor]) -> list[Tensor]:
    """What the modules that read the units put out."""
    seen: list[Tensor] = []

    def observe(module, args, output):
        seen.append(first_tensor(output).double())

    readers = {reader.tensor.rpartition(".")[0] for reader in group.readers}
    handles = [model.get_submodule(reader).register_forward_hook(observe) for reader in sorted(readers)]
    try:
        run_quietly(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _agree(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * one.abs().max() + 1e-12)
