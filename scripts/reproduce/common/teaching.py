"""A loss on the labels and on what another model says, as `--distill_from` has it in the commands."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_rezero.trainer.distillation import predicted, soft_target_loss


WEIGHT, TEMPERATURE = 0.5, 2.0


def taught_loss(model: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(1 - w) H + w T^2 D of causal models, with the divergence D from the teacher's next tokens."""
    output = model(**batch)
    with torch.no_grad():
        target = teacher(batch["input_ids"]).logits
    own, other = (predicted(logits, batch["labels"], True) for logits in (output.logits, target))
    return (1 - WEIGHT) * output.loss + WEIGHT * soft_target_loss(own, other, TEMPERATURE).mean()
