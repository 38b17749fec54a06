"""Physical removal: smaller tensors, layers that are gone, and a config that says so."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..rewrite.record import write_record
from ..structure.cuts import Cut
from ..structure.modules import BATCH_NORM, can_lack_sublayers, config_of, is_conv1d, provenance_of
from ..structure.residual import renumber_layers, write_config
from .activations import output_of
from .groups import PruningGroup
from .masks import Masks, finalize_masks, masks_of, scale
from .report import PruningReport, from_ranges, to_ranges
from .select import Sizes, openness_of


def remove_pruned_(
    model: nn.Module,
    masks: Masks,
    *,
    round_to: int | Mapping[str, int] = 1,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> PruningReport:
    """Multiply the masks into the weights and remove the units that they closed; no mask is left.

    Args:
        model: The model, changed in place.
        masks: Its masks.
        round_to: Keep a multiple of this many units in each group, as one number or by kind; 8 or 64 suits matrix kernels.
        batch: An input (tensor or keyword arguments) on which the report compares the masked and the pruned model.
        optimizer: Its state is cut like the parameters, so that training goes on.

    Raises:
        ValueError: The target sparsity cannot be reached, or a group would be left empty.

    See `attach_masks` for an example.
    """
    kind, target = masks.layer.kind, masks.pull.target_sparsity
    polarisation = masks.polarisation()
    kept, factors = finalize_masks(masks, round_to=round_to)
    masked = None if batch is None else output_of(model, batch)
    masks.detach_()
    fold_(model, masks.groups, factors, optimizer)
    report = prune_(model, masks.groups, kept, optimizer=optimizer, method=kind, target_sparsity=target)
    report.undecided = polarisation
    if masked is not None:
        report.compare(masked, output_of(model, batch))
    return report


@torch.no_grad()
def fold_(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    factors: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Multiply the factors of the units into the weights that read them, in fp32, rounded once.

    The slow weights of Lookahead are weights too: those in the state of `optimizer` take the same factors.

    Raises:
        ValueError: A weight is tied, and its factors are neither 0 nor 1.
    """
    state = {} if optimizer is None else unwrapped(optimizer).state
    tensors = dict(model.named_parameters(remove_duplicate=False))
    readers = [(reader.tensor, factors[group.name], reader) for group in groups for reader in group.readers]
    gates = [
        (tensor, factors[group.name][unit], Cut(tensor, -1))
        for group in groups
        for unit, names in enumerate(group.gates)
        for tensor in names
    ]
    owners = defaultdict(set)
    for name, tensor in tensors.items():
        owners[tensor].add(name)
    for name, factor, cut in readers + gates:
        if len(owners[tensors[name]]) > 1 and not _is_binary(factor):
            raise ValueError(
                f"{name} is tied to {', '.join(sorted(owners[tensors[name]] - {name}))}, and its masks are neither 0 "
                f"nor 1: untie the embeddings before the masks are trained, or use L0 with estimator='threshold'."
            )
        if not (factor == 1).all() and len(owners[tensors[name]]) == 1:
            slow = state.get(tensors[name], {}).get("slow")
            for weights in (tensors[name],) if slow is None else (tensors[name], slow):
                weights.copy_(scale(weights, factor, cut))


def _is_binary(factor: torch.Tensor) -> bool:
    return bool(((factor == 0) | (factor == 1)).all())


def prune_(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    kept: Mapping[str, torch.Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    method: str = "given",
    target_sparsity: float | None = None,
) -> PruningReport:
    """Remove all units but the kept ones, in place: smaller tensors, adjusted modules and config.

    Args:
        model: The model.
        groups: From `find_groups(model)`.
        kept: Indices of the units to keep, by group; groups without an entry stay whole.
        optimizer: Its state is cut like the parameters.
        constants: Mean values of the units, (units x size,) by group as `mean_activations` gives them. For removed
            units, their product with the weights that read them is added to the bias there.
        method: How the units were chosen, for the report and the config.
        target_sparsity: The sparsity that was asked for, for the report and the config.

    Raises:
        ValueError: A group is unknown, an index is out of range, masks are still attached, or a group would be left empty
            although its module cannot be removed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hf_rezero.pruning import find_groups, prune_
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = prune_(net, find_groups(net), {"0": torch.tensor([1, 5])})
        >>> net[0].weight.shape, net[2].weight.shape
        (torch.Size([2, 4]), torch.Size([2, 2]))
    """
    if masks_of(model) is not None:
        raise ValueError("masks are attached to the model: use remove_pruned_, or take them off with masks.detach_().")
    by_name = {group.name: group for group in groups}
    kept = {name: _checked(by_name, name, indices) for name, indices in kept.items()}
    sizes, total = Sizes(model, groups), sum(p.numel() for p in model.parameters())
    parts = _parts_to_remove(model, by_name, kept)
    if constants is not None:
        _fold_constants(model, by_name, kept, constants)
    replaced = cut_units(model, by_name, kept, parts)
    removed_layers = _remove_parts(model, parts)
    report = PruningReport(
        method=method,
        target_sparsity=target_sparsity,
        sparsity=float(sizes.sparsity(openness_of(kept, groups))),
        parameters_before=total,
        parameters_after=sum(p.numel() for p in model.parameters()),
        units={group.name: (group.kind, group.num_units) for group in groups},
        kept={group.name: kept.get(group.name, torch.arange(group.num_units)).tolist() for group in groups},
    )
    _write_config(model, report, removed_layers)
    if optimizer is not None:
        carry_state_(optimizer, model, replaced)
    return report


def _checked(by_name: Mapping[str, PruningGroup], name: str, indices: torch.Tensor) -> torch.Tensor:
    if name not in by_name:
        raise ValueError(f"kept names {name!r}: expected groups of the model, such as {next(iter(by_name))!r}.")
    indices = torch.as_tensor(indices, dtype=torch.long).cpu().unique()
    if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < by_name[name].num_units:
        raise ValueError(f"kept has {int(indices[-1])} for {name!r}: expected 0 to {by_name[name].num_units - 1}.")
    return indices


def _parts_to_remove(model: nn.Module, by_name: Mapping[str, PruningGroup], kept: dict) -> list[str]:
    """Qualified names of the modules that go as a whole."""
    parts = []
    for name, indices in kept.items():
        group = by_name[name]
        gone = set(range(group.num_units)) - set(indices.tolist())
        parts += [group.parts[unit] for unit in gone if group.parts]
        if not len(indices) and not group.parts:
            readers = [model.get_submodule(reader.tensor.rpartition(".")[0]) for reader in group.readers]
            optional = can_lack_sublayers(model) and group.kind in ("heads", "neurons")
            if not optional or any(reader.bias is not None for reader in readers):
                raise ValueError(
                    f"all {group.num_units} {group.kind} of {name!r} would go: keep at least one (min_keep), or make "
                    f"the module removable as a whole with the targets 'layers' or 'sublayers'."
                )
            parts.append(name)
        if group.parts and not len(indices):
            raise ValueError(f"all {group.num_units} {group.kind} of {name!r} would go: keep at least one (min_keep).")
    return parts


def _inside(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _kept_entries(model, by_name, kept, parts) -> dict[str, dict[int, torch.Tensor]]:
    """The entries that stay, by tensor and dimension."""
    removed: dict[tuple[str, int], list] = defaultdict(list)
    for name, indices in kept.items():
        group = by_name[name]
        gone = torch.ones(group.num_units, dtype=torch.bool).index_fill_(0, indices, False).nonzero().flatten()
        for cut in (*group.readers, *group.cuts):
            if len(gone) and not _inside(cut.tensor, parts):
                entries = cut.offset + gone[:, None] * cut.size + torch.arange(cut.size)
                removed[cut.tensor, cut.dim].append(entries.flatten())
    entries: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for (tensor, dim), gone in removed.items():
        module, _, attribute = tensor.rpartition(".")
        length = getattr(model.get_submodule(module), attribute).shape[dim]
        stay = torch.ones(length, dtype=torch.bool).index_fill_(0, torch.cat(gone), False)
        entries[tensor][dim] = stay.nonzero().flatten()
    return entries


def cut_units(
    model: nn.Module,
    by_name: Mapping[str, PruningGroup],
    kept: Mapping[str, torch.Tensor],
    parts: Sequence[str] = (),
) -> dict[nn.Parameter, tuple[nn.Parameter, dict]]:
    """Leave the kept units, in tensors and numbers of the modules outside of `parts`, and nothing else of the model.

    Returns:
        For each parameter that was replaced the new one, and the entries that it kept.
    """
    replaced = _cut_tensors(model, by_name, kept, parts)
    _adjust_modules(model, by_name, kept, parts)
    return replaced


def _cut_tensors(model, by_name, kept, parts) -> dict[nn.Parameter, tuple[nn.Parameter, dict]]:
    """Replace tensors by their kept entries, tied ones together; returns the new parameter and the entries of each."""
    entries = _kept_entries(model, by_name, kept, parts)
    replaced: dict[nn.Parameter, tuple[nn.Parameter, dict]] = {}
    for tensor, by_dim in entries.items():
        module, _, attribute = tensor.rpartition(".")
        owner = model.get_submodule(module)
        old = getattr(owner, attribute)
        if isinstance(old, nn.Parameter) and old not in replaced:
            # a new parameter: autograd remembers the old shape of one that is changed in place
            replaced[old] = nn.Parameter(_take(old.detach(), by_dim), requires_grad=old.requires_grad), by_dim
        elif not isinstance(old, nn.Parameter):
            setattr(owner, attribute, _take(old, by_dim))
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter in replaced:
                module._parameters[attribute] = replaced[parameter][0]
    return replaced


def _take(tensor: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor:
    for dim, indices in by_dim.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous()


def _adjust_modules(model, by_name, kept, parts) -> None:
    """Adjust the numbers that modules keep besides their tensors."""
    for name, indices in kept.items():
        for module, attribute, size in by_name[name].attributes:
            if not _inside(module, parts):
                _set_number(model.get_submodule(module), attribute, size * len(indices))
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, BATCH_NORM) and module.running_mean is not None:
            module.num_features = len(module.running_mean)
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = weight.shape[1]
        elif is_conv1d(module):
            module.nx, module.nf = weight.shape


def _set_number(module: nn.Module, attribute: str, value: int) -> None:
    """Set `name`, or `config.name`, in a copy of the config that the module shares with all others until then."""
    own, _, name = attribute.rpartition(".")
    if own:
        setattr(module, own, copy.copy(getattr(module, own)))
    setattr(getattr(module, own) if own else module, name, value)


def _remove_parts(model: nn.Module, parts: Sequence[str]) -> dict[str, list[int]]:
    """Remove whole modules, and return for each stack of layers the old indices of those that are left."""
    stacks, left = defaultdict(set), {}
    for part in parts:
        parent, _, attribute = part.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, (nn.ModuleList, nn.Sequential)):
            stacks[parent].add(int(attribute))
            continue
        setattr(owner, attribute, None)
        for container in (getattr(owner, "residuals", {}), getattr(owner, "norms", {})):
            if attribute in container:
                del container[attribute]
        stack, _, index = parent.rpartition(".")
        if all(getattr(owner, sublayer, None) is None for sublayer in ("self_attn", "mlp")):
            stacks[stack].add(int(index))
    for name, gone in stacks.items():
        stack = model.get_submodule(name)
        left[name] = [i for i in range(len(stack)) if i not in gone]
        for index in sorted(gone, reverse=True):
            del stack[index]
        renumber_layers(model, stack)
    if not stacks:
        renumber_layers(model, ())
    return left


def _write_config(model: nn.Module, report: PruningReport, left: Mapping[str, list[int]]) -> None:
    """Write sizes and provenance into the config, or the provenance into `model.pruned` if there is no config."""
    config, before = config_of(model), provenance_of(model) or {}
    provenance = {
        "method": report.method,
        "target_sparsity": report.target_sparsity,
        "sparsity": report.sparsity,
        "parameters_before": before.get("parameters_before", report.parameters_before),
        "kept": _compose(before.get("kept", {}), report, left),
    }
    if config is None:
        model.pruned = provenance
        return
    write_config(model, left)
    config.pruning = provenance
    write_record(model)


def _compose(before: Mapping[str, str], report: PruningReport, left: Mapping[str, list[int]]) -> dict[str, str]:
    """Original indices of what is left, under the present names of the groups."""
    kept = dict(before)
    for name, indices in report.kept.items():
        if name in before:
            originals = from_ranges(before[name], at_most=report.units[name][1])
            indices = [originals[i] for i in indices]
        kept[name] = to_ranges(indices)
    renamed = {_rename(name, left): ranges for name, ranges in kept.items()}
    return {name: ranges for name, ranges in renamed.items() if name is not None}


def _rename(name: str, left: Mapping[str, list[int]]) -> str | None:
    for stack, indices in left.items():
        match = re.match(rf"{re.escape(stack)}\.(\d+)(?=\.|$)", name)
        if match:
            old = int(match[1])
            return f"{stack}.{indices.index(old)}{name[match.end() :]}" if old in indices else None
    return name


def carry_state_(optimizer: torch.optim.Optimizer, model: nn.Module, replaced: Mapping) -> None:
    """Let an optimiser continue with the parameters that are left, with its state cut like them.

    State with the shape of its parameter is cut; numbers stay; the state of a cut parameter starts anew if it has other tensors (factored moments). Parameters
    that are no longer in the model leave their groups, and groups that become empty leave the optimiser.
    """
    optimizer = unwrapped(optimizer)
    present = set(model.parameters())
    for group in optimizer.param_groups:
        for old in list(group["params"]):
            state = optimizer.state.pop(old, None)
            new, entries = replaced.get(old, (old, {}))
            if new in present and state is not None:
                cut = {key: _cut_state(value, old.shape, entries) for key, value in state.items()}
                optimizer.state[new] = cut if all(value is not None for value in cut.values()) else {}
        group["params"] = [new for new in (replaced.get(p, (p,))[0] for p in group["params"]) if new in present]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _cut_state(value: Any, shape: torch.Size, entries: Mapping[int, torch.Tensor]) -> Any:
    if not isinstance(value, torch.Tensor) or value.numel() == 1 and shape.numel() != 1:
        return value
    if value.shape == shape:
        return _take(value, entries)
    return None if entries else value


@torch.no_grad()
def _fold_constants(model, by_name, kept, constants: Mapping[str, torch.Tensor]) -> None:
    for name, values in constants.items():
        if name not in kept:
            continue  # a group that is not named stays whole
        for reader in by_name[name].readers:
            module = model.get_submodule(reader.tensor.rpartition(".")[0])
            if module.bias is None:
                raise ValueError(f"got constants for {name!r}, but {reader.tensor} has no bias that could hold them.")
            gone = torch.ones(by_name[name].num_units).index_fill_(0, kept[name], 0.0)
            values = (values.cpu() * gone.repeat_interleave(reader.size)).to(module.weight)
            weight = (
                module.weight.movedim(reader.dim, 1).flatten(2).sum(2) if module.weight.ndim > 2 else module.weight
            )
            module.bias += weight @ values if reader.dim == 1 else values @ weight


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside the wrapper of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)
