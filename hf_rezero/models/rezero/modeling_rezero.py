"""ReZero text models: x <- x + resweight * F(x) (Bachlechner et al. 2020, arXiv:2003.04887).

Shapes: B batch, T query length, S key length, D `hidden_size`, H `num_attention_heads`, K `num_key_value_heads`,
E `head_dim`, V `vocab_size`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_rezero import ReZeroConfig


# transformers 5.24 renamed `past_key_values`; masks, layers and outputs take the name of the installed release
OUTPUT_NAMES = {field.name for field in fields(BaseModelOutputWithPastAndCrossAttentions)}
CACHE_NAME = "cache" if "cache" in OUTPUT_NAMES else "past_key_values"
PASSED_ON = frozenset(TransformersKwargs.__annotations__)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache under whichever of its two names it was given.

    Raises:
        ValueError: Two different caches were given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(
            "got both `cache` and `past_key_values`: they are two names of one argument, give one of them."
        )
    return past_key_values if cache is None else cache


def carries_data(value: Any) -> bool:
    """Whether an argument is or holds a tensor, a mask or a cache, so that ignoring it would change the result."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return any(carries_data(item) for item in value)
    return isinstance(value, (torch.Tensor, BlockMask, Cache))


def refuse_unknown(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse the remaining arguments of a forward pass if they carry data that nothing here reads.

    Ignoring a renamed cache, mask or position argument would give wrong text. Arguments that transformers documents for
    every model pass. So do numbers and names, which are for the attention functions of inference engines.

    Raises:
        TypeError: Such an argument was given.
    """
    unknown = [name for name, value in arguments.items() if name not in PASSED_ON and carries_data(value)]
    if unknown:
        raise TypeError(
            f"{type(model).__name__}.forward got {', '.join(unknown)}, which it does not read: leave it out, or upgrade "
            f"the code of the model if a newer transformers has renamed one of its arguments."
        )


class ReZeroResidual(nn.Module):
    """The residual connection of the paper, x + resweight * F(x), or resweight * F(x) without `skip_connection`.

    `resweight` has shape (1,) and stays fp32: in bf16 an update of 2e-4 to a weight of 0.12 is lost. It is None, which
    counts as 1, where the config has no residual weights.
    """

    def __init__(self, config: ReZeroConfig):
        super().__init__()
        self.skip_connection = config.skip_connection
        self.scales_projection = config.resweight_trainable and config.norm_position != "branch"
        self.resweight = None
        if config.resweight_sharing != "none":
            weight = torch.zeros(1, dtype=torch.float32)
            self.resweight = nn.Parameter(weight, requires_grad=config.resweight_trainable)

    def forward(self, hidden_states: torch.Tensor, branch: Callable[..., torch.Tensor]) -> torch.Tensor:
        """`branch()` is F(x); `branch(scale=w)` is w F(x), whose gradient for w keeps no F(x)."""
        resweight = self.resweight
        if resweight is None or self.scales_projection:
            output = branch(scale=resweight)
            return hidden_states + output.to(hidden_states.dtype) if self.skip_connection else output
        resweight, output = resweight.to(hidden_states.dtype), branch().to(hidden_states.dtype)
        return torch.addcmul(hidden_states, resweight, output) if self.skip_connection else resweight * output


class ReZeroDyT(nn.Module):
    """Dynamic tanh, weight * tanh(alpha x) + bias (Zhu et al. 2025, arXiv:2503.10622): a norm without statistics."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.tanh(self.alpha * hidden_states) + self.bias


class ScaledLinear(torch.autograd.Function):
    """w (W x + b) for x (..., D_in), with the gradient of w from <dL/d(wW), W> and dL/d(wb).

    Autograd would keep W x + b for it, D numbers for each token.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        ctx.save_for_backward(x, weight, bias, scale)
        output = nn.functional.linear(x, weight, bias)
        return output.mul_(scale.to(output.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, weight, bias, scale = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        grad_x = (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype)
        unscaled = (rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(weight.dtype)
        grad_weight, grad_scale = unscaled * scale.to(weight.dtype), (unscaled * weight).sum()
        grad_bias = None
        if bias is not None:
            unscaled_bias = rows.sum(0).to(bias.dtype)
            grad_bias, grad_scale = unscaled_bias * scale.to(bias.dtype), grad_scale + (unscaled_bias * bias).sum()
        return grad_x.to(x.dtype), grad_weight, grad_bias, grad_scale.reshape(1).to(scale.dtype)


def scaled_linear(linear: nn.Module, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """scale * linear(x), or linear(x) without a scale; adapters, quantised, sharded and observed layers run as they are."""
    if scale is None:
        return linear(x)
    is_plain = type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, torch.Tensor)
    is_observed = linear._forward_hooks or linear._forward_pre_hooks
    if is_plain and not is_observed and torch.is_grad_enabled():
        return ScaledLinear.apply(x, linear.weight, linear.bias, scale)
    output = linear(x)
    return output * scale.to(output.dtype)


def chunked_causal_lm_loss(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int = 2**26,
    **kwargs,
) -> torch.Tensor:
    """Mean -log p of the next labels, with at most `chunk_size` logits at a time; the backward pass recomputes them.

    hidden_states (B, T, D), labels (B, T) with `ignore_index` where nothing is to be predicted, or `shift_labels`, already
    shifted. If all logits fit in one chunk, nothing is computed twice.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    rows, targets = hidden_states.flatten(0, 1), shift_labels.flatten().to(hidden_states.device)
    rows_at_once = max(1, chunk_size // lm_head.out_features)

    def nll(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(lm_head(rows).float(), targets, ignore_index=ignore_index, reduction="sum")

    if len(rows) <= rows_at_once:
        total = nll(rows, targets)
    else:
        parts = zip(rows.split(rows_at_once), targets.split(rows_at_once), strict=True)
        total = torch.stack([checkpoint(nll, *part, use_reentrant=False) for part in parts]).sum()
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


def _make_norm(config: ReZeroConfig) -> nn.Module:
    if config.norm_type == "dyt":
        return ReZeroDyT(config.hidden_size)
    norm_class = nn.LayerNorm if config.norm_type == "layernorm" else nn.RMSNorm
    return norm_class(config.hidden_size, eps=config.norm_eps)


class ReZeroTokenEmbedding(nn.Embedding):
    """A token table whose rows are multiplied by `scale` on the way in, so that a tied head can be small."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float = 1.0):
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeds = super().forward(input_ids)
        return embeds if self.scale == 1.0 else embeds * self.scale


class ReZeroSinusoidalPositions(nn.Module):
    """The fixed position code of Vaswani et al. 2017, section 3.5, for any length."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        exponent = torch.arange(0, self.hidden_size, 2, device=position_ids.device) / self.hidden_size
        angles = position_ids[..., None].float() * 10_000.0**-exponent
        code = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return code[..., : self.hidden_size]


class ReZeroRotaryEmbedding(nn.Module):
    """Cosines and sines (B, T, E) of the rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self, config: ReZeroConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ReZeroConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies theta^(-2i/E), and the factor 1 for cosines and sines."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) for the halves a and b of the features."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x cos + rotate_half(x) sin for queries and keys (B, H, T, E); cos and sin (B, T, E)."""
    cos, sin = cos.unsqueeze(unsqueeze_dim).to(q.dtype), sin.unsqueeze(unsqueeze_dim).to(q.dtype)
    return torch.addcmul(q * cos, rotate_half(q), sin), torch.addcmul(k * cos, rotate_half(k), sin)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling * q k^T + mask) v; returns (B, T, H, E) and the weights (B, H, T, S)."""
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    # the kernel sums in fp32 whatever it returns; asking for fp32 weights doubles the time of attention in bf16 on a CPU
    weights = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def batched_matmul_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`eager_attention_forward` with the masks of sdpa: None for a causal or a full one, or booleans, True to attend."""
    lowest = torch.finfo(query.dtype).min
    if attention_mask is None and module.is_causal and query.shape[2] > 1:
        attention_mask = query.new_full((query.shape[2], key.shape[2]), lowest).triu(1)
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = query.new_zeros(()).masked_fill(~attention_mask, lowest)
    output, _ = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def flash_backward_is_slow(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether plain products train faster, as in bf16 on a CPU; they keep T x S attention weights for each head."""
    is_training = query.requires_grad and torch.is_grad_enabled()
    return is_training and query.dtype == torch.bfloat16 and query.device.type == "cpu" and key.shape[2] <= 512


class ReZeroAttention(nn.Module):
    """Multi-head attention on the tokens themselves."""

    def __init__(self, config: ReZeroConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        # keep the model's own `config`, or a change of its `_attn_implementation` would not arrive here
        sizes = config.per_layer_config[layer_idx]
        self.num_key_value_groups = sizes.num_attention_heads // sizes.num_key_value_heads
        width, kv_width = sizes.num_attention_heads * self.head_dim, sizes.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H * E) -> (B, H, T, E); H is inferred, so that tensor parallelism can hold a part of the heads."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def attend(
        self, query, key, value, attention_mask, scale=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the chosen attention implementation and project its heads back to the residual stream."""
        implementation = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation == "sdpa" and flash_backward_is_slow(query, key):
            attention_interface = batched_matmul_attention
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return scaled_linear(self.o_proj, output.flatten(2), scale), weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE_NAME, None)
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # a paged cache reads more of them
        return self.attend(query, key, value, attention_mask, **kwargs)


class ReZeroCrossAttention(ReZeroAttention):
    """Multi-head attention on the output of an encoder, whose keys and values are computed once per generation."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE_NAME, None)
        cache = cache if isinstance(cache, EncoderDecoderCache) else None
        query = self.split_heads(self.q_proj(hidden_states))
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key = self.split_heads(self.k_proj(encoder_hidden_states))
            value = self.split_heads(self.v_proj(encoder_hidden_states))
            if cache is not None:
                key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        kwargs["is_causal"] = False
        return self.attend(query, key, value, encoder_attention_mask, **kwargs)


class ReZeroMLP(nn.Module):
    """down_proj(act(up_proj(x)))."""

    def __init__(self, config: ReZeroConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return scaled_linear(self.down_proj, self.act_fn(self.up_proj(hidden_states)), scale)


class ReZeroLayer(GradientCheckpointingLayer):
    """x <- x + resweight * SelfAttention(x); x <- x + resweight * MLP(x), with cross-attention between when asked for.

    A sublayer of size 0 in `config.per_layer_config` is None and is skipped.
    """

    def __init__(self, config: ReZeroConfig, layer_idx: int):
        super().__init__()
        self.norm_position = config.norm_position
        self.dropout = config.hidden_dropout
        sizes = config.per_layer_config[layer_idx]
        has_attention, width = sizes.num_attention_heads > 0, sizes.intermediate_size
        self.self_attn = ReZeroAttention(config, layer_idx, is_causal=config.is_causal) if has_attention else None
        if config.add_cross_attention:
            self.cross_attn = ReZeroCrossAttention(config, layer_idx, is_causal=False)
        self.mlp = ReZeroMLP(config, width) if width else None
        sublayers = [name for name, _ in self.named_children()]
        self.shared = config.resweight_sharing != "sublayer"
        self.residuals = nn.ModuleDict(
            {name: ReZeroResidual(config) for name in (["layer"] if self.shared else sublayers)}
        )
        if config.norm_position != "none":
            self.norms = nn.ModuleDict({name: _make_norm(config) for name in sublayers})

    def sizes(self) -> dict[str, int]:
        """The sizes of the modules, by their names in `per_layer_config`; 0 for a sublayer that is not there."""
        attention, mlp = self.self_attn, self.mlp
        return {
            "num_attention_heads": attention.q_proj.out_features // attention.head_dim if attention is not None else 0,
            "num_key_value_heads": attention.k_proj.out_features // attention.head_dim if attention is not None else 0,
            "intermediate_size": mlp.up_proj.out_features if mlp is not None else 0,
        }

    def connect(self, name: str, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """One row of Table 1: none x + w F(x), pre x + w F(N(x)), post N(x + w F(x)), branch x + w N(F(x))."""
        norm = self.norms[name] if self.norm_position != "none" else None

        def branch(scale: torch.Tensor | None = None) -> torch.Tensor:
            inputs = norm(hidden_states) if self.norm_position == "pre" else hidden_states
            output = getattr(self, name)(inputs, scale=scale, **kwargs)
            if isinstance(output, tuple):
                output = output[0]
            if self.norm_position == "branch":
                output = norm(output)
            return nn.functional.dropout(output, self.dropout, self.training) if self.dropout else output

        output = self.residuals["layer" if self.shared else name](hidden_states, branch)
        return norm(output) if self.norm_position == "post" else output

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if self.self_attn is not None:
            hidden_states = self.connect(
                "self_attn",
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        if encoder_hidden_states is not None:
            hidden_states = self.connect(
                "cross_attn",
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
        return self.connect("mlp", hidden_states) if self.mlp is not None else hidden_states


class ReZeroPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what transformers may assume of every ReZero text model."""

    config: ReZeroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReZeroLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict = ["resweight"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # pruning reads this: a layer that lost heads, width or a whole sublayer can be described by the config alone
    _supports_per_layer_config = True
    _can_record_outputs = {
        "hidden_states": ReZeroLayer,
        "attentions": OutputRecorder(ReZeroAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(ReZeroCrossAttention, index=1, layer_name="cross_attn"),
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as every model of transformers does, with advice when a weight file is cut short.

        Raises:
            OSError: A weight file is damaged, or what `PreTrainedModel.from_pretrained` raises.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            # by name, because a Hub file imports torch and transformers only
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(
                f"a weight file of {pretrained_model_name_or_path} is damaged or cut short ({error}): "
                f"copy or download it again, or use an earlier checkpoint."
            ) from error

    def sync_config(self) -> None:
        """Write the sizes of the modules into the config, for use after pruning or growing.

        A size that all layers share becomes a plain value; one that differs becomes an override in each layer.
        """
        model, config = self.base_model, self.config
        sizes = [layer.sizes() for layer in model.layers]
        config.num_hidden_layers, config.hidden_size = len(sizes), model.embed_tokens.embedding_dim
        config.per_layer_config = {}
        differing = [name for name in sizes[0] if len({size[name] for size in sizes}) > 1]
        for name in sizes[0].keys() - set(differing):
            setattr(config, name, sizes[0][name])
        if differing:
            overrides = [{name: size[name] for name in differing} for size in sizes]
            config.per_layer_config = dict(enumerate(overrides))

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize as every model of transformers does; without `mean_resizing` new rows get initial values."""
        old = self.get_input_embeddings()
        rows, scale = old.num_embeddings, getattr(old, "scale", 1.0)
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if not mean_resizing:
            # super() draws them as for a position table and a projection, because it cannot tell the modules apart
            table.weight[rows:].normal_(std=self.config.embedding_std / scale)
            head = self.get_output_embeddings()
            if head is not None and head.weight is not table.weight:
                head.weight[rows:].normal_(std=self.config.initializer_range)
        return table

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Fill the leaf module with its initial values.

        | tensor                         | initial value                                                  |
        |--------------------------------|----------------------------------------------------------------|
        | `resweight`                    | `resweight_init`                                               |
        | token table                    | N(0, embedding_std), or N(0, initializer_range) when tied      |
        | learned position table         | N(0, embedding_std / 2)                                        |
        | language-model head            | N(0, initializer_range)                                        |
        | other weights, fan_in inputs   | N(0, 1 / sqrt(fan_in)), so that F(x) is of the order of x      |
        | norm weights; DyT alpha        | 1; 0.5                                                         |
        | all biases                     | 0                                                              |

        The second argument of N is the standard deviation.
        """
        config = self.config
        if isinstance(module, ReZeroResidual) and module.resweight is not None:
            init.constant_(module.resweight, config.resweight_init)
        elif isinstance(module, ReZeroTokenEmbedding):
            init.normal_(module.weight, std=config.embedding_std / module.scale)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.embedding_std / 2)
        elif isinstance(module, nn.Linear):
            is_head = module is self.get_output_embeddings()
            init.normal_(module.weight, std=config.initializer_range if is_head else module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ReZeroDyT):
            init.constant_(module.alpha, 0.5)
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class ReZeroModel(ReZeroPreTrainedModel):
    """The residual stream: embedding, `num_hidden_layers` layers, and no norm unless asked for.

    `config.is_causal` makes it a decoder with a key/value cache or a bidirectional encoder; `add_cross_attention`
    lets it read `encoder_hidden_states` (B, S, D), as `EncoderDecoderModel` needs.

    Raises:
        ValueError: Not exactly one of `input_ids` and `inputs_embeds`; more positions than a learned position table
            has; `encoder_hidden_states` without `add_cross_attention`.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroConfig, ReZeroModel
        >>> model = ReZeroModel(ReZeroConfig(hidden_size=32, num_hidden_layers=128, num_attention_heads=2))
        >>> ids = torch.arange(8)[None]
        >>> torch.equal(model(ids).last_hidden_state, model.embed_tokens(ids))
        True
    """

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        config.validate_architecture()  # again: EncoderDecoderModel sets `add_cross_attention` on a finished config
        scale = config.embedding_std / config.initializer_range if config.tie_word_embeddings else 1.0
        self.embed_tokens = ReZeroTokenEmbedding(config.vocab_size, config.hidden_size, scale)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "sinusoidal":
            self.embed_positions = ReZeroSinusoidalPositions(config.hidden_size)
        else:
            self.rotary_emb = ReZeroRotaryEmbedding(config)
        self.layers = nn.ModuleList(ReZeroLayer(config, i) for i in range(config.num_hidden_layers))
        self.number_attention_layers()
        self.norm = _make_norm(config) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def extra_repr(self) -> str:
        """The residual weights of all layers in one line: a line for each layer would keep the repr from grouping layers."""
        weights = [p for name, p in self.named_parameters() if name.endswith("resweight")]
        if not weights or any(type(p) is not nn.Parameter or p.is_meta for p in weights):  # sharded, or without values
            return ""
        values = torch.cat([p.detach().cpu().float() for p in weights])
        return f"{len(values)} residual weights from {values.min():.3g} to {values.max():.3g}"

    def number_attention_layers(self):
        """Give slot k of the key/value cache to the k-th layer that has attention; call it again after surgery.

        A cache takes the length of slot 0 for its own, so slot 0 must not stay empty.
        """
        for slot, layer in enumerate(layer for layer in self.layers if layer.self_attn is not None):
            layer.self_attn.layer_idx = slot
            if self.config.add_cross_attention:
                layer.cross_attn.layer_idx = slot

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        cache = one_cache(cache, past_key_values)
        if cache is None or isinstance(cache, Cache):
            refuse_unknown(self, kwargs)
        elif CACHE_NAME != "cache":  # the paged cache of continuous batching, which only attention functions knew then
            kwargs["cache"], cache = cache, None
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        if encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError("got `encoder_hidden_states`, but this model was built without `add_cross_attention`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None and self.config.is_causal:
            cache = self._make_cache(encoder_hidden_states)
        named_cache = {CACHE_NAME: cache}
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        if encoder_hidden_states is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        hidden_states, position_embeddings = self._add_positions(inputs_embeds, position_ids, cache)
        # fewer while `generate` exits early; a slice would be a new module of all layers, at every token
        for layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                position_embeddings=position_embeddings,
                **named_cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm(hidden_states), **named_cache)

    def _make_cache(self, encoder_hidden_states: torch.Tensor | None) -> Cache:
        cache = DynamicCache(config=self.config)
        if encoder_hidden_states is None:
            return cache
        return EncoderDecoderCache(cache, DynamicCache(config=self.config))

    def _add_positions(self, inputs_embeds, position_ids, cache):
        """Add the position code to the embedding (B, T, D), or return the cosines and sines that attention applies."""
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0  # a paged one comes with its positions
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)
        position_embeddings = None
        if self.config.position_embedding_type == "rotary":
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        else:
            self._check_positions(past, length)
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids).to(inputs_embeds.dtype)
        dropout = self.config.hidden_dropout if self.training else 0.0
        return nn.functional.dropout(inputs_embeds, dropout, self.training), position_embeddings

    def _check_positions(self, past: int | torch.Tensor, length: int):
        rows = self.config.max_position_embeddings
        is_learned = self.config.position_embedding_type == "learned"
        # a static cache counts on the device: reading that count would stop a compiled graph
        if is_learned and isinstance(past, int) and past + length > rows:
            raise ValueError(
                f"got {past + length} positions, but the learned position table has max_position_embeddings={rows}: "
                f"shorten the input, or train with a larger table or with position_embedding_type='rotary'."
            )


class ReZeroForCausalLM(ReZeroPreTrainedModel, GenerationMixin):
    """Next-token prediction; `labels` (B, T) are the `input_ids`, shifted inside, -100 where no loss is wanted.

    With `skip_logits` and labels the output has a loss and no logits: at most 2^26 of them are held at a time, which
    matters for large vocabularies.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        >>> ids = torch.tensor([list(b"hello")])
        >>> model(ids, labels=ids).logits.shape
        torch.Size([1, 5, 264])
        >>> model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 8])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        self.model = ReZeroModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args, **kwargs):
        """As in `GenerationMixin`; an error in the middle of an early exit leaves the number of layers as it was."""
        num_hidden_layers = self.config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.config.num_hidden_layers = num_hidden_layers

    def _get_static_cache_init_shape(self):
        """Head counts in the order of `number_attention_layers`; None, to wait for the first use, if one count serves all."""
        shape = super()._get_static_cache_init_shape()
        heads = [sizes.num_key_value_heads for sizes in self.config.per_layer_config]
        if shape is None or len(set(heads)) == 1:
            return shape
        return None if isinstance(shape[0], int) else (sorted(shape[0], key=bool, reverse=True), shape[1])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # no named argument, or the Trainer would expect it in every data set
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if skip_logits and labels is not None:
            loss = chunked_causal_lm_loss(self.lm_head, hidden_states, labels, shift_labels=shift_labels, **kwargs)
        else:
            logits = self.lm_head(keep_positions(hidden_states, logits_to_keep))
        if logits is not None and labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, shift_labels=shift_labels, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


def keep_positions(hidden_states: torch.Tensor, kept: int | torch.Tensor) -> torch.Tensor:
    """The positions of (B, T, D) whose logits are wanted.

    `kept` is a number of last positions, 0 for all; positions (P,) of every row or (B, P) of each; or a mask (B, T),
    which gives one list of rows (P, D).
    """
    if isinstance(kept, int):
        return hidden_states[:, -kept:] if kept else hidden_states
    if kept.ndim == 1:
        return hidden_states[:, kept]
    if kept.dtype == torch.bool:
        return hidden_states[kept]
    return hidden_states.gather(1, kept[..., None].expand(-1, -1, hidden_states.shape[-1]))


class ReZeroForMaskedLM(ReZeroPreTrainedModel):
    """Prediction of masked tokens by a bidirectional encoder; `labels` (B, T) are -100 where nothing was masked.

    Raises:
        ValueError: `config.is_causal` is True.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        if config.is_causal:
            raise ValueError(
                "got is_causal=True, but masked language modelling reads both sides: build the config with is_causal=False."
            )
        self.model = ReZeroModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs) if labels is not None else None
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ReZeroForSequenceClassification(ReZeroPreTrainedModel):
    """One label per text, from the last token of a decoder or the mean over the tokens of an encoder.

    Padding is what `attention_mask` (B, T) says, or else the `pad_token_id`s of `input_ids`.
    """

    # its loss is a mean over the batch and not over `num_items_in_batch`: let the Trainer divide by the accumulation
    accepts_loss_kwargs = False

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReZeroModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        pooled = self._pool(outputs.last_hidden_state, input_ids, attention_mask)
        logits = self.score(pooled)
        loss = self.loss_function(labels, logits, self.config, **kwargs) if labels is not None else None
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _pool(self, hidden_states, input_ids, attention_mask) -> torch.Tensor:
        """(B, T, D) -> (B, D)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(hidden_states[..., 0])
            if input_ids is not None and self.config.pad_token_id is not None:
                attention_mask = input_ids.ne(self.config.pad_token_id)
        if not self.config.is_causal:
            mask = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
            return (hidden_states * mask).sum(1) / mask.sum(1).clamp(min=1)
        last = (attention_mask.long() * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(1)
        return hidden_states[torch.arange(len(last), device=last.device), last]


class ReZeroForTokenClassification(ReZeroPreTrainedModel):
    """One label per token; `labels` (B, T) are -100 where no loss is wanted."""

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReZeroModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        loss = self.loss_function(logits, labels, self.config, **kwargs) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "ReZeroForCausalLM",
    "ReZeroForMaskedLM",
    "ReZeroForSequenceClassification",
    "ReZeroForTokenClassification",
    "ReZeroModel",
    "ReZeroPreTrainedModel",
]
