"""Configuration of the fully connected ReZero nets (Bachlechner et al. 2020, arXiv:2003.04887, section 4)."""

from transformers.configuration_utils import PreTrainedConfig, strict


CONFIG_VERSION = 1

AUTO_MAP = {
    "AutoConfig": "configuration_rezero_mlp.ReZeroMLPConfig",
    "AutoModel": "modeling_rezero_mlp.ReZeroMLPModel",
    "AutoModelForImageClassification": "modeling_rezero_mlp.ReZeroMLPForImageClassification",
}

CHOICES = {
    "hidden_act": ("relu", "relu2", "gelu", "gelu_pytorch_tanh", "silu", "tanh"),
    "norm_position": ("none", "pre", "post", "branch"),
}

# the least and the greatest value of each number; none of them holds NaN
RANGES = {
    "image_size": (1, 10**9),
    "num_channels": (1, 10**9),
    "num_hidden_layers": (1, 10**9),
    "hidden_size": (1, 10**9),
    "norm_eps": (0, 1),
    "resweight_init": (-1e30, 1e30),
    "initializer_variance": (0, 1e30),
}


@strict
class ReZeroMLPConfig(PreTrainedConfig):
    r"""Shape and residual rule of a fully connected net for images; the defaults are those of the paper's Figure 3.

    With `F(x) = act(W x + b)`, `N` a layer norm and `w` the `resweight`:

    | rule                     | `norm_position` | `skip_connection` | `resweight_init` | `resweight_trainable` |
    |--------------------------|-----------------|-------------------|------------------|-----------------------|
    | ReZero `x + w F(x)`      | none            | True              | 0                | True                  |
    | deep net `F(x)`          | none            | False             | 1                | False                 |
    | deep net + norm `N(F(x))`| post            | False             | 1                | False                 |
    | residual `x + F(x)`      | none            | True              | 1                | False                 |
    | pre-norm `x + F(N(x))`   | pre             | True              | 1                | False                 |
    | post-norm `N(x + F(x))`  | post            | True              | 1                | False                 |
    | branch norm `x + N(F(x))`| branch          | True              | 1                | False                 |

    Args:
        image_size: Height and width of the images; the net reads all their values at once.
        num_channels: Channels of the images.
        num_hidden_layers: Layers between the first, which maps the image to `hidden_size`, and the classifier.
        initializer_variance: Variance of the hidden weights, times their number of inputs. 2 keeps the size of rectified
            activations; the official code uses 0.25 for the residual net.
        config_version: Format of this file; a format newer than the code is refused.

    Raises:
        ValueError: A value is not one of its choices, or a size is not positive.

    Example:
        >>> from hf_rezero import ReZeroMLPConfig
        >>> ReZeroMLPConfig(num_hidden_layers=10_000, hidden_size=150).hidden_act
        'relu'
    """

    model_type = "rezero_mlp"

    image_size: int = 32
    num_channels: int = 3
    num_hidden_layers: int = 32
    hidden_size: int = 256
    hidden_act: str = "relu"
    norm_position: str = "none"
    norm_eps: float = 1e-5
    skip_connection: bool = True
    resweight_init: float | int = 0.0
    resweight_trainable: bool = True
    initializer_variance: float | int = 2.0
    config_version: int = CONFIG_VERSION

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self.validate_architecture()

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


__all__ = ["ReZeroMLPConfig"]
