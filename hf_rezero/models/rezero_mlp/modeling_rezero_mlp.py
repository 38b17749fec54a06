"""Fully connected ReZero nets: x <- x + resweight * act(W x + b) (Bachlechner et al. 2020, arXiv:2003.04887, section 4).

Shapes: B batch, D `hidden_size`.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rezero_mlp import ReZeroMLPConfig


PASSED_ON = frozenset(TransformersKwargs.__annotations__)


def refuse_unknown(model: nn.Module, arguments: dict) -> None:
    """Refuse arguments with data that no image model reads, such as a mask, instead of ignoring them silently.

    Raises:
        TypeError: Such an argument was given.
    """
    unknown = [name for name, value in arguments.items() if name not in PASSED_ON and isinstance(value, torch.Tensor)]
    if unknown:
        raise TypeError(
            f"{type(model).__name__}.forward got {', '.join(unknown)}, which it does not read: leave it out."
        )


class ReZeroMLPLayer(nn.Module):
    """x + w F(x), pre x + w F(N(x)), post N(x + w F(x)), branch x + w N(F(x)); without x if there is no skip."""

    def __init__(self, config: ReZeroMLPConfig):
        super().__init__()
        self.norm_position, self.skip_connection = config.norm_position, config.skip_connection
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        if config.norm_position != "none":
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.resweight = nn.Parameter(torch.zeros(1, dtype=torch.float32), requires_grad=config.resweight_trainable)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = self.norm(hidden_states) if self.norm_position == "pre" else hidden_states
        branch = self.activation(self.linear(inputs))
        if self.norm_position == "branch":
            branch = self.norm(branch)
        resweight = self.resweight.to(branch.dtype)
        if self.skip_connection:
            hidden_states = torch.addcmul(hidden_states, resweight, branch)
        else:
            hidden_states = resweight * branch
        return self.norm(hidden_states) if self.norm_position == "post" else hidden_states


class ReZeroMLPPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what transformers may assume of every fully connected ReZero net."""

    config: ReZeroMLPConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReZeroMLPLayer"]
    _keep_in_fp32_modules_strict = ["resweight"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReZeroMLPLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Hidden weights N(0, sqrt(initializer_variance / D)), others N(0, 1 / sqrt(fan_in)), biases 0."""
        if isinstance(module, ReZeroMLPLayer):
            init.constant_(module.resweight, self.config.resweight_init)
            init.normal_(
                module.linear.weight, std=math.sqrt(self.config.initializer_variance / self.config.hidden_size)
            )
            init.zeros_(module.linear.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def sync_config(self) -> None:
        """Write the number of layers into the config, for use after pruning or growing."""
        self.config.num_hidden_layers = len(self.base_model.layers)


class ReZeroMLPModel(ReZeroMLPPreTrainedModel):
    """A linear map of the image to D values, and `num_hidden_layers` layers.

    With gradient checkpointing the layers run in sqrt(L) segments, of which only the inputs are kept: activations take
    2 sqrt(L) instead of L times the memory of a layer, for one more forward pass.

    Raises:
        ValueError: The images do not have the shape in the config.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroMLPConfig, ReZeroMLPModel
        >>> model = ReZeroMLPModel(ReZeroMLPConfig(num_hidden_layers=1000, hidden_size=8))
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.equal(model(images).pooler_output, model.embed(images.flatten(1)))
        True
    """

    def __init__(self, config: ReZeroMLPConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embed = nn.Linear(config.num_channels * config.image_size**2, config.hidden_size)
        self.layers = nn.ModuleList(ReZeroMLPLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def extra_repr(self) -> str:
        """The residual weights of all layers in one line: a line for each layer would keep the repr from grouping layers."""
        weights = [p for name, p in self.named_parameters() if name.endswith("resweight")]
        if not weights or any(type(p) is not nn.Parameter or p.is_meta for p in weights):  # sharded, or without values
            return ""
        values = torch.cat([p.detach().cpu().float() for p in weights])
        return f"{len(values)} residual weights from {values.min():.3g} to {values.max():.3g}"

    def run_layers(self, hidden_states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The layers from `start` to `stop`, one after the other."""
        for index in range(start, stop):
            hidden_states = self.layers[index](hidden_states)
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Features (B, D) of images (B, `num_channels`, `image_size`, `image_size`)."""
        refuse_unknown(self, kwargs)
        config = self.config
        if pixel_values.shape[1:] != (config.num_channels, config.image_size, config.image_size):
            raise ValueError(
                f"got pixel_values of shape {tuple(pixel_values.shape)}: expected (batch, {config.num_channels}, "
                f"{config.image_size}, {config.image_size}); resize the images or set image_size."
            )
        hidden_states, depth = self.embed(pixel_values.flatten(1)), len(self.layers)
        if self.gradient_checkpointing and self.training:
            length = math.isqrt(depth - 1) + 1
            for start in range(0, depth, length):
                hidden_states = self._gradient_checkpointing_func(
                    self.run_layers, hidden_states, start, min(start + length, depth)
                )
        else:
            hidden_states = self.run_layers(hidden_states, 0, depth)
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=hidden_states, pooler_output=hidden_states)


class ReZeroMLPForImageClassification(ReZeroMLPPreTrainedModel):
    """A linear classifier after the last layer.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroMLPConfig, ReZeroMLPForImageClassification
        >>> model = ReZeroMLPForImageClassification(ReZeroMLPConfig(num_labels=10))
        >>> model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 9])).logits.shape
        torch.Size([2, 10])
    """

    accepts_loss_kwargs = False  # the loss is the mean over the images of a batch

    def __init__(self, config: ReZeroMLPConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReZeroMLPModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits (B, `num_labels`) of images (B, `num_channels`, `image_size`, `image_size`), and the loss in nats."""
        outputs = self.model(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["ReZeroMLPForImageClassification", "ReZeroMLPModel", "ReZeroMLPPreTrainedModel"]
