"""Residual weights multiplied into the weights behind them, for deployment."""

import copy
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modeling_rewritten import Gated, Record, adapts_gated, mark_, ungate_
from .record import stock_class


@torch.no_grad()
def fold_resweight_(model: nn.Module) -> nn.Module:
    """Multiply every residual weight into the weights that end its branch, x + w F(x) = x + F'(x), and drop it.

    These are the last projection of the branch, or its norm where that comes behind (`norm_position="branch"`). What is
    left is a residual model without residual weights: the config says `resweight_sharing="none"`, and the checkpoint
    loads as before, with or without this library. A model of transformers that went through `rezero_` and kept its norms
    is one of its stock class again, and its checkpoint loads like any. Products are taken in fp32 at least.

    Args:
        model: A ReZero text model, or one of transformers with residual weights; changed in place with its config.

    Returns:
        The model.

    Raises:
        ValueError: The model has no residual weights that its own weights could take in: in the image models they stand
            behind an activation; or adapters, such as LoRA around the projections of a ReZero text model or DoRA around those
            of another, would compute something else around folded weights.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM, fold_resweight_
        >>> config = ReZeroConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, resweight_init=0.3)
        >>> model, ids = ReZeroForCausalLM(config).eval(), torch.arange(8)[None]
        >>> before = model(ids).logits
        >>> torch.allclose(fold_resweight_(model)(ids).logits, before, atol=1e-5)
        True
        >>> any("resweight" in name for name in model.state_dict())
        False
    """
    gated = [module for module in model.modules() if isinstance(module, Gated)]
    if gated:
        return _fold_projections(model, gated)
    layers = [module for module in model.modules() if hasattr(module, "residuals")]
    if not layers or all(gate.resweight is None for layer in layers for gate in layer.residuals.values()):
        raise ValueError(
            f"{type(model).__name__} has no residual weights in front of which a projection stands: expected a ReZero "
            f"text model, or one of transformers after rezero_, that was not folded yet."
        )
    ends = [
        (_end_of_branch(layer, name), layer.residuals["layer" if layer.shared else name].resweight)
        for layer in layers
        for name in ("self_attn", "cross_attn", "mlp")
        if getattr(layer, name, None) is not None
    ]
    if any(hasattr(end, "merge") for end, _ in ends):
        raise ValueError(
            "the residual weights multiply adapters too, which cannot be folded into: merge them or unload them first."
        )
    for end, resweight in ends:
        _scale(end, resweight)
    for layer in layers:
        for residual in layer.residuals.values():
            residual.resweight = None
    config = model.config
    config.resweight_sharing, config.resweight_init, config.resweight_trainable = "none", 1.0, False
    return model


def _fold_projections(model: nn.Module, gated: list[Gated]) -> nn.Module:
    """Into the projections that hold or share a residual weight, which are ordinary ones then."""
    for name, part in model.named_modules():
        if adapts_gated(part):
            _check_adapter(name, part)
    weights = [projection.gate.detach().clone() for projection in gated]
    for projection, weight in zip(gated, weights, strict=True):
        _scale(projection, weight)
        ungate_(projection)
    for part in list(model.modules()):
        if isinstance(part, PreTrainedModel) and hasattr(part.config, "rewritten"):
            mark_(part, stock_class(part), replace(Record.of(part.config), gates={}))
    return model


def _check_adapter(name: str, adapter: nn.Module) -> None:
    """Refuse an adapter whose output around the folded projection is another, such as one that rescales the weight."""
    before, after = (copy.deepcopy(adapter).double().eval() for _ in range(2))
    for projection in after.children():
        if isinstance(projection, Gated):
            weight = projection.weight
            inputs = weight.shape[0 if isinstance(projection, Conv1D) else 1]
            _scale(projection, projection.gate)
            ungate_(projection)
            x = torch.linspace(-1, 1, inputs, dtype=weight.dtype, device=weight.device)[None]
            expected = before(x)
            if (after(x) - expected).abs().max() > 1e-6 * expected.abs().max():
                raise ValueError(
                    f"the adapter around {name} is no sum beside a projection, so that folding would change what it computes: "
                    f"fold the model before you add the adapters."
                )


def _end_of_branch(layer: nn.Module, name: str) -> nn.Module:
    """What the output of a branch is linear in, with its bias."""
    if layer.norm_position == "branch":
        return layer.norms[name]
    sublayer = getattr(layer, name)
    return sublayer.down_proj if name == "mlp" else sublayer.o_proj


def _scale(module: nn.Module, factor: torch.Tensor) -> None:
    for parameter in (module.weight, getattr(module, "bias", None)):
        if parameter is not None:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(parameter.to(wide) * factor.to(wide))
