"""Whether the tokens of a model are bytes, and in what its quality is measured."""

from collections.abc import Mapping
from typing import NamedTuple

from .tokenizer import byte_tokenizer


LARGEST_BYTE_VOCABULARY = 512  # bytes and special tokens, rounded up by whoever made the table


class Unit(NamedTuple):
    """The names of a metric: in the results of a run, as the Hub has it, and in words."""

    key: str
    hub_type: str
    words: str


NUM_BYTES = "num_bytes"  # of a batch for evaluation: the bytes behind the predicted tokens of each sample
BITS_PER_BYTE = Unit("bpb", "bits_per_byte", "bits per byte")
BITS_PER_TOKEN = Unit("bits_per_token", "bits_per_token", "bits per token")
PERPLEXITY = "perplexity"  # of a token; better when lower, as the units


def tokens_are_bytes(tokenizer=None, vocab_size: int | None = None) -> bool:
    """Whether a model reads bytes: by its tokenizer, or by the size of its vocabulary where there is none.

    Args:
        tokenizer: Whatever the inputs come from, or None; only what has a vocabulary counts.
        vocab_size: Of the model.

    Example:
        >>> tokens_are_bytes(byte_tokenizer()), tokens_are_bytes(vocab_size=264), tokens_are_bytes(vocab_size=50257)
        (True, True, False)
    """
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    return is_byte_vocabulary(vocabulary) if vocabulary else 0 < (vocab_size or 0) <= LARGEST_BYTE_VOCABULARY


def is_byte_vocabulary(vocabulary: Mapping[str, int]) -> bool:
    """Whether these are the tokens of `byte_tokenizer`, with the same ids."""
    return vocabulary == byte_tokenizer().get_vocab()


def saved_vocabulary(tokenizer: Mapping) -> Mapping[str, int]:
    """The tokens in the content of a `tokenizer.json`, where it lists them by name."""
    vocabulary = tokenizer.get("model", {}).get("vocab")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return vocabulary | added if isinstance(vocabulary, dict) else added
