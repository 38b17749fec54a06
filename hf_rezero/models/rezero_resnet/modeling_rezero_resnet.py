"""ReZero ResNets: x <- x + resweight * relu(F(x)) (Bachlechner et al. 2020, arXiv:2003.04887, section 6).

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count, pairwise

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rezero_resnet import CONVOLUTIONS, ReZeroResNetConfig


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


def _convolution(config: ReZeroResNetConfig, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    bias = config.norm_type == "none"
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)


def _norm(config: ReZeroResNetConfig, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if config.norm_type == "batchnorm" else nn.Identity()


class ReZeroResNetPadShortcut(nn.Module):
    """Every `stride`th pixel, and 0 for the channels that are missing (He et al. 2015, option A)."""

    def __init__(self, missing_channels: int, stride: int):
        super().__init__()
        self.missing_channels, self.stride = missing_channels, stride

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states[:, :, :: self.stride, :: self.stride]
        before = self.missing_channels // 2
        return nn.functional.pad(hidden_states, (0, 0, 0, 0, before, self.missing_channels - before))


def _shortcut(config: ReZeroResNetConfig, inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if config.shortcut_type == "projection":
        return nn.Sequential(_convolution(config, inputs, outputs, 1, stride), _norm(config, outputs))
    if outputs < inputs:
        raise ValueError(
            f"shortcut_type='pad' cannot go from {inputs} to {outputs} channels: use 'projection', or widths that grow."
        )
    return ReZeroResNetPadShortcut(outputs - inputs, stride)


class ReZeroResNetBlock(GradientCheckpointingLayer):
    """A residual block: branch x + w relu(F(x)), sum relu(x + w F(x)), pre x + w F(relu(N(x))).

    The modules stand in the order in which they run, `conv1 bn1 conv2 bn2`, or `bn1 conv1 bn2 conv2` with
    pre-activation.
    """

    def __init__(self, config: ReZeroResNetConfig, inputs: int, outputs: int, stride: int, inner: list[int]):
        super().__init__()
        self.activation_position = config.activation_position
        self.activation = ACT2FN[config.hidden_act]
        sizes = pairwise((inputs, *inner, outputs))
        kernels, self.number = ((3, 3) if config.layer_type == "basic" else (1, 3, 1)), CONVOLUTIONS[config.layer_type]
        # the first convolution of 3 x 3 has the stride
        strides = [stride if i == kernels.index(3) else 1 for i in range(self.number)]
        for i, ((a, b), kernel, step) in enumerate(zip(sizes, kernels, strides, strict=True), 1):
            if config.activation_position == "pre":
                self.add_module(f"bn{i}", _norm(config, a))
            self.add_module(f"conv{i}", _convolution(config, a, b, kernel, step))
            if config.activation_position != "pre":
                self.add_module(f"bn{i}", _norm(config, b))
        self.shortcut = _shortcut(config, inputs, outputs, stride)
        self.resweight = nn.Parameter(torch.zeros(1, dtype=torch.float32), requires_grad=config.resweight_trainable)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """F(x), with the activations in front of the convolutions or between them."""
        for i in range(1, self.number + 1):
            convolution, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            if self.activation_position == "pre":
                x = convolution(self.activation(norm(x)))
            else:
                x = norm(convolution(x))
                x = self.activation(x) if i < self.number or self.activation_position == "branch" else x
        return x

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = self.branch(hidden_states)
        resweight = self.resweight.to(branch.dtype)
        hidden_states = torch.addcmul(self.shortcut(hidden_states), resweight, branch)
        return self.activation(hidden_states) if self.activation_position == "sum" else hidden_states


def _inner_sizes(config: ReZeroResNetConfig, stage: int, block: int) -> list[int]:
    if config.inner_sizes is not None:
        return config.inner_sizes[stage][block]
    channels = config.hidden_sizes[stage]
    return [channels] if config.layer_type == "basic" else [channels // 4] * 2


def _stages(config: ReZeroResNetConfig) -> Iterator[nn.ModuleList]:
    inputs = config.embedding_size
    for stage, (outputs, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        blocks = nn.ModuleList()
        for block in range(depth):
            stride = 2 if stage and not block else 1
            blocks.append(ReZeroResNetBlock(config, inputs, outputs, stride, _inner_sizes(config, stage, block)))
            inputs = outputs
        yield blocks


@contextmanager
def _untouched_statistics(block: nn.Module):
    """Let batch norms count each batch once, although checkpointing runs a block twice."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _checkpoint_block(checkpoint, block: nn.Module, function, *args):
    runs = count()  # instead of `context_fn`, which reentrant checkpointing and `torch.compile` refuse

    def run(*args):
        with _untouched_statistics(block) if next(runs) else nullcontext():
            return function(*args)

    return checkpoint(run, *args)


class ReZeroResNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what transformers may assume of every ReZero ResNet."""

    config: ReZeroResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReZeroResNetBlock"]
    _keep_in_fp32_modules_strict = ["resweight"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReZeroResNetBlock}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Weights N(0, sqrt(2 / fan_in)) as in the official code, biases 0, norms 1 and 0, `resweight_init`."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ReZeroResNetBlock):
            init.constant_(module.resweight, self.config.resweight_init)
            if self.config.zero_init_residual:
                init.zeros_(getattr(module, f"bn{module.number}").weight)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs):
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for block in self.modules():
            if isinstance(block, ReZeroResNetBlock) and gradient_checkpointing_func is not None:
                block._gradient_checkpointing_func = partial(_checkpoint_block, gradient_checkpointing_func, block)

    def sync_config(self) -> None:
        """Write the sizes of the modules into the config, for use after pruning or growing."""
        stages, config = self.base_model.stages, self.config
        number = CONVOLUTIONS[config.layer_type]
        sizes = [
            [[getattr(block, f"conv{i}").out_channels for i in range(1, number)] for block in stage]
            for stage in stages
        ]
        config.depths, config.inner_sizes = [len(stage) for stage in stages], None
        usual = [[_inner_sizes(config, s, b) for b in range(len(stage))] for s, stage in enumerate(stages)]
        config.inner_sizes = sizes if sizes != usual else None


class ReZeroResNetModel(ReZeroResNetPreTrainedModel):
    """Stem, stages of residual blocks, and the mean over the image.

    Raises:
        ValueError: The images do not have `config.num_channels` channels.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroResNetConfig, ReZeroResNetModel
        >>> model = ReZeroResNetModel(ReZeroResNetConfig())
        >>> model(torch.randn(2, 3, 32, 32)).last_hidden_state.shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, config: ReZeroResNetConfig):
        super().__init__(config)
        is_small, self.activation = config.stem == "cifar", ACT2FN[config.hidden_act]
        kernel, stride = (3, 1) if is_small else (7, 2)
        self.conv1 = _convolution(config, config.num_channels, config.embedding_size, kernel, stride)
        self.bn1 = _norm(config, config.embedding_size)
        self.pool = nn.Identity() if is_small else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.ModuleList(_stages(config))
        if config.activation_position == "pre":
            self.norm = _norm(config, config.hidden_sizes[-1])
        self.post_init()

    def extra_repr(self) -> str:
        """The residual weights of all layers in one line: a line for each layer would keep the repr from grouping layers."""
        weights = [p for name, p in self.named_parameters() if name.endswith("resweight")]
        if not weights or any(type(p) is not nn.Parameter or p.is_meta for p in weights):  # sharded, or without values
            return ""
        values = torch.cat([p.detach().cpu().float() for p in weights])
        return f"{len(values)} residual weights from {values.min():.3g} to {values.max():.3g}"

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Features of images (B, C, H, W): a map (B, `hidden_sizes[-1]`, h, w), and its mean (B, `hidden_sizes[-1]`)."""
        refuse_unknown(self, kwargs)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"got pixel_values of shape {tuple(pixel_values.shape)}: expected (batch, {self.config.num_channels}, "
                f"height, width), channels first."
            )
        hidden_states = self.pool(self.activation(self.bn1(self.conv1(pixel_values))))
        for stage in self.stages:
            for block in stage:
                hidden_states = block(hidden_states)
        if self.config.activation_position == "pre":
            hidden_states = self.activation(self.norm(hidden_states))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states, pooler_output=hidden_states.mean((2, 3))
        )


class ReZeroResNetForImageClassification(ReZeroResNetPreTrainedModel):
    """A linear classifier on the mean over the image.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroResNetConfig, ReZeroResNetForImageClassification
        >>> model = ReZeroResNetForImageClassification(ReZeroResNetConfig(num_labels=10))
        >>> model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 9])).logits.shape
        torch.Size([2, 10])
        >>> round(sum(p.numel() for p in model.parameters()) / 1e6, 2)  # ResNet-20
        0.27
    """

    accepts_loss_kwargs = False  # the loss is the mean over the images of a batch

    def __init__(self, config: ReZeroResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.resnet = ReZeroResNetModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits (B, `num_labels`) of images (B, C, H, W), and the loss in nats when `labels` (B,) are given."""
        outputs = self.resnet(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["ReZeroResNetForImageClassification", "ReZeroResNetModel", "ReZeroResNetPreTrainedModel"]
