"""Stacks of layers, and the tensors that switch a residual branch off."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .architectures import ARCHITECTURES, Architecture, ResidualLayer
from .cuts import rows
from .modules import BATCH_NORM, can_lack_sublayers, child, config_of, is_linear, join
from .parameters import is_resweight
from .probe import changing_layers


def stacks(model: nn.Module, at_least: int = 2) -> Iterator[tuple[str, nn.Module]]:
    """The lists of `at_least` modules, by name."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= at_least:
            yield name, module


def residual_stacks(model: nn.Module, checked: bool = True) -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    """The stacks whose layers can be switched off: the name of each stack, and the gates of its layers by their names.

    A small run of the model checks that each layer is the identity then, unless `checked` is False, as for a model whose
    weights are still to come.
    """
    described = dict(_described_stacks(model))
    if not checked:
        yield from described.items()
        return
    changing = changing_layers(model, {layer: gates for found in described.values() for layer, gates in found.items()})
    for name, found in described.items():
        left = {layer: gates for layer, gates in found.items() if layer not in changing}
        if left:
            yield name, left


def normalises_sums(model: nn.Module) -> str | None:
    """The class of layers that normalise x + F(x), so that they change x whatever F is; None if there are none."""
    found = {layer: gates for _, layers in _described_stacks(model, True) for layer, gates in layers.items()}
    changing = sorted(changing_layers(model, found))
    return type(model.get_submodule(changing[0])).__name__ if changing else None


def _described_stacks(model: nn.Module, post_norm: bool = False) -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    """The stacks whose layers have gates by the table.

    Where a config counts the layers, one that has other tensors than the last of its stack is left out: T5's first makes
    the position bias of all, and ModernBERT's first has no norm, so that no config describes a stack without them.
    """
    alike = config_of(model) is not None and not can_lack_sublayers(model)
    for name, stack in stacks(model):
        layers = {join(name, index): layer for index, layer in stack.named_children()}
        gates = {path: gates_of(model, path, layer, post_norm) for path, layer in layers.items()}
        usual = next((_tensors_of(layers[path]) for path in reversed(gates) if gates[path]), set())
        found = {path: g for path, g in gates.items() if g and not (alike and _tensors_of(layers[path]) != usual)}
        if found:
            yield name, found


def _tensors_of(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_parameters()}


def gates_of(model: nn.Module, name: str, layer: nn.Module, post_norm: bool = False) -> tuple[str, ...]:
    """The tensors that switch a whole layer off, leaving the identity; empty if there are none.

    Args:
        model: The model, whose config is asked.
        name: The name of the layer.
        layer: A layer of the model.
        post_norm: Name those of the branches also where a norm of the sum stays.
    """
    config = config_of(model)
    if not is_residual(config):
        return ()
    shortcuts = (child(layer, "shortcut"), child(layer, "downsample"))
    if not all(shortcut is None or isinstance(shortcut, nn.Identity) for shortcut in shortcuts):
        return ()
    own = re.compile(r"(residuals\.\w+\.)?\w+")
    resweights = tuple(join(name, n) for n, _ in layer.named_parameters() if own.fullmatch(n) and is_resweight(n))
    if resweights:
        return resweights
    row = row_of(layer)
    if row is None or not post_norm and any(is_norm(child(layer, norm)) for norm in row[1].stream_norms):
        return ()
    return tuple(
        tensor for writer in row[1].writers for tensor in _gates_of_writer(join(name, writer), child(layer, writer))
    )


def _gates_of_writer(name: str, writer: nn.Module) -> tuple[str, ...]:
    """The residual weight of a writer if it has one, else all tensors that produce its output."""
    if hasattr(writer, "resweight"):
        return (join(name, "resweight"),)
    return tuple(cut.tensor for cut in rows(name, writer))


def row_of(layer: nn.Module) -> tuple[Architecture, ResidualLayer] | None:
    """The row of the table for a layer: of the rows whose writers it has, the one that names most of its parts."""

    def found(row: tuple[Architecture, ResidualLayer]) -> int:
        return sum(child(layer, part) is not None for parts in row[1] for part in parts)

    rows = [(a, described) for a in ARCHITECTURES.values() for described in a.layers]
    fitting = [row for row in rows if all(_writes(child(layer, writer)) for writer in row[1].writers)]
    return max(fitting, key=found, default=None)


def writers_of(layer: nn.Module) -> tuple[str, ...]:
    """The last projections of the branches that a layer has, also of one that has lost a branch, by the row that fits best."""
    rows = [described.writers for a in ARCHITECTURES.values() for described in a.layers]
    return max((tuple(w for w in row if _writes(child(layer, w))) for row in rows), key=len, default=())


def _writes(module: nn.Module | None) -> bool:
    return is_linear(module) or isinstance(module, BATCH_NORM) and module.affine


def is_norm(module: nn.Module | None) -> bool:
    """Whether there is a norm that was not replaced by the identity."""
    return module is not None and not isinstance(module, nn.Identity)


def is_residual(config) -> bool:
    """Whether a branch that is switched off leaves its input unchanged."""
    norm_position = getattr(config, "norm_position", "none")
    by_depth = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    cross = getattr(config, "add_cross_attention", False)
    if getattr(config, "activation_position", None) == "sum" and config.hidden_act != "relu":
        return False  # x comes from an activation already: act(x + 0) is x only for relu
    return norm_position in ("none", "pre") and getattr(config, "skip_connection", True) and not by_depth and not cross


def renumber_layers(model: nn.Module, stack: Iterable[nn.Module]) -> None:
    """Renumber the layers of a stack for the cache, after their number has changed."""
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    for module in model.modules():
        if callable(number := getattr(module, "number_attention_layers", None)):
            number()


# what configs call the depth of a stack, by a part of its name
DEPTHS = {"encoder": ("encoder_layers", "num_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}


def write_config(model: nn.Module, origins: Mapping[str, Sequence[int]]) -> None:
    """Write the present sizes of the model into its config, if the config has fields for them.

    Args:
        model: The model.
        origins: For each stack whose layers have changed, the former index of each layer that it has now; for a new one
            that of the layer that it was made from.
    """
    config = config_of(model)
    if callable(sync := getattr(model, "sync_config", None)):
        sync()
        return
    for stack, former in origins.items():
        own = config_of(model.get_submodule(stack.rpartition(".")[0]))
        if config is not None:
            _write_depth(config, stack, former)
        if own is not None and own is not config:  # in T5, one stack is all that the config of a stack knows of
            _write_depth(own, "", former)


def _write_depth(config: Any, stack: str, former: Sequence[int]) -> None:
    stage = re.search(r"stages\.(\d+)\.layers$", stack)
    if stage is not None and hasattr(config, "depths"):
        config.depths = [len(former) if i == int(stage[1]) else depth for i, depth in enumerate(config.depths)]
        return
    own = (name for part, names in DEPTHS.items() if part in stack.split(".") for name in names)
    count = next((name for name in (*own, "num_hidden_layers") if hasattr(config, name)), None)
    if count is None:
        return
    before = getattr(config, count)
    for name, value in list(vars(config).items()):
        # such as layer_types: one entry for each layer
        if "layer" in name and isinstance(value, list) and len(value) == before:
            setattr(config, name, [value[index] for index in former])
    setattr(config, count, len(former))
