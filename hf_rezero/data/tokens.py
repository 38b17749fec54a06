"""Texts as the ids of a tokenizer, kept as memory-mapped arrays beside the caches of bytes.

With every id goes the number of bytes of the text behind it, so that

    bpb = sum of -ln p(token) over the predicted tokens / ln 2 / sum of the bytes behind them

can be compared between tokenizers, and with models of bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..files import temporary_folder, written_whole
from .corpora import as_range, from_range
from .documents import Piece, decode, pieces
from .download import cache_key, default_cache


PIECES_OF_A_TASK = 32


@dataclass(frozen=True, eq=False)
class Tokens:
    """The ids of a text and the number of bytes behind each, `[n_tokens]`, of the smallest unsigned types that hold them.

    `num_bytes` is None where the tokenizer cannot tell: one without offsets, written in Python.
    """

    ids: np.ndarray
    num_bytes: np.ndarray | None


class Encoder:
    """A tokenizer for the insides of texts: it cuts nothing off, pads nothing and adds no token.

    Args:
        tokenizer: Of transformers; its own settings of truncation and padding stay as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.end_token_id: int | None = tokenizer.eos_token_id
        if self.end_token_id is None:
            self.end_token_id = tokenizer.sep_token_id
        self.id_type = np.min_scalar_type(max(tokenizer.get_vocab().values()))
        self.knows_bytes = bool(tokenizer.is_fast)

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library, on its own."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())  # pyright: ignore[reportOptionalMemberAccess]
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that decides about the ids."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        content = self.backend.to_str() if self.knows_bytes else f"{type(self.tokenizer).__name__} {vocabulary}"
        return hashlib.sha256(f"{self.end_token_id} {content}".encode()).hexdigest()

    def required_end(self) -> int:
        """What stands between documents.

        Raises:
            ValueError: The tokenizer has no such token.
        """
        if self.end_token_id is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has neither an end token nor a separator to put between documents: "
                f"set tokenizer.eos_token, and save it."
            )
        return self.end_token_id

    def encode(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, and the bytes behind them; of these there are none where they are not known."""
        if not self.knows_bytes:
            unknown = np.empty(0, np.uint32)
            for text in texts:
                ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
                yield np.array(ids, self.id_type), unknown
            return
        for text, encoding in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False), strict=True):
            ends = np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 1]
            yield np.array(encoding.ids, self.id_type), bytes_between(text, ends)

    def encode_pieces(self, data: np.ndarray, cut: Iterable[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of some pieces and the bytes behind them, with the end token, for the newline, behind documents."""
        cut = list(cut)
        end, newline = np.array([self.end_token_id or 0], self.id_type), np.array([1][: self.knows_bytes], np.uint32)
        ids, num_bytes = [], []
        for piece, encoded in zip(cut, self.encode([decode(data, piece) for piece in cut]), strict=True):
            ids += [encoded[0], end] if piece.ends_document else [encoded[0]]
            num_bytes += [encoded[1], newline] if piece.ends_document else [encoded[1]]
        return np.concatenate(ids), np.concatenate(num_bytes)


def bytes_between(text: str, ends: np.ndarray) -> np.ndarray:
    """The bytes of UTF-8 between the ends of tokens, `[n_tokens]`.

    A character that is cut into several tokens counts with the first of them, and what the tokenizer leaves out with
    the next, or at the end of the text with the last.

    Args:
        text: What was tokenized.
        ends: Behind which of its characters each token ends.

    Example:
        >>> bytes_between("à b ", np.array([1, 1, 3])).tolist()
        [2, 0, 3]
    """
    if not len(ends):
        return np.empty(0, np.uint32)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = np.ones(len(characters) + 1, np.int64)
    widths[0] = 0
    for first in (0x80, 0x800, 0x10000):
        widths[1:] += characters >= first
    positions = widths.cumsum()
    positions = np.append(np.maximum.accumulate(positions[ends[:-1]]), positions[-1])
    return np.diff(positions, prepend=0).astype(np.uint32)


def load_tokens(
    data: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: np.ndarray | None = None,
    num_workers: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    overwrite_cache: bool = False,
    progress: bool = False,
) -> Tokens:
    """Tokenizes a text, or maps the tokens that an earlier call left in the cache.

    Documents are laid end to end, without padding, each followed by the tokenizer's end token, or its separator if it
    has none; it stands for the newline between them. The cache goes by the content of the text and of the tokenizer, so
    that a changed text or tokenizer is never mistaken for the former one. Its files are written whole or not at all, and what
    killed calls have left in it is removed.

    Args:
        data: The text in UTF-8, uint8 `[n_bytes]`, such as a part of a `Corpus`.
        tokenizer: Of transformers; one that is not written in Python tells the bytes behind its tokens.
        ends: Where each document ends, see `Corpus.ends`; None: all is one document.
        num_workers: Processes that tokenize; None or 1: this one, with the threads of the `tokenizers` library.
        cache_dir: As in `load_corpus`.
        overwrite_cache: Tokenize again.
        progress: Show a bar.

    Raises:
        ValueError: Text that is not UTF-8, documents for a tokenizer without end token, or a text without tokens.

    Example:
        >>> from hf_rezero import byte_tokenizer
        >>> data = np.frombuffer("dé\\nf".encode(), np.uint8)
        >>> tokens = load_tokens(data, byte_tokenizer(), ends=np.array([3]), cache_dir="outputs/cache")
        >>> tokens.ids.tolist(), tokens.num_bytes.tolist()
        ([100, 195, 169, 257, 102], [1, 2, 0, 1, 1])
    """
    encoder = Encoder(tokenizer)
    if ends is not None and len(ends):
        encoder.required_end()
    digest = hashlib.sha256(data)
    digest.update(b"" if ends is None else np.ascontiguousarray(ends, np.int64))
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
    ids, num_bytes = (
        cache / f"tokens-{cache_key(digest.hexdigest(), encoder.fingerprint)}.{kind}.npy" for kind in ("ids", "bytes")
    )
    if overwrite_cache or not ids.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with temporary_folder(ids) as folder:
            bar = tqdm(desc="tokenizing", unit="B", unit_scale=True, total=len(data), disable=not progress)
            with bar:
                _write(_encoded(data, encoder, ends, num_workers or 1), encoder, folder, ids, num_bytes, bar)
    return Tokens(np.load(ids, mmap_mode="r"), np.load(num_bytes, mmap_mode="r") if encoder.knows_bytes else None)


def _encoded(data: np.ndarray, encoder: Encoder, ends, num_workers: int) -> Iterator[tuple]:
    """The start of each task, its ids, and the bytes behind them, in the order of the text."""
    cut = pieces(data, ends)
    tasks = iter(lambda: list(islice(cut, PIECES_OF_A_TASK)), [])
    if num_workers == 1:
        yield from ((task[-1].stop, *encoder.encode_pieces(data, task)) for task in tasks)
        return
    with ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(as_range(data), encoder)) as pool:
        yield from pool.map(_work, tasks)


def _start_worker(data, encoder: Encoder) -> None:
    global _data, _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    _data, _encoder = from_range(data), encoder


def _work(task: list[Piece]) -> tuple:
    return task[-1].stop, *_encoder.encode_pieces(_data, task)


def _write(parts, encoder: Encoder, folder: Path, ids: Path, num_bytes: Path, bar: tqdm) -> None:
    """Write the arrays as they come, then in their smallest types; that of the ids appears last."""
    raw_ids, raw_bytes = folder / "ids", folder / "bytes"
    with raw_ids.open("wb") as ids_file, raw_bytes.open("wb") as bytes_file:
        for stop, some_ids, some_bytes in parts:
            some_ids.tofile(ids_file)
            some_bytes.tofile(bytes_file)
            bar.update(stop - bar.n)
    if not raw_ids.stat().st_size:
        raise ValueError("the text has no tokens: at least two are needed.")
    with written_whole(ids) as ids_file, written_whole(num_bytes) as bytes_file:
        _save(ids_file, np.memmap(raw_ids, encoder.id_type, "r"))
        if encoder.knows_bytes:
            counts = np.memmap(raw_bytes, np.uint32, "r")
            _save(bytes_file, counts.astype(np.min_scalar_type(counts.max())))
        else:
            bytes_file.touch()


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy would add an ending
        np.save(file, array)
