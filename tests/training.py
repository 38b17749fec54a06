"""A small corpus and a `ReZeroTrainer` on it."""

import numpy as np

from hf_rezero import ReZeroTrainer
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows


TEXT = np.random.default_rng(0).integers(97, 123, 700).astype(np.uint8)


def make_trainer(model, args, **kwargs):
    data = {"train_dataset": ByteDataset(TEXT, 16), "eval_dataset": evaluation_windows(TEXT[:300], 16)}
    return ReZeroTrainer(model, args, **{**data, "data_collator": collate_bytes, **kwargs})
