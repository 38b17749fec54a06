"""Configuration of the ReZero ResNets (Bachlechner et al. 2020, arXiv:2003.04887, section 6; He et al. 2015, 2016)."""

from transformers.configuration_utils import PreTrainedConfig, strict


CONFIG_VERSION = 1

AUTO_MAP = {
    "AutoConfig": "configuration_rezero_resnet.ReZeroResNetConfig",
    "AutoModel": "modeling_rezero_resnet.ReZeroResNetModel",
    "AutoModelForImageClassification": "modeling_rezero_resnet.ReZeroResNetForImageClassification",
}

CHOICES = {
    "stem": ("cifar", "imagenet"),
    "layer_type": ("basic", "bottleneck"),
    "activation_position": ("branch", "sum", "pre"),
    "norm_type": ("batchnorm", "none"),
    "shortcut_type": ("pad", "projection"),
}

# the least and the greatest value of each number; none of them holds NaN
RANGES = {"num_channels": (1, 10**9), "embedding_size": (1, 10**9), "resweight_init": (-1e30, 1e30)}

CONVOLUTIONS = {"basic": 2, "bottleneck": 3}


@strict
class ReZeroResNetConfig(PreTrainedConfig):
    r"""Shape and residual rule of a ResNet for images; the default is the ResNet-20 of CIFAR-10 with ReZero.

    With `F` the convolutions of a block, each followed by its norm and, except the last, by an activation, and
    `w` the `resweight`:

    | rule                                          | `activation_position` | `resweight_init` | `resweight_trainable` |
    |-----------------------------------------------|-----------------------|------------------|-----------------------|
    | ReZero `x + w relu(F(x))`, official code      | branch                | 0                | True                  |
    | ResNet `relu(x + F(x))`, He et al. 2015       | sum                   | 1                | False                 |
    | the same, gamma of the last norm 0 at first   | sum, and `zero_init_residual` | 1        | False                 |
    | ReZero, `relu(x + w F(x))`                    | sum                   | 0                | True                  |
    | pre-activation `x + F(relu(N(x)))`, He et al. 2016 | pre              | 1                | False                 |
    | ReZero with pre-activation `x + w F(relu(N(x)))` | pre                | 0                | True                  |

    | net                   | `stem`   | `layer_type` | `embedding_size` | `hidden_sizes`             | `depths`        |
    |-----------------------|----------|--------------|------------------|----------------------------|-----------------|
    | 6n + 2 on CIFAR-10    | cifar    | basic        | 16               | [16, 32, 64]               | [n, n, n]       |
    | 18                    | imagenet | basic        | 64               | [64, 128, 256, 512]        | [2, 2, 2, 2]    |
    | 50                    | imagenet | bottleneck   | 64               | [256, 512, 1024, 2048]     | [3, 4, 6, 3]    |

    n = 3, 9, 18, 200 are ResNet-20, 56, 110, 1202. ResNet-50 has `shortcut_type="projection"`, He et al.'s option B.

    Args:
        num_channels: Channels of the images.
        stem: `cifar`, a convolution of 3 x 3; `imagenet`, one of 7 x 7 and a pooling, which divide the sides by 4.
        embedding_size: Channels after the stem.
        hidden_sizes: Channels of each stage; the first block of every stage but the first halves the sides.
        depths: Blocks of each stage.
        layer_type: `basic`, two convolutions of 3 x 3; `bottleneck`, 1 x 1, 3 x 3 and 1 x 1 with a quarter of the channels.
        norm_type: `batchnorm`, or `none`: convolutions with a bias.
        shortcut_type: Where a block changes its shape: `pad`, every second pixel and channels of 0 (option A), or
            `projection`, a convolution of 1 x 1 (option B).
        resweight_init: Initial residual weight.
        zero_init_residual: Gamma of the last norm of each block starts at 0. Refused with `resweight_init` 0:
            the block would never get a gradient.
        inner_sizes: Channels inside the blocks, `[stage][block][convolution]`, as pruning leaves them; `None` takes
            them from the stage.
        config_version: Format of this file; a format newer than the code is refused.

    Raises:
        ValueError: A value is not one of its choices, lists do not match, or `resweight` and gamma both start at 0.

    Example:
        >>> from hf_rezero import ReZeroResNetConfig
        >>> ReZeroResNetConfig(depths=[9, 9, 9]).num_hidden_layers  # ResNet-56, by its blocks
        27
    """

    model_type = "rezero_resnet"

    num_channels: int = 3
    stem: str = "cifar"
    embedding_size: int = 16
    hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    depths: list[int] | tuple[int, ...] = (3, 3, 3)
    layer_type: str = "basic"
    hidden_act: str = "relu"
    activation_position: str = "branch"
    norm_type: str = "batchnorm"
    shortcut_type: str = "pad"
    resweight_init: float | int = 0.0
    resweight_trainable: bool = True
    zero_init_residual: bool = False
    inner_sizes: list | None = None
    config_version: int = CONFIG_VERSION

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def num_hidden_layers(self) -> int:
        """Residual blocks."""
        return sum(self.depths)

    def validate_architecture(self):
        """Refuse values that no model can be built from, each with one message that says what to do."""
        if self.config_version > CONFIG_VERSION:
            raise ValueError(
                f"config_version={self.config_version} was written by a newer hf_rezero; this one reads up to "
                f"{CONFIG_VERSION}: upgrade hf_rezero."
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(choices)}.")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"got {name}={getattr(self, name)}: expected {low:g} to {high:g}.")
        if len(self.hidden_sizes) != len(self.depths) or min(*self.depths, *self.hidden_sizes, 1) < 1:
            raise ValueError(
                f"got hidden_sizes={self.hidden_sizes} and depths={self.depths}: give each stage a number of "
                f"channels and one of blocks, both at least 1."
            )
        if self.zero_init_residual and (self.resweight_init == 0 or self.norm_type == "none"):
            raise ValueError(
                f"zero_init_residual with resweight_init={self.resweight_init} and norm_type={self.norm_type!r}: two "
                f"zeros in a row never leave 0, and without a norm there is no gamma; choose one way to start at 0."
            )
        self._validate_inner_sizes()

    def _validate_inner_sizes(self):
        if self.inner_sizes is None:
            return
        counts = [len(stage) for stage in self.inner_sizes]
        sizes = [block for stage in self.inner_sizes for block in stage]
        inner = CONVOLUTIONS[self.layer_type] - 1
        if counts != self.depths or any(len(block) != inner or min(block) < 1 for block in sizes):
            raise ValueError(
                f"got inner_sizes={self.inner_sizes}: expected the channels between the convolutions, {inner} positive "
                f"number{'s' * (inner > 1)}, for each of depths={self.depths} blocks."
            )


__all__ = ["ReZeroResNetConfig"]
