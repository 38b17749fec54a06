"""A byte-level BPE tokenizer, trained on a text."""

from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .documents import decode, pieces
from .tokenizer import SPECIAL_TOKENS


SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_bpe(
    texts: np.ndarray | Iterable[str], vocab_size: int, *, progress: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2).

    Ids start with the special tokens of `byte_tokenizer`, `<|eos|>` the end of a text among them, then come the 256
    bytes, then merges in the order in which they were learned. As every byte is a token, no text is unknown and
    decoding is exact. No special token is added to a text; texts are padded on the left.

    Args:
        texts: The bytes of a text in UTF-8, such as a part of a `Corpus`, or an iterable of texts.
        vocab_size: Number of all ids, at least 262; a short text may have fewer merges to learn.
        progress: Show the progress of the `tokenizers` library.

    Raises:
        ValueError: A vocabulary that is too small for the bytes, or bytes that are not UTF-8.

    Example:
        >>> tokenizer = train_bpe(["to be or not to be"] * 9, vocab_size=270)
        >>> tokenizer.decode(tokenizer("Déjà vu, not to be").input_ids)
        'Déjà vu, not to be'
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"got vocab_size={vocab_size}: at least {SMALLEST_VOCABULARY} are needed, 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    backend.train_from_iterator(_texts_of(texts) if isinstance(texts, np.ndarray) else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def _texts_of(data: np.ndarray) -> Iterator[str]:
    return (decode(data, piece) for piece in pieces(data))
