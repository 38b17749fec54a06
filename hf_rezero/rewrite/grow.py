"""Deeper models from trained ones: new layers that are the identity when they are put in."""

from collections.abc import Sequence

import torch
from torch import nn

from ..structure.modules import copy_of
from ..structure.parameters import check_plain
from ..structure.reset import reinitialize_
from ..structure.residual import normalises_sums, renumber_layers, residual_stacks, write_config, writers_of
from .record import write_record


INITS = ("random", "copy")


@torch.no_grad()
def grow_(
    model: nn.Module,
    num_layers: int | None = None,
    *,
    after: Sequence[int] | None = None,
    stack: str | None = None,
    init: str = "random",
    optimizer: torch.optim.Optimizer | None = None,
) -> list[int]:
    """Put new layers into a trained model, which computes what it did, to the bit.

    A new layer has the sizes of the layer before it, fresh weights, and residual weights of 0, x + 0 F(x) = x
    (Bachlechner et al. 2020, section 3); in pre-norm models without residual weights, or with frozen ones, the last
    projections are 0. `init="copy"` takes the weights of the layer before it instead of fresh ones, again with gates or
    last projections of 0 (block expansion, Wu et al. 2024, arXiv:2401.02415, section 3.2).

    Args:
        model: A ReZero or pre-norm model of a family in the table of architectures, changed in place with its config;
            layers that only change their input by a residual branch.
        num_layers: Layers to add, evenly spread over the depth.
        after: Instead: indices of the present layers behind each of which one is added; repeated for several.
        stack: Name of the list of layers, where a model has several, such as an encoder and a decoder.
        init: "random" or "copy", what the new layers start from behind what is 0.
        optimizer: Takes the new parameters into the groups of their neighbours; the state of the others stays.

    Returns:
        The indices of the new layers in the larger stack.

    Raises:
        ValueError: Not exactly one of `num_layers` and `after`, an index out of range, no or several stacks, a post-norm
            model, another `init`, or frozen residual weights with nothing else that could start at 0.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM, grow_
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()
        >>> ids = torch.arange(8)[None]
        >>> before = model(ids).logits
        >>> grow_(model, 4)
        [1, 2, 4, 5]
        >>> torch.equal(model(ids).logits, before), model.config.num_hidden_layers
        (True, 6)
    """
    if init not in INITS:
        raise ValueError(f"got init={init!r}: expected {' or '.join(map(repr, INITS))}.")
    name, found = _find_stack(model, stack)
    old = model.get_submodule(name)
    allowed = {
        int(layer.rpartition(".")[2]): [gate.removeprefix(f"{layer}.") for gate in gates]
        for layer, gates in found.items()
    }
    places = _places(len(old), sorted(allowed), num_layers, after)
    barred = sorted(set(places) - set(allowed))
    if barred:
        raise ValueError(f"got after={barred}: expected layers that keep the shape of their input, {sorted(allowed)}.")
    layers, origins, new = [], [], []
    for index, layer in enumerate(list(old)):
        layers.append(layer)
        origins += [index] * (1 + places.count(index))
        for _ in range(places.count(index)):
            layers.append(_identity_layer(model, layer, allowed[index], init))
            new.append(len(layers) - 1)
            if optimizer is not None:
                _join_groups(optimizer, layer, layers[-1])
    _replace(model, name, layers)
    write_config(model, {name: origins})
    write_record(model)
    return new


def _find_stack(model: nn.Module, stack: str | None) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The name of the stack to grow, and the gates of its layers."""
    check_plain(model)
    found = dict(residual_stacks(model))
    if not found:
        normalises = normalises_sums(model)
        why = (
            f" {normalises} normalises the sum x + F(x), which F = 0 leaves no identity (post-norm)."
            if normalises
            else ""
        )
        raise ValueError(
            f"no rule finds layers in {type(model).__name__}: a layer can be added where its residual branches can be "
            f"switched off.{why}"
        )
    if stack is None and len(found) == 1:
        stack = next(iter(found))
    if stack not in found:
        raise ValueError(f"got stack={stack!r}: expected one of {', '.join(found)}.")
    return stack, found[stack]


def _places(depth: int, allowed: Sequence[int], num_layers: int | None, after: Sequence[int] | None) -> list[int]:
    """The layer behind which each new one goes."""
    if (num_layers is None) == (after is None):
        raise ValueError("give exactly one of `num_layers` and `after`.")
    if after is None:
        if num_layers < 1:
            raise ValueError(f"got num_layers={num_layers}: expected at least 1.")
        return [allowed[i * len(allowed) // num_layers] for i in range(num_layers)]
    wrong = [index for index in after if not 0 <= index < depth]
    if wrong or not after:
        raise ValueError(f"got after={list(after)}: expected indices from 0 to {depth - 1}.")
    return list(after)


def _identity_layer(model: nn.Module, neighbour: nn.Module, gates: Sequence[str], init: str) -> nn.Module:
    layer = copy_of(neighbour)
    if init == "random":
        reinitialize_(layer, getattr(model, "_init_weights", None))
    tensors = dict(layer.named_parameters())
    if not any(tensors[gate].requires_grad for gate in gates):
        gates = [name for name in tensors if name.rpartition(".")[0] in writers_of(layer)]
        if not gates:
            raise ValueError(
                "the residual weights are frozen: a new layer could never leave 0. Set config.resweight_trainable "
                "and `requires_grad` of the residual weights to True, or grow another model."
            )
    for gate in gates:
        tensors[gate].zero_()
    for parameter in layer.parameters():
        parameter.grad = None
    return layer


def _join_groups(optimizer: torch.optim.Optimizer, neighbour: nn.Module, layer: nn.Module) -> None:
    """Each new parameter into the group that has the same parameter of the neighbour."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for old, new in zip(neighbour.parameters(), layer.parameters(), strict=True):
        if old in group_of:
            group_of[old]["params"].append(new)


def _replace(model: nn.Module, name: str, layers: list[nn.Module]) -> None:
    stack = model.get_submodule(name)
    while len(stack):
        del stack[-1]
    stack.extend(layers)
    renumber_layers(model, stack)
