"""Masked windows of bytes or tokens, as BERT reads them."""

import torch
from transformers import DataCollatorForLanguageModeling

from .description import DataDescription, DescribedDataset
from .tokenizer import byte_tokenizer
from .windows import ByteDataset


class MaskedBytes(DescribedDataset):
    """Windows of `block_size` bytes or tokens, some of them masked; `labels` are -100 where nothing is to be predicted.

    The special tokens of a tokenizer, such as those between documents, are never masked; bytes have none. Without a
    tokenizer the data are bytes.

    Training windows are masked anew whenever they are read. `fixed` windows, for evaluation, have masks that follow
    from their number alone: every evaluation asks the same of every model, at any batch size.
    """

    def __init__(self, data, block_size: int, mlm_probability: float, fixed: bool = False, tokenizer=None):
        self.windows = ByteDataset(data, block_size)
        tokenizer = tokenizer or byte_tokenizer()
        self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
        self.special_ids = torch.tensor(tokenizer.all_special_ids)
        self.fixed = fixed

    def set_epoch(self, epoch: int) -> None:
        """Move the cuts between training windows, as `ByteDataset` does."""
        if not self.fixed:
            self.windows.set_epoch(epoch)

    def describe(self) -> DataDescription:
        """Say what the windows are that get masked."""
        return self.windows.describe()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self._mask([index]).items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        # a list of one gathered batch, as `ByteDataset` gives and `collate_bytes` takes
        return [self[index] for index in indices] if self.fixed else [self._mask(indices)]

    def _mask(self, indices: list[int]) -> dict[str, torch.Tensor]:
        # None is the global generator, which the Trainer seeds, and the DataLoader in each worker and epoch
        self.masking.generator = torch.Generator().manual_seed(indices[0]) if self.fixed else None
        original = self.windows.__getitems__(indices)[0]["input_ids"]
        is_special = torch.isin(original, self.special_ids)
        ids, labels = self.masking.torch_mask_tokens(original.clone(), special_tokens_mask=is_special)
        if labels.eq(-100).all():
            labels[:, 0] = original[:, 0]  # the mean loss over nothing would be nan
        return {"input_ids": ids, "labels": labels}
