"""Residual weights multiplied into the weights behind them, for deployment."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling_rewritten import Gated, Record, mark_, ungate_
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
            behind an activation.

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
    for layer in layers:
        for name in ("self_attn", "cross_attn", "mlp"):
            if getattr(layer, name, None) is not None:
                _scale(_end_of_branch(layer, name), layer.residuals["layer" if layer.shared else name].resweight)
        for residual in layer.residuals.values():
            residual.resweight = None
    config = model.config
    config.resweight_sharing, config.resweight_init, config.resweight_trainable = "none", 1.0, False
    return model


def _fold_projections(model: nn.Module, gated: list[Gated]) -> nn.Module:
    """Into the projections that hold or share a residual weight, which are ordinary ones then."""
    weights = [projection.gate.detach().clone() for projection in gated]
    for projection, weight in zip(gated, weights, strict=True):
        _scale(projection, weight)
        ungate_(projection)
    for part in list(model.modules()):
        if isinstance(part, PreTrainedModel) and hasattr(part.config, "rewritten"):
            mark_(part, stock_class(part), replace(Record.of(part.config), gates={}))
    return model


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
