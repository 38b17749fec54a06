"""Log-likelihoods, exact for every batch size."""

import torch
from torch import nn


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model generates text and is no encoder-decoder."""
    can_generate = getattr(model, "can_generate", None)
    generates = callable(can_generate) and bool(can_generate())
    return generates and not getattr(model.config, "is_encoder_decoder", False)


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood in nats and number of predicted tokens of each sequence.

    Args:
        logits: (B, T, V); position t predicts label t + 1.
        labels: (B, T), -100 where nothing is to be predicted.

    Returns:
        Two tensors of shape (B,): float32 nats, int64 counts.
    """
    targets = labels[:, 1:]
    nll = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return nll.sum(1), targets.ne(-100).sum(1)
