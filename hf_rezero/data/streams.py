"""Windows of a stream of texts that is never kept whole."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase
from transformers.utils import logging

from .documents import NEWLINE
from .tokens import Encoder
from .units import tokens_are_bytes


logger = logging.get_logger(__name__)

_TEXTS = 64  # that are tokenized at once


class StreamedWindows(IterableDataset):
    """Windows of the texts of a stream, laid end to end without padding, as `{"input_ids", "labels"}`, int64.

    Behind each text stands the end token, or a newline where tokens are bytes. The stream begins again where it ends,
    shuffled anew, so that it has no last window: train for a number of steps. As each pass is shuffled by its number,
    a Trainer that resumes and skips the windows that it had goes on with the very next one.

    Args:
        texts: The texts of a pass, 0, 1, ....
        tokenizer: Of transformers; the byte tokenizer stands for bytes.
        block_size: Tokens per window.

    Raises:
        ValueError: From the iterator, if a pass has less text than one window needs.

    Example:
        >>> from hf_rezero import byte_tokenizer
        >>> stream = StreamedWindows(lambda epoch: ["to be", "or not"], byte_tokenizer(), block_size=8)
        >>> [bytes(window["input_ids"].tolist()) for window in islice(stream, 2)]
        [b'to be\\nor', b' not\\nto ']
    """

    def __init__(self, texts: Callable[[int], Iterable[str]], tokenizer: PreTrainedTokenizerBase, block_size: int):
        self.texts, self.tokenizer, self.block_size = texts, tokenizer, block_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        encode = _encode_bytes if tokens_are_bytes(self.tokenizer) else _encoder(self.tokenizer)
        rest = np.empty(0, np.int64)
        for epoch in count():
            read = 0
            texts = iter(self.texts(epoch))
            while some := list(islice(texts, _TEXTS)):
                ids = encode(some)
                read += len(ids)
                whole = (len(rest) + len(ids)) // self.block_size * self.block_size
                ids = np.concatenate([rest, ids])
                for block in torch.from_numpy(ids[:whole]).view(-1, self.block_size):
                    yield {"input_ids": block, "labels": block}
                rest = ids[whole:]
            if read < self.block_size:
                raise ValueError(
                    f"the stream ended after {read} tokens, and a window needs {self.block_size}: give more text or a "
                    f"smaller --block_size."
                )
            logger.warning_once(f"the stream of texts ended after {read:,} tokens and begins again, shuffled anew.")


class MaskedStream(IterableDataset):
    """The windows of a stream with some tokens masked, by the number of the window: see `MaskedBytes`."""

    def __init__(self, windows: StreamedWindows, mlm_probability: float, seed: int):
        self.windows, self.seed = windows, seed
        self.masking = DataCollatorForLanguageModeling(windows.tokenizer, mlm_probability=mlm_probability)
        self.special_ids = torch.tensor(windows.tokenizer.all_special_ids)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index, window in enumerate(self.windows):
            self.masking.generator = torch.Generator().manual_seed(self.seed + index)
            original = window["input_ids"][None]
            is_special = torch.isin(original, self.special_ids)
            ids, labels = self.masking.torch_mask_tokens(original.clone(), special_tokens_mask=is_special)
            if labels.eq(-100).all():
                labels[:, 0] = original[:, 0]  # the mean loss over nothing would be nan
            yield {"input_ids": ids[0], "labels": labels[0]}


def _encode_bytes(texts: list[str]) -> np.ndarray:
    data = b"".join(text.encode() + bytes([NEWLINE]) for text in texts)
    return np.frombuffer(data, np.uint8).astype(np.int64)


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], np.ndarray]:
    encoder = Encoder(tokenizer)
    end = [encoder.required_end()]

    def encode(texts: list[str]) -> np.ndarray:
        return np.concatenate([part for ids, _ in encoder.encode(texts) for part in (ids, end)]).astype(np.int64)

    return encode
