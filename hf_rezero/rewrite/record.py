"""What of a model differs from what transformers builds of its config, read off the modules."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..structure.modules import config_of
from .modeling_rewritten import Gated, Record, ScaledEmbedding, mark_


def write_record(model: nn.Module, **initial: Any) -> None:
    """Let the checkpoints of a model that was changed say how: `config.rewritten`, and the class that reads it.

    A model whose config says everything gets its class of transformers back. Modules that are no models of transformers,
    such as those of this library, which tell their own sizes, are left alone.

    Args:
        model: Changed in place, with its config.
        initial: The fields of the record that say how a new model starts; default: as they are.

    Raises:
        ValueError: The model has something that a record cannot name.
    """
    stock = stock_class(model)
    if stock is not None:
        mark_(model, stock, describe(model, stock, **initial))


def stock_class(model: nn.Module) -> type | None:
    """The class of transformers that a model is of; None for anything else."""
    if not isinstance(model, PreTrainedModel):
        return None
    stock = type(model).original if hasattr(type(model), "original") else type(model)
    return stock if stock.__module__.startswith("transformers.") else None


def describe(model: PreTrainedModel, stock: type, **initial: Any) -> Record:
    """The record of a model, against one that is built of its config without memory for its weights.

    Raises:
        ValueError: A parameter that the other does not have, or a parameter that is not there.
    """
    before = Record.of(model.config) if hasattr(model.config, "rewritten") else Record()
    live, fresh = model.base_model, _stock_build(model, stock).base_model
    modules, originals = (
        dict(live.named_modules(remove_duplicate=False)),
        dict(fresh.named_modules(remove_duplicate=False)),
    )
    gated = {name: module for name, module in modules.items() if isinstance(module, Gated)}
    names = {module: name for name, module in gated.items()}
    gates = {name: name if module.holder is None else names[module.holder[0]] for name, module in gated.items()}
    identities = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Identity) and not isinstance(originals.get(name), nn.Identity)
    ]
    scales = {name: module.embed_scale for name, module in modules.items() if isinstance(module, ScaledEmbedding)}
    shapes = _shapes(live, fresh, gated, identities)
    numbers = _numbers(modules, originals, shapes)
    facts = {"gates": gates, "identities": identities, "scales": scales, "shapes": shapes, "numbers": numbers}
    return replace(before, **facts, **initial)


def _stock_build(model: PreTrainedModel, stock: type) -> PreTrainedModel:
    config = copy.copy(model.config)
    config.__class__ = stock.config_class
    for name in ("rewritten", "original_config_class", "auto_map"):
        vars(config).pop(name, None)
    with torch.device("meta"):
        return stock(config)


def _shapes(live: nn.Module, fresh: nn.Module, gated: dict, identities: list[str]) -> dict[str, list[int]]:
    """The parameters of other shapes than those of the fresh model."""
    have = {name: tuple(p.shape) for name, p in live.named_parameters(remove_duplicate=False)}
    built = {name: tuple(p.shape) for name, p in fresh.named_parameters(remove_duplicate=False)}
    own = {f"{name}.resweight" for name in gated}
    gone = {name for name in built if name.rpartition(".")[0] in identities}
    odd = sorted((have.keys() - own) ^ (built.keys() - gone))
    if odd:
        raise ValueError(
            f"{odd[0]} is {'not in' if odd[0] in built else 'new to'} the model, and a checkpoint of "
            f"{type(live).__name__} cannot say so: expected residual weights, norms that are gone, and other shapes only."
        )
    return {name: list(have[name]) for name in sorted(have.keys() & built.keys()) if have[name] != built[name]}


def _numbers(modules: dict, originals: dict, shapes: dict) -> dict[str, dict[str, int]]:
    """The whole numbers of the modules around the parameters of other shapes, where they differ too."""
    around = {owner for name in shapes for owner in _owners(name)} & originals.keys()
    found = {
        name: _other_numbers(modules[name], originals[name])
        | _other_numbers(config_of(modules[name]), config_of(originals[name]), "config.")
        for name in sorted(around)
    }
    return {name: numbers for name, numbers in found.items() if numbers}


def _other_numbers(live: Any, fresh: Any, prefix: str = "") -> dict[str, int]:
    """The whole numbers of a module, or of its config, that a fresh one has with other values."""
    if live is None or fresh is None:
        return {}
    own, usual = vars(live), vars(fresh)
    return {prefix + k: v for k, v in own.items() if type(v) is int and usual.get(k, v) != v}


def _owners(name: str) -> list[str]:
    """The modules that hold a parameter, inner ones too."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
