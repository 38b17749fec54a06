"""Small image models, a padded batch, and how close is close, for the tests of what others expect of a model."""

import torch

from hf_rezero import (
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
)


IMAGE_MODELS = {
    "resnet": lambda: ReZeroResNetForImageClassification(
        ReZeroResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], resweight_init=0.7, num_labels=3)
    ),
    "mlp": lambda: ReZeroMLPForImageClassification(
        ReZeroMLPConfig(image_size=32, num_hidden_layers=3, hidden_size=16, resweight_init=0.7, num_labels=3)
    ),
}


def padded_batch(ids, length=6):
    """The batch with `length` tokens of padding in front of its first row."""
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[0, :length], mask[0, :length] = 259, 0
    return {"input_ids": batch, "attention_mask": mask}


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
