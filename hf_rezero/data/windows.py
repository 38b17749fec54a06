"""Windows of a corpus for training and evaluation."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from .corpora import as_range, from_range
from .description import DataDescription, DescribedDataset
from .units import NUM_BYTES


_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class ByteDataset(DescribedDataset):
    """Windows of `block_size` consecutive bytes or tokens for a causal language model, `{"input_ids", "labels"}`, int64.

    Training (`stride=None`): with B = `block_size` and n bytes or tokens, window i of epoch e is
    `data[p_e + i B : p_e + (i + 1) B]`, where

        p_e = floor(frac(0.618... e) min(B, n - B len + 1)),    len = max(1, floor((n - B + 1) / B)).

    The length is the same in every epoch, as samplers expect, and the cuts fall elsewhere in each, so that every byte
    is predicted in most epochs, with changing context. Labels and inputs are the same tensor.

    Evaluation (`stride=s`): windows start at 0, s, 2 s, ..., the last one ends with the data. Labels are -100 where an
    earlier window has predicted the byte, and on the very first byte. As the model predicts label j from the inputs
    before j, each byte but the first is then predicted exactly once, after at least B - s bytes (fewer only within the
    first window). Windows are all `block_size` long; data shorter than that is one short window. With `token_bytes`
    each evaluation window has `num_bytes`, int64, the bytes behind the tokens that it predicts; take it out before the
    rest goes to a model, as `ReZeroTrainer` does.

    Batches are gathered in one step (`__getitems__`), so give the DataLoader `collate_fn=collate_bytes`. Worker
    processes map the file again instead of receiving its bytes.

    Args:
        data: bytes, `uint8` of shape `[n_bytes]` as a part of a `Corpus` is, or the ids of `Tokens`, of any unsigned type.
        block_size: bytes or tokens per window.
        stride: None for training, else the step from one evaluation window to the next, 1 ... `block_size` - 1.
        token_bytes: for the ids of tokens, the number of bytes behind each, as `Tokens` has them.

    Raises:
        ValueError: data that is neither bytes nor ids or too short, or a `block_size` or `stride` out of range.

    Example:
        >>> dataset = ByteDataset(b"hello world", block_size=4)
        >>> len(dataset), bytes(dataset[1]["input_ids"].tolist())
        (2, b'o wo')
    """

    def __init__(
        self,
        data: np.ndarray | bytes,
        block_size: int,
        stride: int | None = None,
        token_bytes: np.ndarray | None = None,
    ):
        data = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
        _check_window_sizes(data, block_size, stride)
        if token_bytes is not None and token_bytes.shape != data.shape:
            raise ValueError(
                f"token_bytes has the shape {token_bytes.shape}, the ids have {data.shape}: one for each."
            )
        self.data, self.block_size, self.stride, self.token_bytes = data, block_size, stride, token_bytes
        self._phase = 0
        self._map_windows()

    def _map_windows(self) -> None:
        width = min(self.block_size, len(self.data))
        self._windows = sliding_window_view(np.asarray(self.data), width)  # [n - width + 1, width]
        if self.token_bytes is not None:
            self._bytes_in_windows = sliding_window_view(np.asarray(self.token_bytes), width)

    def set_epoch(self, epoch: int) -> None:
        """Moves the cuts between training windows to those of epoch 0, 1, ...; evaluation windows never move.

        Call it before the epoch's iterator is made. Loaders prepared by accelerate do so in a single process only;
        with more, call it yourself on every rank. Workers that outlive an epoch (`persistent_workers=True`) hold a
        copy that keeps the phase it was born with.
        """
        if self.stride is None:
            slack = len(self.data) - len(self) * self.block_size
            self._phase = int(epoch * _GOLDEN_RATIO % 1 * min(self.block_size, slack + 1))

    def describe(self) -> DataDescription:
        """Say how many windows there are, of how many bytes and tokens, and how they lie."""
        found = DataDescription(len(self), block_size=self.block_size, stride=self.stride or self.block_size)
        if self.token_bytes is None and self.data.dtype == np.uint8:
            found.bytes = len(self.data)
        else:
            found.tokens = len(self.data)
        if self.token_bytes is not None:
            found.bytes = int(self.token_bytes.sum(dtype=np.int64))
        return found

    def __len__(self) -> int:
        size, block = len(self.data), self.block_size
        if self.stride is None:
            return max(1, (size - block + 1) // block)
        return max(0, -(-(size - block) // self.stride)) + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.__getitems__([range(len(self))[index]])[0]
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        # A list of one batch, not the batch itself: Trainer's column filter iterates over what it gets here, and of a
        # dict it would pass on nothing but the keys.
        rows = np.asarray(indices, dtype=np.int64)
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"window indices {rows.min()} ... {rows.max()} of a dataset of {len(self)} windows")
        step = self.stride or self.block_size
        starts = np.minimum(self._phase + rows * step, len(self._windows) - 1)
        inputs = labels = torch.from_numpy(self._windows[starts]).long()
        if self.stride is not None:
            overlap = np.where(rows == 0, 1, (rows - 1) * step + self.block_size - starts)
            predicted_before = torch.arange(inputs.shape[1]) < torch.from_numpy(overlap)[:, None]
            labels = inputs.masked_fill(predicted_before, -100)
            if self.token_bytes is not None:
                num_bytes = torch.from_numpy(self._bytes_in_windows[starts].astype(np.int64))
                num_bytes = num_bytes.masked_fill(predicted_before, 0).sum(1)
                return [{"input_ids": inputs, "labels": labels, NUM_BYTES: num_bytes}]
        return [{"input_ids": inputs, "labels": labels}]

    def __getstate__(self) -> dict:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_windows", "_bytes_in_windows")}
        token_bytes = None if self.token_bytes is None else as_range(self.token_bytes)
        return {**state, "data": as_range(self.data), "token_bytes": token_bytes}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.data = from_range(self.data)
        self.token_bytes = None if self.token_bytes is None else from_range(self.token_bytes)
        self._map_windows()


def evaluation_windows(
    data: np.ndarray | bytes, block_size: int, stride: int | None = None, token_bytes: np.ndarray | None = None
) -> ByteDataset:
    """Windows that predict every byte or token of `data` but the first exactly once: `ByteDataset` with a stride.

    `stride=None` means `block_size // 2`: each byte is predicted from at least half a window of context, at twice the
    cost of `stride=block_size - 1`, the cheapest that covers every byte. Report block size and stride with any number.

    Raises:
        ValueError: as `ByteDataset`.

    Example:
        >>> windows = evaluation_windows(b"hello world", block_size=4)
        >>> sum(int((window["labels"] != -100).sum()) for window in windows)
        10
    """
    return ByteDataset(data, block_size, max(1, block_size // 2) if stride is None else stride, token_bytes)


def collate_bytes(batch: Mapping | Sequence[Mapping]) -> Mapping[str, torch.Tensor]:
    """The `collate_fn` for `ByteDataset`: int64 `[batch, block_size]` per key, of a gathered batch or a list of items.

    Input ids and labels of a gathered training batch are one tensor: copy before changing either in place.

    Example:
        >>> dataset = ByteDataset(b"hello world", block_size=4)
        >>> collate_bytes([dataset[0], dataset[1]])["labels"].shape
        torch.Size([2, 4])
    """
    if isinstance(batch, Mapping):
        return batch
    if len(batch) == 1 and batch[0]["input_ids"].ndim == 2:
        return batch[0]
    return {key: torch.stack([item[key] for item in batch]) for key in batch[0]}


def _check_window_sizes(data: np.ndarray, block_size: int, stride: int | None) -> None:
    if data.dtype.kind != "u" or data.ndim != 1:
        raise ValueError(
            f"data is {data.dtype} of shape {data.shape}: a one-dimensional array of bytes, uint8, or of the ids of "
            "tokens, in another unsigned type, is needed"
        )
    if len(data) < 2:
        raise ValueError(f"data has {len(data)} bytes: at least 2 are needed to predict one from another")
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}: at least 2 is needed to predict one byte from another")
    if stride is not None and not 1 <= stride < block_size:
        raise ValueError(f"stride is {stride}: with block_size {block_size} it must be 1 ... {block_size - 1}")
    if stride is None and len(data) < block_size:
        raise ValueError(
            f"the training part has {len(data)} bytes, one block needs {block_size}: "
            "use a longer corpus or a smaller --block_size"
        )
