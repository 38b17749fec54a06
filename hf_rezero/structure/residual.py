"""Stacks of layers, and what switches a residual branch off."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from .architectures import ARCHITECTURES, Architecture, ResidualLayer
from .cuts import rows
from .modules import child, config_of, is_linear, join
from .parameters import is_resweight


def stacks(model: nn.Module, at_least: int = 2) -> Iterator[tuple[str, nn.Module]]:
    """The lists of `at_least` modules, by name."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= at_least:
            yield name, module


def residual_stacks(model: nn.Module) -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    """The stacks whose layers can be switched off: the name of each stack, and the gates of its layers by their names."""
    for name, stack in stacks(model):
        gates = {join(name, str(i)): gates_of(model, join(name, str(i)), layer) for i, layer in enumerate(stack)}
        if any(gates.values()):
            yield name, {layer: tensors for layer, tensors in gates.items() if tensors}


def gates_of(model: nn.Module, name: str, layer: nn.Module) -> tuple[str, ...]:
    """The tensors that switch a whole layer off, leaving the identity; empty if there are none."""
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
    if row is None or any(is_norm(child(layer, norm)) for norm in row[1].stream_norms):
        return ()
    return tuple(
        tensor for writer in row[1].writers for tensor in _gates_of_writer(join(name, writer), child(layer, writer))
    )


def _gates_of_writer(name: str, writer: nn.Module) -> tuple[str, ...]:
    """Its residual weight where it has one, else all that it writes."""
    if hasattr(writer, "resweight"):
        return (join(name, "resweight"),)
    return tuple(cut.tensor for cut in rows(name, writer))


def row_of(layer: nn.Module) -> tuple[Architecture, ResidualLayer] | None:
    """What the table says of a layer: of the rows whose writers it has, the one that names the most of its parts."""

    def found(row: tuple[Architecture, ResidualLayer]) -> int:
        return sum(child(layer, part) is not None for parts in row[1] for part in parts)

    rows = [(a, described) for a in ARCHITECTURES.values() for described in a.layers]
    fitting = [row for row in rows if all(is_linear(child(layer, writer)) for writer in row[1].writers)]
    return max(fitting, key=found, default=None)


def is_norm(module: nn.Module | None) -> bool:
    """Whether a norm is there and was not replaced by the identity."""
    return module is not None and not isinstance(module, nn.Identity)


def is_residual(config) -> bool:
    """Whether a branch that is switched off leaves its input unchanged."""
    norm_position = getattr(config, "norm_position", "none")
    by_depth = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    cross = getattr(config, "add_cross_attention", False)
    if getattr(config, "activation_position", None) == "sum" and config.hidden_act != "relu":
        return False  # act(x + 0) is x behind another activation only where it is relu
    return norm_position in ("none", "pre") and getattr(config, "skip_connection", True) and not by_depth and not cross


def renumber_layers(model: nn.Module, stack: Iterable[nn.Module]) -> None:
    """Give the layers of a stack, whose number has changed, their places in the cache."""
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    for module in model.modules():
        if callable(number := getattr(module, "number_attention_layers", None)):
            number()


def write_config(model: nn.Module, num_layers: int | None) -> None:
    """Describe the sizes that the model has now, if the config has words for them."""
    config = config_of(model)
    if callable(sync := getattr(model, "sync_config", None)):
        sync()
    elif num_layers is not None and hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = num_layers
