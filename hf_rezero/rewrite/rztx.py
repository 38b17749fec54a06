"""Weights of the authors' RZTX layers as those of our text models, and back."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..structure.states import check_tensors


# the names of a layer, ours and theirs; query, key and value are one matrix there
NAMES = {
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "linear1",
    "mlp.down_proj": "linear2",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def rztx_to_rezero(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers of a `TransformerEncoder` of `RZTXEncoderLayer`s as those of a `ReZeroModel`.

    The model needs `attention_bias=True`, `mlp_bias=True`, as many heads, and the activation `relu` or `gelu` that the
    stack has; embeddings, positions and heads are not part of such a stack.

    Args:
        state_dict: With `layers.0.self_attn.in_proj_weight` and so on, whatever stands before `layers`.

    Raises:
        ValueError: There are no such layers, or tensors of them that have no place here, as those of decoder
            layers, or tensors that are not floating point or not finite.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroConfig, ReZeroModel, RZTXEncoderLayer
        >>> from hf_rezero.rewrite import rztx_to_rezero
        >>> stack = torch.nn.TransformerEncoder(RZTXEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False)
        >>> shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
        >>> model = ReZeroModel(ReZeroConfig(**shape, hidden_act="relu", attention_bias=True, mlp_bias=True))
        >>> model.load_state_dict(rztx_to_rezero(stack.state_dict()), strict=False).unexpected_keys
        []
    """
    back = {theirs: ours for ours, theirs in NAMES.items()}
    converted = {}
    for layer, name, tensor in _layer_tensors(state_dict):
        module, _, kind = name.rpartition(".")
        if name in ("self_attn.in_proj_weight", "self_attn.in_proj_bias"):
            kind = name.removeprefix("self_attn.in_proj_")
            for projection, part in zip(PROJECTIONS, tensor.chunk(3), strict=True):
                converted[f"layers.{layer}.self_attn.{projection}.{kind}"] = part.clone()
        elif name == "resweight":
            converted[f"layers.{layer}.residuals.layer.resweight"] = tensor.clone()
        elif module in back:
            converted[f"layers.{layer}.{back[module]}.{kind}"] = tensor.clone()
        else:
            raise ValueError(f"got layers.{layer}.{name}: expected the tensors of RZTXEncoderLayer.")
    return converted


def rezero_to_rztx(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers of a ReZero text model as those of a `TransformerEncoder` of `RZTXEncoderLayer`s.

    Biases that the model does without are 0 there. Positions are not part of such a stack: a model with rotary ones
    computes something else there.

    Args:
        state_dict: Of a `ReZeroModel`, or of a model with a head, whose other tensors are left out.

    Raises:
        ValueError: There are no layers, or they have norms, a residual weight for each sublayer, fewer key/value heads
            or a missing sublayer.

    Example:
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM
        >>> from hf_rezero.rewrite import rezero_to_rztx
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=3))
        >>> rezero_to_rztx(model.state_dict())["layers.2.self_attn.in_proj_weight"].shape
        torch.Size([48, 16])
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for layer, name, tensor in _layer_tensors(state_dict):
        layers.setdefault(layer, {})[name] = tensor
    return {
        f"layers.{layer}.{name}": tensor for layer, ours in layers.items() for name, tensor in _to_rztx(layer, ours)
    }


def _to_rztx(layer: int, ours: dict[str, Tensor]):
    """Name and tensor for all of a layer."""
    known = {f"self_attn.{p}" for p in PROJECTIONS} | set(NAMES)
    foreign = [name for name in ours if name.rpartition(".")[0] not in known and name != "residuals.layer.resweight"]
    shapes = [getattr(ours.get(f"self_attn.{p}.weight"), "shape", None) for p in PROJECTIONS]
    missing = [name for name in (*NAMES, "self_attn.q_proj") if f"{name}.weight" not in ours]
    if foreign or missing or len(set(shapes)) > 1 or "residuals.layer.resweight" not in ours:
        raise ValueError(
            f"layer {layer} has {', '.join(foreign) or 'no extra tensors'}, lacks {', '.join(missing) or 'none'} and "
            f"projects to {shapes}: expected one residual weight, no norm, and equal queries, keys and values."
        )
    yield "resweight", ours["residuals.layer.resweight"].clone()
    weights = [ours[f"self_attn.{p}.weight"] for p in PROJECTIONS]
    yield "self_attn.in_proj_weight", torch.cat(weights)
    biases = [ours.get(f"self_attn.{p}.bias", w.new_zeros(len(w))) for p, w in zip(PROJECTIONS, weights, strict=True)]
    yield "self_attn.in_proj_bias", torch.cat(biases)
    for name, theirs in NAMES.items():
        weight = ours[f"{name}.weight"]
        yield f"{theirs}.weight", weight.clone()
        yield f"{theirs}.bias", ours.get(f"{name}.bias", weight.new_zeros(len(weight))).clone()


def _layer_tensors(state_dict: Mapping[str, Tensor]):
    """Layer, name in the layer, and tensor."""
    found = [(re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", key), tensor) for key, tensor in state_dict.items()]
    layers = [(int(match[1]), match[2], tensor) for match, tensor in found if match]
    named = {match[0].lstrip("."): tensor for match, tensor in found if match}
    check_tensors(named, dict.fromkeys(named, torch.ones(1)), "the state dict")
    if not layers:
        raise ValueError(f"no key has layers.0. in it: {', '.join(list(state_dict)[:3])} ...")
    return layers
