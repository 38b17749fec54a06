"""ReZero as plain torch modules: two Transformer layers and a residual wrapper for any module.

ReZero (Bachlechner et al. 2020, arXiv:2003.04887, Table 1) multiplies the residual branch by one learned scalar,
x_{i+1} = x_i + resweight_i * F_i(x_i), which is zero at the start: a network of any depth begins as the identity.
"""

import math
from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .structure.states import check_loads_of


__all__ = ["RZTXDecoderLayer", "RZTXEncoderLayer", "ReZero"]

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def _gated(branch: Tensor, resweight: Tensor) -> Tensor:
    # A (1,)-shaped fp32 resweight would promote a bf16 branch to fp32.
    return resweight.to(branch.dtype) * branch


def _find_activation(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, str) and activation in _ACTIVATIONS:
        return _ACTIVATIONS[activation]
    # A class such as nn.ReLU is callable too, but calling it on a tensor builds a module.
    if not callable(activation) or isinstance(activation, type):
        raise ValueError(
            f"activation must be 'relu', 'gelu' or a function of one tensor, got {activation!r}; "
            "for another one pass e.g. torch.nn.functional.silu or torch.nn.SiLU()"
        )
    return activation


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if sizes["d_model"] % sizes["nhead"]:
        raise ValueError("d_model must be a multiple of nhead, got d_model={d_model}, nhead={nhead}".format(**sizes))


def _attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    causal: bool,
) -> Tensor:
    # nn.MultiheadAttention takes is_causal as a hint about the mask; its inference path would silently look ahead.
    if causal and mask is None:
        raise ValueError(
            "is_causal=True says that the mask is causal, but no mask was given; pass "
            "torch.nn.Transformer.generate_square_subsequent_mask(length) as the mask too"
        )
    # need_weights=False: only then is the fused attention used.
    branch, _ = attention(query, memory, memory, padding, need_weights=False, attn_mask=mask, is_causal=causal)
    return branch


class _RZTXLayer(nn.Module):
    """The modules that both RZTX layers share, under their official names."""

    _has_cross_attention = False

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        *,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, nhead=nhead, dim_feedforward=dim_feedforward)
        factory = {"device": device, "dtype": dtype}
        # Created in the official order, so that the same seed gives the same weights.
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **factory)
        if self._has_cross_attention:
            self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **factory)
            self.dropout3 = nn.Dropout(dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.resweight = nn.Parameter(torch.zeros(1, **factory))
        self.activation = _find_activation(activation)
        check_loads_of(self)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class RZTXEncoderLayer(_RZTXLayer):
    """ReZero Transformer encoder layer: a drop-in for `nn.TransformerEncoderLayer` without LayerNorm.

    `x <- x + dropout(resweight * SelfAttn(x))`, then `x <- x + dropout(resweight * FFN(x))`, with
    `FFN(x) = linear2(dropout(activation(linear1(x))))` and one `resweight`, zero at the start, for both sublayers
    (Bachlechner et al. 2020, arXiv:2003.04887, Table 1 and the section on Transformers).

    Takes the state dict of the official layer (majumderb/rezero, PyPI rezero 0.1.0). In `nn.TransformerEncoder`
    pass `enable_nested_tensor=False`: the nested-tensor fast path exists for LayerNorm layers only, and torch would
    warn that it is not used.

    Args:
        d_model: features per token.
        nhead: attention heads; divides `d_model`.
        dim_feedforward: width of the feed-forward branch.
        dropout: probability in the attention weights, inside the feed-forward branch and on each branch.
        activation: "relu", "gelu", or a function or module of one tensor.
        batch_first: tensors are (N, S, d_model) instead of (S, N, d_model).
        device, dtype: for every parameter, also `resweight`. A bf16 `resweight` loses small updates; autocast keeps it fp32.

    Raises:
        ValueError: a size is not a positive integer, `nhead` does not divide `d_model`, `dropout` is not in [0, 1]
            or `activation` is unknown.

    Example:
        >>> encoder = nn.TransformerEncoder(RZTXEncoderLayer(d_model=16, nhead=2), 128, enable_nested_tensor=False)
        >>> src = torch.randn(5, 3, 16)
        >>> torch.equal(encoder(src), src)
        True
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Returns a tensor of the shape of `src`; masks and shapes are those of `nn.TransformerEncoderLayer`.

        Raises:
            ValueError: `is_causal` without `src_mask`.
        """
        branch = _attend(self.self_attn, src, src, src_mask, src_key_padding_mask, is_causal)
        x = src + self.dropout1(_gated(branch, self.resweight))
        return x + self.dropout2(_gated(self._feed_forward(x), self.resweight))


class RZTXDecoderLayer(_RZTXLayer):
    """ReZero Transformer decoder layer: a drop-in for `nn.TransformerDecoderLayer` without LayerNorm.

    `x <- x + resweight * dropout(F(x))` for F = self-attention, attention to `memory`, feed-forward, with one
    `resweight`, zero at the start, for all three (Bachlechner et al. 2020, arXiv:2003.04887, Table 1).

    Takes the state dict of the official layer (majumderb/rezero, PyPI rezero 0.1.0). Arguments and errors are those
    of `RZTXEncoderLayer`; `memory` has `d_model` features as well.

    Example:
        >>> decoder = nn.TransformerDecoder(RZTXDecoderLayer(d_model=16, nhead=2), num_layers=6)
        >>> tgt, memory = torch.randn(5, 3, 16), torch.randn(7, 3, 16)
        >>> torch.equal(decoder(tgt, memory), tgt)
        True
    """

    _has_cross_attention = True

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Returns a tensor of the shape of `tgt`; masks and shapes are those of `nn.TransformerDecoderLayer`.

        Raises:
            ValueError: `tgt_is_causal` without `tgt_mask` or `memory_is_causal` without `memory_mask`.
        """
        branch = _attend(self.self_attn, tgt, tgt, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        x = tgt + _gated(self.dropout1(branch), self.resweight)
        branch = _attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        x = x + _gated(self.dropout2(branch), self.resweight)
        return x + _gated(self.dropout3(self._feed_forward(x)), self.resweight)


class ReZero(nn.Module):
    """ReZero residual connection around any module that keeps the shape of its first input.

    `y = x + resweight * module(x)` (Bachlechner et al. 2020, arXiv:2003.04887, Table 1). If the module returns a
    tuple, its first element is the branch and the others are passed on.

    `resweight` has shape (1,) and is created in fp32 on the device of the module; forward casts it to the dtype of the
    branch. The module must not change x in place, and its output must not be zero at the start: while `resweight`
    is zero, neither `resweight` nor a branch that ends in zero weights gets a gradient.

    Args:
        module: the branch, of any input shape.
        resweight_init: initial value of `resweight`; 0.0, that of the paper, makes the wrapper the identity.

    Raises:
        TypeError: `module` is not an `nn.Module`, or its output is neither a tensor nor a tuple that begins with one.
        ValueError: `resweight_init` is not finite, or the shape of the branch is not that of x.

    Example:
        >>> block = ReZero(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)))
        >>> x = torch.randn(2, 5, 8)
        >>> torch.equal(block(x), x)
        True
    """

    def __init__(self, module: nn.Module, resweight_init: float = 0.0) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an instance of torch.nn.Module, got {module!r}")
        if not math.isfinite(resweight_init):
            raise ValueError(f"resweight_init must be a finite number, got {resweight_init}")
        self.module = module
        device = next((p.device for p in module.parameters()), None)
        self.resweight = nn.Parameter(torch.full((1,), float(resweight_init), dtype=torch.float32, device=device))
        check_loads_of(self)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor | tuple:
        """Returns a tensor of the shape of x, or a tuple that begins with it; further arguments go to the module."""
        out = self.module(x, *args, **kwargs)
        branch, *rest = out if isinstance(out, tuple) else (out,)
        if not isinstance(branch, Tensor):
            raise TypeError(
                f"{type(self.module).__name__} must return a tensor or a tuple that begins with one, got "
                f"{type(out).__name__}; Hugging Face models return a tuple with return_dict=False"
            )
        if branch.shape != x.shape:
            raise ValueError(
                f"{type(self.module).__name__} must keep the shape of its input, got {tuple(x.shape)} -> "
                f"{tuple(branch.shape)}; broadcasting is not allowed: make the last layer return the shape of the input"
            )
        y = x + _gated(branch, self.resweight)
        return (y, *rest) if isinstance(out, tuple) else y

    def extra_repr(self) -> str:
        """The residual weight, where this process has its value."""
        has_value = type(self.resweight) is nn.Parameter and not self.resweight.is_meta  # sharded ones are DTensors
        return f"resweight={self.resweight.item():.3g}" if has_value else ""
