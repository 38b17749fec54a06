"""What can be cut out of a model together: the rules that find its groups."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from torch import nn

from ..structure.architectures import ARCHITECTURES, HEAD_ATTRIBUTES
from ..structure.cuts import Cut, columns, rows
from ..structure.modules import (
    BATCH_NORM,
    can_lack_sublayers,
    child,
    config_of,
    is_conv1d,
    is_linear,
    join,
    output_dim,
)
from ..structure.parameters import check_plain
from ..structure.residual import is_residual, residual_stacks, stacks
from .groups import PruningGroup


UNITS = ("heads", "neurons", "channels")


TARGETS = (*UNITS, "layers", "sublayers", "width")


PASSING = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus),
    *(nn.Hardswish, nn.Mish, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)


def find_groups(model: nn.Module, targets: Sequence[str] | None = None) -> list[PruningGroup]:
    """Everything of the wanted kinds that can be removed exactly.

    - heads: whole key/value groups of every attention with separate projections, or GPT-2's fused one
    - neurons: of feed-forward layers, gated or not, and of linear layers that follow each other in a `Sequential`
    - channels: of convolutions that follow each other in a `Sequential` or a residual block; sums are left alone
    - layers, sublayers: residual branches that their own residual weight or last projection can switch off
    - width: features of the residual stream of a ReZero text model without norm

    Args:
        model: ReZero models, GPT-2, BERT, RoBERTa, DistilBERT, Llama and its like, conv nets of `Sequential`s and
            residual blocks; other models by `PruningGroup`s of your own.
        targets: Any of heads, neurons, channels, layers, sublayers, width; by default what the model has of the first
            three.

    Raises:
        ValueError: An unknown target, one for which no rule finds anything in this model, or quantised or sharded
            weights.

    Example:
        >>> from torch import nn
        >>> from hf_rezero.pruning import find_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> [(group.name, group.kind, group.num_units) for group in find_groups(net)]
        [('3', 'neurons', 5), ('0', 'channels', 8)]
    """
    wanted = UNITS if targets is None else tuple(targets)
    if not wanted or not set(wanted) <= set(TARGETS):
        raise ValueError(f"got targets={wanted}: expected some of {', '.join(TARGETS)}.")
    check_plain(model)
    found = search(model, wanted)
    missing = [target for target, groups in found.items() if not groups]
    if missing and (targets is not None or len(missing) == len(found)):
        raise ValueError(
            f"no rule finds {', '.join(missing)} in {type(model).__name__}: leave them out of the targets, or describe "
            f"them in PruningGroups of your own."
        )
    return [group for groups in found.values() for group in groups]


def search(model: nn.Module, targets: Sequence[str]) -> dict[str, list[PruningGroup]]:
    """What the rules find, by target in the order of `TARGETS`; empty where they find nothing."""
    rules: dict[str, Callable[[nn.Module], Iterable[PruningGroup]]] = {
        "heads": _heads,
        "neurons": _neurons,
        "channels": _channels,
        "layers": _layers,
        "sublayers": _sublayers,
        "width": _width,
    }
    return {target: list(rules[target](model)) for target in TARGETS if target in targets}


def _heads(model: nn.Module) -> Iterator[PruningGroup]:
    if getattr(config_of(model), "add_cross_attention", False):
        return  # a config has one head count for the two attentions of a layer
    for name, module in model.named_modules():
        for architecture in ARCHITECTURES.values():
            parts = [child(module, part) for part in architecture.attention]
            # an attention inside an attention module is found by the inner one
            if parts and all(isinstance(part, nn.Linear) for part in parts):
                yield _separate_heads(name, module, architecture.attention)
                break
            if _is_fused(module, architecture.fused_attention):
                yield _fused_heads(name, module, *architecture.fused_attention)
                break


def _is_fused(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether the module is a self-attention with the fused projection of GPT-2, a `Conv1D`."""
    is_cross = getattr(module, "is_cross_attention", False)
    return bool(names) and is_conv1d(child(module, names[0])) and not is_cross


def _separate_heads(name: str, module: nn.Module, names: Sequence[str]) -> PruningGroup:
    q, k, v, o = (child(module, part) for part in names)
    owner = "self" if names[0].startswith("self.") else ""
    inner = child(module, owner) if owner else module
    head_dim = getattr(inner, "head_dim", None) or inner.attention_head_size
    units = k.out_features // head_dim
    in_group = q.out_features // k.out_features
    sizes = zip(names, (q, k, v), (head_dim * in_group, head_dim, head_dim), strict=False)
    cuts = [cut for part, linear, size in sizes for cut in rows(join(name, part), linear, size)]
    attributes = [
        (join(name, owner), attribute, 1 if attribute == "num_key_value_heads" else in_group)
        for attribute in HEAD_ATTRIBUTES
        if hasattr(inner, attribute)
    ]
    if hasattr(inner, "all_head_size"):
        attributes.append((join(name, owner), "all_head_size", head_dim))
    readers = (columns(join(name, names[3]), o, head_dim * in_group),)
    return PruningGroup(name, "heads", units, readers, tuple(cuts), tuple(attributes))


def _fused_heads(name: str, module: nn.Module, fused: str, output: str) -> PruningGroup:
    head_dim, width, projection = module.head_dim, module.split_size, child(module, fused)
    cuts = [cut for third in range(3) for cut in rows(join(name, fused), projection, head_dim, third * width)]
    readers = (columns(join(name, output), child(module, output), head_dim),)
    attributes = ((name, "num_heads", 1), (name, "split_size", head_dim))
    return PruningGroup(name, "heads", width // head_dim, readers, tuple(cuts), attributes)


def _neurons(model: nn.Module) -> Iterator[PruningGroup]:
    for name, module in model.named_modules():
        for producers, reader in (pair for a in ARCHITECTURES.values() for pair in a.feed_forwards):
            found = [child(module, part) for part in (*producers, reader)]
            if all(is_linear(part) for part in found):
                cuts = [
                    cut
                    for part, linear in zip(producers, found, strict=False)
                    for cut in rows(join(name, part), linear)
                ]
                readers = (columns(join(name, reader), found[-1]),)
                units = found[0].weight.shape[output_dim(found[0])]
                yield PruningGroup(name, "neurons", units, readers, tuple(cuts))
                break
    yield from (group for group in _chains(model) if group.kind == "neurons")


def _channels(model: nn.Module) -> Iterator[PruningGroup]:
    yield from (group for group in _chains(model) if group.kind == "channels")


def _chains(model: nn.Module) -> Iterator[PruningGroup]:
    """Layers that feed each other and nothing else, in the longest chains that hold them."""
    seen: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in seen:
            yield from _chain_groups(list(_chain(name, module, seen)))


def _is_chain(module: nn.Module) -> bool:
    """Whether the children run one after the other: a `Sequential`, or convolution - normalization - activation."""
    names = [name for name, _ in module.named_children()]
    runs_all = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return runs_all or names[:2] == ["convolution", "normalization"]


def _chain(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The leaves that run in a row: of a `Sequential`, or the branch conv1, norm, ..., conv2 of a residual block."""
    seen.add(module)
    children = list(module.named_children())
    if not _is_chain(module):
        numbered = re.compile(r"(conv|bn|norm|act|relu)\d*")
        children = [pair for pair in children if numbered.fullmatch(pair[0])]
        if sum(isinstance(m, nn.modules.conv._ConvNd) for _, m in children) < 2:
            return
    for part, leaf in children:
        if _is_chain(leaf):
            yield from _chain(join(name, part), leaf, seen)
        else:
            yield join(name, part), leaf


def _chain_groups(leaves: Sequence[tuple[str, nn.Module]]) -> Iterator[PruningGroup]:
    layers = [i for i, (_, leaf) in enumerate(leaves) if _has_units(leaf)]
    for first, last in pairwise(layers):
        between = leaves[first + 1 : last]
        if all(_passes(leaf) for _, leaf in between):
            yield _chain_group(leaves[first], between, leaves[last])


def _has_units(module: nn.Module) -> bool:
    is_plain_conv = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed and module.groups == 1
    return is_plain_conv or isinstance(module, nn.Linear)


def _passes(module: nn.Module) -> bool:
    """Whether the module acts on each channel by itself, without parameters other than those of a batch norm."""
    is_activation = type(module).__module__ == "transformers.activations"
    return isinstance(module, (*PASSING, BATCH_NORM)) or is_activation


def _chain_group(producer, between, reader) -> PruningGroup:
    (name, layer), (reader_name, next_layer) = producer, reader
    units = layer.weight.shape[0]
    cuts = list(rows(name, layer))
    for norm_name, norm in between:
        tensors = ("weight", "bias", "running_mean", "running_var") if isinstance(norm, BATCH_NORM) else ()
        cuts += [Cut(join(norm_name, t), 0) for t in tensors if getattr(norm, t) is not None]
    # a flattened picture has height * width columns for each channel
    reads = columns(reader_name, next_layer, next_layer.weight.shape[1] // units)
    kind = "neurons" if isinstance(layer, nn.Linear) else "channels"
    return PruningGroup(name, kind, units, (reads,), tuple(cuts))


def _layers(model: nn.Module) -> Iterator[PruningGroup]:
    for name, gates in residual_stacks(model):
        yield PruningGroup(name, "layers", len(gates), parts=tuple(gates), gates=tuple(gates.values()))


def _sublayers(model: nn.Module) -> Iterator[PruningGroup]:
    """Attentions and feed-forward layers one by one, where a layer can do without (its attribute may be None)."""
    config = config_of(model)
    if not can_lack_sublayers(model) or not is_residual(config):
        return
    for name, stack in stacks(model):
        for kind, last in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            found = [
                (join(name, str(i), kind), child(layer, f"{kind}.{last}"))
                for i, layer in enumerate(stack)
                if is_linear(child(layer, f"{kind}.{last}"))
            ]
            if len(found) > 1:
                gates = tuple(tuple(cut.tensor for cut in rows(join(part, last), p)) for part, p in found)
                parts = tuple(part for part, _ in found)
                yield PruningGroup(f"{name}.*.{kind}", "sublayers", len(found), parts=parts, gates=gates)


def _width(model: nn.Module) -> Iterator[PruningGroup]:
    """The residual stream: all that writes to it and all that reads from it; exact only without any norm."""
    config = config_of(model)
    exact = can_lack_sublayers(model) and not getattr(config, "add_cross_attention", False)
    exact = exact and config.norm_position == "none" and not config.final_norm
    if not exact or config.position_embedding_type == "sinusoidal":
        return
    readers, cuts = [], []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "up_proj", "lm_head", "score"):
            readers.append(columns(name, module))
        elif last in ("o_proj", "down_proj"):
            cuts += rows(name, module)
        elif isinstance(module, nn.Embedding):
            cuts.append(Cut(f"{name}.weight", 1))
    yield PruningGroup("", "width", config.hidden_size, tuple(readers), tuple(cuts))
