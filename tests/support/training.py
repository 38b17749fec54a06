"""A small corpus and a `ReZeroTrainer` on it."""

import numpy as np
import torch

from hf_rezero import ReZeroTrainer
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows


TEXT = np.random.default_rng(0).integers(97, 123, 700).astype(np.uint8)


def make_trainer(model, args, **kwargs):
    data = {"train_dataset": ByteDataset(TEXT, 16), "eval_dataset": evaluation_windows(TEXT[:300], 16)}
    return ReZeroTrainer(model, args, **{**data, "data_collator": collate_bytes, **kwargs})


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(mine, theirs):
    return all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
