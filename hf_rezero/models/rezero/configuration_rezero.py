"""Configuration of the ReZero text models (Bachlechner et al. 2020, arXiv:2003.04887)."""

from transformers.configuration_utils import PreTrainedConfig, strict
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


CONFIG_VERSION = 1

AUTO_MAP = {
    "AutoConfig": "configuration_rezero.ReZeroConfig",
    "AutoModel": "modeling_rezero.ReZeroModel",
    "AutoModelForCausalLM": "modeling_rezero.ReZeroForCausalLM",
    "AutoModelForMaskedLM": "modeling_rezero.ReZeroForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_rezero.ReZeroForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_rezero.ReZeroForTokenClassification",
}

CHOICES = {
    "hidden_act": ("relu", "relu2", "gelu", "gelu_pytorch_tanh", "silu"),
    "norm_position": ("none", "pre", "post", "branch"),
    "norm_type": ("layernorm", "rmsnorm", "dyt"),
    "position_embedding_type": ("rotary", "learned", "sinusoidal"),
    "resweight_sharing": ("layer", "sublayer", "none"),
}

# the least and the greatest value of each number; none of them holds NaN
RANGES = {
    "vocab_size": (1, 10**9),
    "hidden_size": (1, 10**9),
    "num_hidden_layers": (0, 10**9),
    "head_dim": (1, 10**9),
    "max_position_embeddings": (1, 10**9),
    "attention_dropout": (0, 1),
    "hidden_dropout": (0, 1),
    "resweight_init": (-1e30, 1e30),
    "norm_eps": (0, 1),
    "embedding_std": (1e-30, 1e30),
    "initializer_range": (0, 1e30),
}

# sizes that each layer may have of its own, because they stay inside the layer
PER_LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

# `skip`, transformers' word for a layer without a sublayer, written as sizes
NO_ATTENTION = {"num_attention_heads": 0, "num_key_value_heads": 0}
SKIPPED = {"attention": NO_ATTENTION, "self_attn": NO_ATTENTION, "mlp": {"intermediate_size": 0}}


def sizes_of_layer(overrides: dict) -> dict:
    """The overrides of one layer with `{"skip": ["mlp"]}` written as `{"intermediate_size": 0}`.

    Raises:
        ValueError: `skip` names something that a layer does not have.
    """
    sizes = {name: value for name, value in overrides.items() if name != "skip"}
    skipped = overrides.get("skip") or ()
    if not isinstance(skipped, (list, tuple, set)) or not all(
        isinstance(name, str) and name in SKIPPED for name in skipped
    ):
        raise ValueError(f"per_layer_config got skip={skipped!r}: expected a list with some of {', '.join(SKIPPED)}.")
    for name in skipped:
        sizes.update(SKIPPED[name])
    return sizes


@strict
class ReZeroConfig(PreTrainedConfig):
    r"""Shape and residual rule of a ReZero text model, an encoder or a causal decoder.

    Every sublayer `F` (self-attention, cross-attention, feed-forward) is connected by one row of the paper's Table 1,
    where `w` is the learned `resweight`:

    | row                  | `norm_position` | `resweight_init` | `resweight_trainable` | `skip_connection` |
    |----------------------|-----------------|------------------|-----------------------|-------------------|
    | ReZero `x + w F(x)`  | none            | 0                | True                  | True              |
    | residual `x + F(x)`  | none            | 1                | False                 | True              |
    | pre-norm `x + F(N x)`| pre             | 1                | False                 | True              |
    | post-norm `N(x + F x)`| post           | 1                | False                 | True              |
    | branch norm `x + N(F x)` | branch      | 1                | False                 | True              |
    | deep net `F(x)`      | none            | 1                | False                 | False             |
    | deep net + norm `N(F x)` | post        | 1                | False                 | False             |
    | ReZero + norm        | pre/post/branch | 0                | True                  | True              |

    Args:
        vocab_size: Number of token ids; the default is 256 bytes and 6 special tokens, padded to a multiple of 8.
        num_key_value_heads: Key/value heads shared by groups of query heads; `None` means one for each query head.
        head_dim: Size of a head; `None` means `hidden_size // num_attention_heads`.
        intermediate_size: Width of the feed-forward layer; `None` means `4 * hidden_size`.
        hidden_act: A fused activation. `gelu_new` is refused: `gelu_pytorch_tanh` is the same function in one kernel.
        is_causal: `True` for a decoder that never looks ahead, `False` for a bidirectional encoder.
        position_embedding_type: `rotary`, `learned` (a table of `max_position_embeddings` rows) or `sinusoidal`.
        resweight_init: Initial residual weight. The paper has 0. With `1 / sqrt(2 * num_hidden_layers)` the stream stays
            of order 1, and the layers learn from the first step. Short runs favoured now one, now the other.
        resweight_sharing: One weight per `layer` (the paper) or one per `sublayer`; `none` for x + F(x) without any, as
            `fold_resweight_` leaves a model.
        final_norm: A norm before the head; `None` means only with `norm_position="pre"`.
        embedding_std: Standard deviation of the embedding output. Without norms it sets the scale of the whole
            residual stream and must be of order 1.
        initializer_range: Standard deviation of the language-model head. With `tie_word_embeddings` it is that of the
            shared table, whose rows are multiplied up to `embedding_std` on the way in.
        config_version: Format of this file; a format newer than the code is refused.
        per_layer_config: Sizes of single layers, as pruning leaves them, such as
            `{2: {"num_attention_heads": 4, "num_key_value_heads": 4}}`; `intermediate_size` may be set too. A layer whose
            head counts are both 0 has no attention, with its residual and norm; one whose `intermediate_size` is 0 has
            no feed-forward sublayer. `{"skip": ["attention"]}` and `{"skip": ["mlp"]}`, as transformers writes it, mean
            the same.

    Raises:
        ValueError: A value is not one of its choices, the sizes do not divide, or a layer is left with nothing.

    Example:
        >>> from hf_rezero import ReZeroConfig
        >>> ReZeroConfig(hidden_size=64, num_attention_heads=4).head_dim
        16
    """

    model_type = "rezero"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # otherwise reading a size that some layer overrides raises an error, even in `getattr` with a default
    allow_global_per_layer_attribute_access = True
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 264
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    is_causal: bool = True
    add_cross_attention: bool = False
    position_embedding_type: str = "rotary"
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None
    resweight_init: float | int = 0.0
    resweight_trainable: bool = True
    resweight_sharing: str = "layer"
    skip_connection: bool = True
    norm_position: str = "none"
    norm_type: str = "layernorm"
    norm_eps: float = 1e-5
    final_norm: bool | None = None
    embedding_std: float | int = 1.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 256
    eos_token_id: int | list[int] | None = 257
    sep_token_id: int | None = 258
    pad_token_id: int | None = 259
    config_version: int = CONFIG_VERSION

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} does not divide into num_attention_heads="
                    f"{self.num_attention_heads} heads: choose a divisor, or give head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.final_norm is None:
            self.final_norm = self.norm_position == "pre"
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here already: `strict` calls it too, but hides the ValueError in another error

    @PreTrainedConfig.per_layer_config.setter
    def per_layer_config(self, per_layer_config: dict[int | str, dict] | None) -> None:
        if per_layer_config is not None:
            _check_form(per_layer_config)
            per_layer_config = {layer: sizes_of_layer(overrides) for layer, overrides in per_layer_config.items()}
        PreTrainedConfig.per_layer_config.fset(self, per_layer_config)

    def validate_architecture(self):
        """Refuse values that no model can be built from, each with one message that says what to do."""
        if self.config_version > CONFIG_VERSION:
            raise ValueError(
                f"config_version={self.config_version} was written by a newer hf_rezero; this one reads up to "
                f"{CONFIG_VERSION}: upgrade hf_rezero."
            )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"got {name}={value}: expected {low:g} to {high:g}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(choices)}.")
        if self.resweight_sharing == "none" and (self.resweight_init != 1 or self.resweight_trainable):
            raise ValueError(
                f"resweight_sharing='none' with resweight_init={self.resweight_init} and resweight_trainable="
                f"{self.resweight_trainable}: without residual weights these are 1 and False."
            )
        rope = self.rope_parameters or {}
        kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 1e4)
        if kind not in ("default", *ROPE_INIT_FUNCTIONS) or not 0 < base < 1e30:
            raise ValueError(
                f"rope_parameters has rope_type={kind!r} and rope_theta={base}: use one of default, "
                f"{', '.join(ROPE_INIT_FUNCTIONS)}, and a positive number."
            )
        self._validate_overrides()
        layers = list(self.per_layer_config)
        for i, layer in enumerate(layers):
            _validate_layer(layer, f"layer {i}: " if self.is_heterogeneous else "")
        if layers and not any(layer.num_attention_heads for layer in layers):
            raise ValueError(
                f"num_attention_heads is 0 in all {len(layers)} layers, so no token sees another: "
                f"keep the heads of at least one layer."
            )

    def _validate_overrides(self):
        overrides = [item for sizes in self.to_dict().get("per_layer_config", {}).values() for item in sizes.items()]
        for name, size in overrides:
            if name not in PER_LAYER_SIZES or not isinstance(size, int) or size < 0:
                raise ValueError(
                    f"per_layer_config sets {name}={size!r}: a layer may have its own {', '.join(PER_LAYER_SIZES)}, "
                    f"each a whole number; 0 leaves it out."
                )
        for name in PER_LAYER_SIZES:
            if getattr(self, name) < (0 if name in dict(overrides) else 1):
                raise ValueError(
                    f"got {name}={getattr(self, name)} for every layer: give a positive number, "
                    f"and 0 in per_layer_config to the layers that have none."
                )


def _check_form(per_layer_config):
    """Refuse what is no `{layer: {name: size}}`, where layers are numbers, in JSON as texts."""
    sizes = per_layer_config.items() if isinstance(per_layer_config, dict) else [(per_layer_config, None)]
    for layer, overrides in sizes:
        is_number = isinstance(layer, int) or isinstance(layer, str) and layer.removeprefix("-").isdecimal()
        if not (is_number and isinstance(overrides, dict) and all(isinstance(name, str) for name in overrides)):
            raise ValueError(
                f"per_layer_config holds {layer!r:.40} with {overrides!r:.40}: expected numbers of layers with sizes, "
                f'such as {{2: {{"intermediate_size": 64}}}}.'
            )


def _validate_layer(layer, where):
    heads, kv_heads, width = (getattr(layer, name) for name in PER_LAYER_SIZES)
    if bool(heads) != bool(kv_heads):
        raise ValueError(
            f"{where}num_attention_heads={heads} with num_key_value_heads={kv_heads}: "
            f"set both to 0 to leave out the attention, or neither."
        )
    if heads and heads % kv_heads:
        raise ValueError(
            f"{where}num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}: "
            f"every key/value head serves the same number of query heads."
        )
    if not heads and not width:
        raise ValueError(
            f"{where}num_attention_heads=0 and intermediate_size=0 leave nothing: "
            f"drop the layer and lower num_hidden_layers."
        )
    if not heads and layer.add_cross_attention:
        raise ValueError(
            f"{where}num_attention_heads=0, but with add_cross_attention=True every layer reads the encoder: "
            f"keep at least one head."
        )
    if layer.position_embedding_type == "rotary" and layer.head_dim % 2:
        raise ValueError(
            f"head_dim={layer.head_dim} is odd: rotary positions turn pairs of features; use an even head_dim "
            f"or position_embedding_type='learned'."
        )


__all__ = ["ReZeroConfig"]
