"""The loss of a batch, by the convention of Hugging Face models."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The `.loss` of `model(**batch)`, the convention of Hugging Face models.

    Raises:
        ValueError: The batch is not a mapping, or the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no loss by itself: pass loss_fn, a function of (model, batch) "
            "that returns a scalar, or batches that are mappings for a model whose output has a .loss"
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch with the keys {sorted(batch)}: add labels to the "
            "batch, or pass loss_fn, a function of (model, batch) that returns a scalar"
        )
    return loss
