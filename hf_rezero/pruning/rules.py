"""What can be cut out of a model together: the rules that find its groups."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from torch import nn

from ..structure.architectures import (
    ARCHITECTURES,
    HEAD_ATTRIBUTES,
    HEAD_SIZES,
    WIDTH_ATTRIBUTES,
    Architecture,
    FeedForward,
    FusedAttention,
)
from ..structure.cuts import Cut, columns, rows
from ..structure.modules import (
    BATCH_NORM,
    can_lack_sublayers,
    child,
    config_of,
    is_linear,
    join,
    output_dim,
)
from ..structure.parameters import check_plain
from ..structure.residual import is_residual, normalises_sums, residual_stacks, stacks
from .exactness import inexact
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

    - heads: whole key/value groups of every attention, with separate or fused projections; in T5 those of all layers of a
      stack together, which share a position bias
    - neurons: of feed-forward layers, gated or not, fused or not, and of linear layers that follow each other in a
      `Sequential`
    - channels: of convolutions that follow each other in a `Sequential` or a residual block; sums are left alone
    - layers, sublayers: residual branches that their own residual weight or last projections can switch off, so never
      those of post-norm models
    - width: features of the residual stream of a ReZero text model without norm

    What the table of architectures says of a model of transformers is checked by a small run of it: a group whose units
    do not go exactly, or a layer that is not the identity without its branches, is not found.

    Args:
        model: A model of a family in the table `hf_rezero.structure.architectures`, or of convolutions in `Sequential`s
            and residual blocks; other models by a row of your own in that table, or by `PruningGroup`s.
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
    wrong = inexact(model, [group for kind in UNITS for group in found.get(kind, ())])
    found = {target: [group for group in groups if group.name not in wrong] for target, groups in found.items()}
    missing = [target for target, groups in found.items() if not groups]
    if missing and (targets is not None or len(missing) == len(found)):
        raise ValueError(
            f"no rule finds {', '.join(missing)} in {type(model).__name__}: leave them out of the targets, or describe "
            f"them in PruningGroups of your own.{_about_layers(model) if 'layers' in missing else ''}"
        )
    return [group for groups in found.values() for group in groups]


def _about_layers(model: nn.Module) -> str:
    """Why a model whose layers have branches has none that can go."""
    normalises = normalises_sums(model)
    if normalises is None:
        return ""
    return f" {normalises} normalises the sum x + F(x), so that a layer without F is not the identity (post-norm)."


def search(model: nn.Module, targets: Sequence[str], checked: bool = True) -> dict[str, list[PruningGroup]]:
    """What the rules find, by target in the order of `TARGETS`; empty where they find nothing.

    A small run checks the layers, unless `checked` is False, as for a model whose weights are still to come.
    """
    rules: dict[str, Callable[[nn.Module], Iterable[PruningGroup]]] = {
        "heads": _heads,
        "neurons": _neurons,
        "channels": _channels,
        "layers": partial(_layers, checked=checked),
        "sublayers": _sublayers,
        "width": _width,
    }
    return {target: list(rules[target](model)) for target in TARGETS if target in targets}


def _heads(model: nn.Module) -> Iterator[PruningGroup]:
    if getattr(config_of(model), "add_cross_attention", False):
        return  # a config has one head count for the two attentions of a layer
    tied: set[str] = set()
    for architecture in ARCHITECTURES.values():
        for group, members in _tied_heads(model, architecture):
            tied |= members
            yield group
    for name, module in model.named_modules():
        found = (_heads_of(name, module, a) for a in ARCHITECTURES.values() if name not in tied)
        group = next((group for group in found if group is not None), None)
        if group is not None:
            yield group


def _heads_of(name: str, module: nn.Module, architecture: Architecture) -> PruningGroup | None:
    """The heads of an attention with separate projections, or with a fused one."""
    parts = [child(module, part) for part in architecture.attention]
    if parts and all(isinstance(part, nn.Linear) for part in parts):
        return _separate_heads(name, module, architecture.attention)
    is_cross = getattr(module, "is_cross_attention", False)
    fused = FusedAttention(*architecture.fused_attention) if architecture.fused_attention else None
    if fused and not is_cross and all(is_linear(child(module, part)) for part in (fused.projection, fused.output)):
        return _fused_heads(name, module, fused)
    return None


def _separate_heads(name: str, module: nn.Module, names: Sequence[str]) -> PruningGroup | None:
    q, k, v, o = (child(module, part) for part in names)
    owner = "self" if names[0].startswith("self.") else ""
    inner = child(module, owner) if owner else module
    size = _head_size(inner)
    if size is None:
        return None
    units, in_group = k.out_features // size, q.out_features // k.out_features
    sizes = zip(names, (q, k, v), (size * in_group, size, size), strict=False)
    cuts = [cut for part, linear, rows_of_unit in sizes for cut in rows(join(name, part), linear, rows_of_unit)]
    readers = (columns(join(name, names[3]), o, size * in_group),)
    return PruningGroup(name, "heads", units, readers, tuple(cuts), _counts(join(name, owner), inner, in_group, size))


def _fused_heads(name: str, module: nn.Module, fused: FusedAttention) -> PruningGroup | None:
    size, projection, output = _head_size(module), child(module, fused.projection), child(module, fused.output)
    queries = output.weight.shape[1 - output_dim(output)]
    keys = (projection.weight.shape[output_dim(projection)] - queries) // 2
    if size is None or keys < size or queries % keys:
        return None
    in_group, path = queries // keys, join(name, fused.projection)
    if fused.by_head:
        cuts = tuple(rows(path, projection, 3 * size))
    else:
        places = ((size * in_group, 0), (size, queries), (size, queries + keys))
        cuts = tuple(cut for rows_of_unit, start in places for cut in rows(path, projection, rows_of_unit, start))
    attributes = _counts(name, module, in_group, size)
    if fused.counts_in_config:
        attributes += ((name, "config.num_attention_heads", in_group),)
    readers = (columns(join(name, fused.output), output, size * in_group),)
    return PruningGroup(name, "heads", keys // size, readers, cuts, attributes)


def _head_size(attention: nn.Module) -> int | None:
    """The features of a head."""
    sizes = (getattr(attention, attribute, None) for attribute in HEAD_SIZES)
    return next((size for size in sizes if isinstance(size, int)), None)


def _counts(name: str, attention: nn.Module, in_group: int, size: int) -> tuple[tuple[str, str, int], ...]:
    """The numbers of heads, and of their features, that an attention keeps."""
    amounts = {a: 1 if a == "num_key_value_heads" else in_group for a in HEAD_ATTRIBUTES}
    amounts |= dict.fromkeys(WIDTH_ATTRIBUTES, size * in_group)
    return tuple((name, attribute, amount) for attribute, amount in amounts.items() if hasattr(attention, attribute))


def _tied_heads(model: nn.Module, architecture: Architecture) -> Iterator[tuple[PruningGroup, set[str]]]:
    """Heads of all layers of a stack together, with their column of the table of position biases."""
    for stack, layers in stacks(model, at_least=1) if architecture.tied_heads else ():
        for path, table in architecture.tied_heads:
            names = [join(stack, str(i), path) for i, layer in enumerate(layers) if child(layer, path) is not None]
            heads = [_heads_of(name, model.get_submodule(name), architecture) for name in names]
            groups = [group for group in heads if group is not None]
            if not groups or len({group.num_units for group in groups}) > 1:
                continue
            tables = [join(name, table, "weight") for name in names if child(model.get_submodule(name), table)]
            yield (
                PruningGroup(
                    f"{stack}.*.{path}",
                    "heads",
                    groups[0].num_units,
                    tuple(reader for group in groups for reader in group.readers),
                    tuple(cut for group in groups for cut in group.cuts) + tuple(Cut(t, 1) for t in tables),
                    tuple(attribute for group in groups for attribute in group.attributes),
                ),
                set(names),
            )


def _neurons(model: nn.Module) -> Iterator[PruningGroup]:
    for name, module in model.named_modules():
        pairs = (pair for a in ARCHITECTURES.values() for pair in a.feed_forwards)
        group = next((group for pair in pairs if (group := _neurons_of(name, module, pair)) is not None), None)
        if group is not None:
            yield group
    yield from (group for group in _chains(model) if group.kind == "neurons")


def _neurons_of(name: str, module: nn.Module, described: FeedForward) -> PruningGroup | None:
    """The neurons of a feed-forward layer; each producer holds one row for each of them, or k times as many."""
    reader, producers = child(module, described.reader), [child(module, part) for part in described.producers]
    if not is_linear(reader) or not all(is_linear(producer) for producer in producers):
        return None
    units, cuts = reader.weight.shape[1 - output_dim(reader)], []
    for part, producer in zip(described.producers, producers, strict=True):
        held = producer.weight.shape[output_dim(producer)]
        if held % units:
            return None
        for start in range(0, held, units):
            cuts += rows(join(name, part), producer, offset=start)
    return PruningGroup(name, "neurons", units, (columns(join(name, described.reader), reader),), tuple(cuts))


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


def _layers(model: nn.Module, checked: bool) -> Iterator[PruningGroup]:
    for name, gates in residual_stacks(model, checked):
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
