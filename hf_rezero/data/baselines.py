"""What a language model is held against: the bits per byte of a count of pairs and of a compressor, on the same text."""

import lzma

import numpy as np


def bigram_bits(train: np.ndarray, text: np.ndarray) -> float:
    """Bits per byte of p(b | a) = (n(a, b) + 1) / (n(a) + 256), with the counts n of the training bytes, on a text.

    Args:
        train: The bytes that are counted, uint8.
        text: The bytes that are predicted, uint8, at least 2; the first one is given.

    Example:
        >>> ab = np.frombuffer(b"ab" * 1000, dtype=np.uint8)
        >>> round(bigram_bits(ab, ab[:100]), 2)  # -log2(1001 / 1256), for a and b alike
        0.33
    """
    pairs = np.bincount(train[:-1].astype(np.int64) * 256 + train[1:], minlength=256 * 256).reshape(256, 256)
    first, second = text[:-1], text[1:]
    probabilities = (pairs[first, second] + 1) / (pairs.sum(1)[first] + 256)
    return float(-np.log2(probabilities).mean())


def xz_bits(before: np.ndarray, text: np.ndarray) -> float:
    """Bits per byte that `xz -9` needs for a text behind other bytes: 8 (|xz(before text)| - |xz(before)|) / |text|.

    Example:
        >>> noise = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
        >>> xz_bits(noise[:0], noise) > 8, xz_bits(noise, noise) < 1
        (True, True)
    """
    alone, joined = (len(lzma.compress(bytes(b), preset=9)) for b in (before, np.concatenate((before, text))))
    return 8 * (joined - alone) / len(text)
