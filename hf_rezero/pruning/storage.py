"""Saving pruned modules that are no models of transformers, and loading them by repeating the surgery; old folders too."""

from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file, save_model
from torch import nn

from ..files import read_json, write_json, written_whole
from ..structure.modules import config_of, provenance_of
from ..structure.states import check_tensors
from .masks import masks_of
from .report import from_ranges
from .rules import TARGETS, search
from .surgery import prune_


def save_pruned(model: nn.Module, folder: str | PathLike) -> None:
    """Save weights and what was kept: through `save_pretrained` where the model has it, else as two files.

    What the first writes loads through AutoModel, with this library imported or with `trust_remote_code=True`.

    Raises:
        ValueError: Masks are still attached, or nothing was pruned.
    """
    if masks_of(model) is not None:
        raise ValueError("masks are attached to the model: remove_pruned_ first.")
    provenance = provenance_of(model)
    if provenance is None:
        raise ValueError("nothing was pruned: save the model as you always do.")
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    folder = Path(folder)
    with written_whole(folder / "model.safetensors") as temporary:
        save_model(model, str(temporary))
    write_json(folder / "pruning.json", provenance)


def load_pruned(folder: str | PathLike, model: nn.Module) -> nn.Module:
    """Cut a model that was just built to the shapes saved in `folder`, and load the weights.

    Args:
        folder: What `save_pruned` wrote.
        model: A model with the shapes from before pruning; changed in place. For a model of transformers:
            `AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))`.

    Raises:
        ValueError: The folder holds no pruned model, or not one of this architecture, or a tensor of another kind or with
            values that are not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hf_rezero.pruning import find_groups, load_pruned, prune_, save_pruned
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = build()
        >>> report = prune_(net, find_groups(net), {"0": torch.tensor([1, 5])})
        >>> save_pruned(net, "outputs/pruned")
        >>> torch.equal(load_pruned("outputs/pruned", build())(torch.ones(1, 4)), net(torch.ones(1, 4)))
        True
    """
    replay_(model, read_provenance(folder))
    state = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(path)
    own = model.state_dict()
    check_tensors(state, own, str(folder))
    other = [name for name, tensor in state.items() if name in own and own[name].shape != tensor.shape]
    if other:
        raise ValueError(
            f"{folder} does not fit {type(model).__name__}: {other[0]} has the shape {tuple(state[other[0]].shape)}, "
            f"expected {tuple(own[other[0]].shape)}. Build the model as it was before pruning."
        )
    missing, unexpected = _load(model, state)
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not fit {type(model).__name__}: missing {missing[:3]}, unexpected {unexpected[:3]}. "
            f"Build the model as it was before pruning."
        )
    return model


def read_provenance(folder: str | PathLike) -> dict:
    """What `prune_` wrote of the model in a folder: the method, and the kept units by group.

    Raises:
        ValueError: There is no pruned model.
    """
    own, config = Path(folder, "pruning.json"), Path(folder, "config.json")
    provenance = read_json(own) if own.exists() else read_json(config).get("pruning")
    if not provenance:
        raise ValueError(f"{folder} holds no pruned model: expected what save_pruned wrote.")
    if not (isinstance(provenance, dict) and isinstance(provenance.get("kept"), dict)):
        raise ValueError(f"{folder} says {provenance!r:.80} of its pruning: expected the kept units by group.")
    return provenance


def replay_(model: nn.Module, provenance: dict) -> None:
    """Remove from a model that was just built what was removed from the saved one, layers first."""
    ranges = provenance["kept"]
    holder, attribute = (model, "pruned") if config_of(model) is None else (model.config, "pruning")
    setattr(holder, attribute, None)
    for targets in (("layers",), ("sublayers",), tuple(t for t in TARGETS if t not in ("layers", "sublayers"))):
        groups = [
            group
            for found in search(model, targets, checked=False).values()
            for group in found
            if group.name in ranges
        ]
        kept = {group.name: from_ranges(ranges[group.name], at_most=group.num_units) for group in groups}
        # a config may have said already how many layers there are
        larger = [group for group in groups if len(kept[group.name]) < group.num_units]
        if larger:
            prune_(model, larger, {g.name: torch.tensor(kept[g.name], dtype=torch.long) for g in larger})
    setattr(holder, attribute, provenance)


def _load(model: nn.Module, state: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Load the weights; returns the names that are missing, but for tied ones, and those that were not expected."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tensors = model.state_dict()
    loaded = {tensors[name].data_ptr() for name in state if name in tensors}
    return [name for name in missing if tensors[name].data_ptr() not in loaded], list(unexpected)
