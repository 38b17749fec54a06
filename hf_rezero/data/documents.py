"""The bytes of a text as pieces of Unicode, for tokenizers."""

from collections.abc import Iterator

import numpy as np


PIECE = 1 << 16  # bytes of a piece: enough for any merge, few enough to spread over workers
_NEWLINE = 10


def pieces(data: np.ndarray, size: int = PIECE) -> Iterator[str]:
    """Cuts UTF-8 bytes into texts of at most `size` bytes, after a newline where there is one.

    An incomplete character at either end, which a cut by bytes leaves, is left out.

    Raises:
        ValueError: Bytes that are not UTF-8.

    Example:
        >>> list(pieces(np.frombuffer("été\\nà".encode()[1:-1], np.uint8), size=4))
        ['t', 'é\\n']
    """
    start, stop = whole_characters(data)
    while start < stop:
        end = min(start + size, stop)
        if end < stop:
            end = _cut(data[start:end]) + start
        yield decode(data[start:end], start)
        start = end


def whole_characters(data: np.ndarray) -> tuple[int, int]:
    """Where the first whole character starts, and where the last one ends.

    Example:
        >>> whole_characters(np.frombuffer("été".encode()[1:-1], np.uint8))
        (1, 2)
    """
    start = next((i for i, byte in enumerate(data[:4]) if not _continues(byte)), 0)
    return start, max(start, _character_end(data))


def decode(data: np.ndarray, position: int = 0) -> str:
    """The text of some bytes, which start at `position` of their part.

    Raises:
        ValueError: They are not UTF-8.
    """
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {position + error.start:,} is not UTF-8 ({error.reason}): tokenizers read text. Convert the file to "
            f"UTF-8, or train on its bytes, without a tokenizer."
        ) from None


def _cut(data: np.ndarray) -> int:
    newlines = np.flatnonzero(np.asarray(data) == _NEWLINE)
    return int(newlines[-1]) + 1 if len(newlines) else max(1, _character_end(data))


def _character_end(data: np.ndarray) -> int:
    """The length of the bytes without an incomplete last character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = int(data[-back])
        if not _continues(byte):
            width = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if width > back else len(data)
    return len(data)


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80
