"""Byte corpora, and the windows of them that a language model reads.

The id of a byte is its value, so a corpus needs no vocabulary and no tokenizing: it is a memory-mapped `uint8` array,
and a batch is one gather from it followed by one widening to `int64`. Quality is measured in bits per byte,

    bpb = sum of -ln p(byte) over the predicted bytes / ln 2 / number of predicted bytes,

which is exact only if every byte is predicted once; `evaluation_windows` sees to that.
"""

import hashlib
import math
import mmap
import os
import platform
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import written_whole
from .addresses import is_address, shown
from .download import MAX_CORPUS_BYTES, OPENERS, cache_key, decompressed, default_cache, download
from .tables import load_table


ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"  # of the 100,000,000 bytes inside the zip

_TABLE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_STDLIB_SUFFIXES = {".py", ".txt", ".rst", ".md", ".html"}
# Before 3.12 the tests of some packages lived next to them: leaving all tests out keeps Python versions alike.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three parts: read-only `uint8` arrays of shape `[n_bytes]`, mapped from disk rather than loaded.

    Attributes:
        ends: For each part of rows, the positions of the newlines between them, int64 [n_rows]; the last row of a part
            may have none. A part of a plain file is not in it.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    ends: Mapping[str, np.ndarray] = field(default_factory=dict)


def load_corpus(
    name_or_path: str | os.PathLike,
    *,
    split: Sequence[float] = (0.9, 0.05, 0.05),
    cache_dir: str | os.PathLike | None = None,
    config_name: str | None = None,
    text_column: str = "text",
    expected_md5: str | None = None,
    max_bytes: int = MAX_CORPUS_BYTES,
) -> Corpus:
    """Opens a corpus as memory-mapped train, validation and test bytes.

    `name_or_path` is, in this order,

    - `"python-stdlib"`: the sources and documentation installed with this Python (about 12 MB), files in the order of
      their path, tests left out, no separator between them. Nothing is downloaded. In this order files of one package,
      which may be near copies (`encodings/cp*.py`), stay in one part; the last two parts are about equally hard.
    - `"enwik8"`: the first 10^8 bytes of the English Wikipedia of 2006, from a file `enwik8` or `enwik8.zip` in the
      working directory or in `cache_dir`, else downloaded from its author. Its md5 is always checked, also when you
      give the path of a file of that name.
    - a file: its bytes as they are, mapped in place. `.xz .gz .bz2 .zip` are decompressed once into `cache_dir`.
    - an http(s) URL of such a file, downloaded once into `cache_dir`.
    - a `.jsonl .json .csv .parquet` file, a directory, or the name of a Hub data set, read by `datasets.load_dataset`:
      the UTF-8 bytes of the rows of `text_column`, joined by one newline. Each file of a directory of `.txt` files is
      one row; it is not byte-exact this way (`datasets` drops carriage returns): concatenate them into one file instead.

    A corpus of n bytes is cut in order, without shuffling, at floor(n s_0) and floor(n (s_0 + s_1)) for
    `split` = (s_0, s_1, s_2); n = 10^8 gives the usual 90 / 5 / 5 million bytes of enwik8. Validation and test splits
    that a data set already has are kept, and only the missing ones are cut from the end of its train split.

    Args:
        name_or_path: what to read; a local file called `enwik8` or `python-stdlib` needs a leading `./`.
        split: fractions of train, validation and test; they sum to 1.
        cache_dir: where built, downloaded and decompressed files go; by default the environment's `HF_REZERO_CACHE`,
            else `hf_rezero` in the Hugging Face home.
        config_name: configuration of a Hub data set.
        text_column: the column of a data set that holds the text.
        expected_md5: md5 of all bytes (train, validation and test in this order) that the corpus must have.
        max_bytes: where a download or an archive stops; a plain file, which is mapped, may have any size, and the
            rows of a data set too.

    Raises:
        ValueError: no such file or data set, an empty, corrupt or too large file, an md5 or a split that is wrong.
        ConnectionError: the download failed.

    Example:
        >>> corpus = load_corpus("python-stdlib")
        >>> len(corpus.train) > 10 * len(corpus.test)
        True
    """
    fractions = _exact_fractions(split)
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
    name = os.fspath(name_or_path)
    source = _local_source(name, cache, max_bytes)
    name = shown(name)
    if source is not None and source.is_file() and source.suffix not in _TABLE_READERS:
        parts, ends = {"train": _map(decompressed(source, cache, max_bytes))}, {}
    else:
        parts, ends = _table_parts(
            source or name, cache, config_name, text_column, cache / "datasets" if cache_dir else None
        )
    if not parts["train"].size:
        raise ValueError(f"the corpus {name!r} is empty: at least one byte of training text is needed")

    if expected_md5 is None and source is not None and source.name in {"enwik8", *(f"enwik8{s}" for s in OPENERS)}:
        expected_md5 = ENWIK8_MD5
    if expected_md5 is not None:
        _check_md5(source or name, parts, expected_md5)
    return _cut(name, parts, ends, fractions)


class FileRange(NamedTuple):
    """A part of a file that arrays are mapped from."""

    path: str
    offset: int
    size: int
    dtype: str

    def map(self) -> np.ndarray:
        """The array, read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.size,))


def file_range(data: np.ndarray) -> FileRange | None:
    """Where an array is mapped from; None for an array in memory, which pickles by value."""
    base = data
    while isinstance(base, np.ndarray):
        base = base.base
    if not (isinstance(data, np.memmap) and isinstance(base, mmap.mmap) and data.flags.c_contiguous and data.filename):
        return None
    # `offset` of a slice is still that of the array it was cut from, hence the addresses. Maps start on a page.
    map_start = data.offset - data.offset % mmap.ALLOCATIONGRANULARITY
    address = np.frombuffer(base, dtype=np.uint8).ctypes.data
    return FileRange(str(data.filename), map_start + data.ctypes.data - address, len(data), data.dtype.str)


def as_range(data: np.ndarray) -> FileRange | np.ndarray:
    """What to pickle in place of an array."""
    return file_range(data) or data


def from_range(data: FileRange | np.ndarray) -> np.ndarray:
    """The array that `as_range` stood for."""
    return data.map() if isinstance(data, FileRange) else data


def _exact_fractions(split: Sequence[float]) -> dict[str, Fraction]:
    # 0.7 + 0.2 < 0.9 in floating point, which would move a cut by one byte.
    try:
        fractions = [Fraction(part).limit_denominator(10**6) for part in split]
    except (TypeError, ValueError, ArithmeticError):
        fractions = []
    if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) != 1:
        raise ValueError(
            f"split is {split!r:.80}: three fractions of train, validation, test that sum to 1 are needed"
        )
    return dict(zip(("train", "validation", "test"), fractions, strict=True))


def _cut(
    name: str, parts: dict[str, np.ndarray], ends: dict[str, np.ndarray], fractions: dict[str, Fraction]
) -> Corpus:
    train, train_ends = parts["train"], ends.get("train")
    missing = [part for part in ("validation", "test") if part not in parts]
    share = 1 - sum(fractions[part] for part in missing)
    start = 0
    for part in ["train", *missing]:
        share += fractions[part] if part != "train" else 0
        stop = math.floor(len(train) * share)
        parts[part] = train[start:stop]
        if train_ends is not None:
            ends[part] = train_ends[(train_ends >= start) & (train_ends < stop)] - start
        start = stop
    return Corpus(name, parts["train"], parts["validation"], parts["test"], ends)


def _local_source(name: str, cache: Path, max_bytes: int) -> Path | None:
    """The file or directory that `name` stands for, fetched or built if need be; None for the name of a data set."""
    if name == "python-stdlib":
        return _stdlib_file(cache)
    if name == "enwik8":
        return _enwik8_file(cache, max_bytes)
    if is_address(name):
        return download(name, cache, "fetch it by hand and give the path of the file", max_bytes)
    path = Path(name).expanduser()
    if path.exists():
        return path
    known_suffix = path.suffix in {*OPENERS, *_TABLE_READERS, ".txt", ".bin"}
    if known_suffix or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no file {shown(name)!r}: give an existing file, a URL or the name of a data set")
    return None


def _stdlib_file(cache: Path) -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    sizes = {}
    for folder, folders, files in os.walk(root):
        # config-* and _sysconfigdata* describe the machine that built this Python.
        folders[:] = [f for f in folders if f not in _STDLIB_SKIPPED and not f.startswith("config-")]
        paths = [Path(folder, f) for f in files if not f.startswith("_sysconfigdata")]
        sizes |= {p.relative_to(root).as_posix(): p.stat().st_size for p in paths if p.suffix in _STDLIB_SUFFIXES}
    ordered = sorted(sizes.items())
    target = cache / f"python-stdlib-{platform.python_version()}-{cache_key(*ordered)}"
    if not target.is_file():
        with written_whole(target) as path, path.open("xb") as out:
            for relative, _ in ordered:
                out.write(_text_or_nothing((root / relative).read_bytes()))
    return target


def _text_or_nothing(content: bytes) -> bytes:
    try:
        content.decode()
    except UnicodeDecodeError:
        return b""
    return b"" if 0 in content else content


def _enwik8_file(cache: Path, max_bytes: int) -> Path:
    for candidate in (Path("enwik8"), Path("enwik8.zip"), cache / "enwik8", cache / "enwik8.zip"):
        if candidate.is_file():
            return candidate
    return download(ENWIK8_URL, cache, f"put enwik8 or enwik8.zip into {cache} by hand", max_bytes)


def reader_of(path: str | os.PathLike) -> str | None:
    """The reader of `datasets` for a file of rows, None for other files.

    Example:
        >>> reader_of("rows.jsonl"), reader_of("text.txt")
        ('json', None)
    """
    return _TABLE_READERS.get(Path(path).suffix)


def _table_parts(
    source: str | Path, cache: Path, config_name: str | None, text_column: str, datasets_cache: Path | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    options: dict[str, Any] = {"cache_dir": datasets_cache and str(datasets_cache)}
    if isinstance(source, Path) and source.is_file():
        tables = load_table(_TABLE_READERS[source.suffix], data_files={"train": str(source)}, **options)
    elif isinstance(source, Path) and _holds_texts(source):
        tables = load_table("text", data_dir=str(source), sample_by="document", **options)
    else:
        tables = load_table(str(source), config_name, **options)
    if "train" not in tables:
        raise ValueError(f"{str(source)!r} has the splits {', '.join(tables)}: one called train is needed")

    parts, ends = {}, {}
    for part in {"train", "validation", "test"} & set(tables):
        target = cache / f"dataset-{cache_key(source, config_name, part, text_column, tables[part]._fingerprint)}"
        ends_file = target.with_name(f"ends-of-{target.name}")
        if not (target.is_file() and ends_file.is_file()):
            _write_column(tables[part], text_column, target, ends_file)
        parts[part] = _map(target)
        ends[part] = np.fromfile(ends_file, np.int64)[:-1]  # none behind the last row
    return parts, ends


def _holds_texts(folder: Path) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return bool(files) and all(path.suffix == ".txt" for path in files)


def _write_column(table, column: str, target: Path, ends_file: Path) -> None:
    if getattr(table.features.get(column), "dtype", None) not in {"string", "large_string"}:
        raise ValueError(f"text_column {column!r} is not a column of text: the columns are {dict(table.features)}")
    with (
        written_whole(ends_file) as ends_path,
        written_whole(target) as path,
        path.open("xb") as out,
        ends_path.open("xb") as ends_out,
    ):
        start = 0
        for rows in table.select_columns(column).iter(batch_size=1000):
            texts = [(text or "").encode() for text in rows[column]]
            newlines = start - 1 + np.cumsum([len(text) + 1 for text in texts])
            out.write((b"\n" if start else b"") + b"\n".join(texts))
            newlines.astype(np.int64).tofile(ends_out)
            start = int(newlines[-1]) + 1


def _check_md5(source: str | Path, parts: dict[str, np.ndarray], expected: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    ordered = [parts[part] for part in ("train", "validation", "test") if part in parts]
    for part in ordered:
        digest.update(part)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{source} holds {sum(map(len, ordered))} bytes with md5 {digest.hexdigest()}, expected md5 {expected}: "
            "delete it and fetch it again, or rename it if it is meant to be another text"
        )


def _map(path: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)
