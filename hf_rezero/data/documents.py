"""The bytes of a text as pieces of Unicode, for tokenizers."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


PIECE = 1 << 16  # bytes of a piece: enough for any merge, few enough to spread over workers
NEWLINE = 10


class Piece(NamedTuple):
    """Where a piece starts and stops in its part, and whether a document ends with it."""

    start: int
    stop: int
    ends_document: bool


def pieces(data: np.ndarray, ends: np.ndarray | None = None, size: int = PIECE) -> Iterator[Piece]:
    """Cuts UTF-8 bytes into documents, and these into pieces of at most `size` bytes, behind a newline where there is one.

    An incomplete character at either end of the data, which a cut by bytes leaves, is left out.

    Args:
        data: uint8 [n_bytes].
        ends: Where in `data` each document ends, at a newline that belongs to none; None: all is one document, whose
            end is not part of it.
        size: At least 4, for the longest character.

    Example:
        >>> data = np.frombuffer("été\\nà\\nb".encode()[1:], np.uint8)
        >>> [decode(data, piece) for piece in pieces(data, size=4)]
        ['té\\n', 'à\\nb']
        >>> [(decode(data, piece), piece.ends_document) for piece in pieces(data, np.array([7]))]
        [('té\\nà', True), ('b', False)]
    """
    start, last = whole_characters(data)
    for end in [] if ends is None else ends.tolist():
        yield from _of_document(data, start, end, size, ends_document=True)
        start = end + 1
    yield from _of_document(data, start, last, size, ends_document=False)


def _of_document(data: np.ndarray, start: int, stop: int, size: int, ends_document: bool) -> Iterator[Piece]:
    while stop - start > size:
        end = start + _cut(data[start : start + size])
        yield Piece(start, end, ends_document=False)
        start = end
    if start < stop or ends_document:
        yield Piece(start, max(start, stop), ends_document)


def whole_characters(data: np.ndarray) -> tuple[int, int]:
    """Where the first whole character starts, and where the last one ends.

    Example:
        >>> whole_characters(np.frombuffer("été".encode()[1:-1], np.uint8))
        (1, 2)
    """
    start = next((i for i, byte in enumerate(data[:4].tolist()) if not _continues(byte)), 0)
    return start, max(start, _character_end(data))


def decode(data: np.ndarray, piece: Piece) -> str:
    """The text of a piece.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        return bytes(data[piece.start : piece.stop]).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {piece.start + error.start:,} of the text is not UTF-8 ({error.reason}), which tokenizers read: "
            f"convert the text to UTF-8, or train on its bytes, without a tokenizer."
        ) from None


def _cut(data: np.ndarray) -> int:
    newlines = np.flatnonzero(np.asarray(data) == NEWLINE)
    return int(newlines[-1]) + 1 if len(newlines) else max(1, _character_end(data))


def _character_end(data: np.ndarray) -> int:
    """The length of the bytes without an incomplete last character."""
    for back, byte in enumerate(data[-4:][::-1].tolist(), start=1):
        if not _continues(byte):
            width = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if width > back else len(data)
    return len(data)


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80
