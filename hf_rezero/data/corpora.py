"""Byte corpora, and the windows of them that a language model reads.

The id of a byte is its value, so a corpus needs no vocabulary and no tokenizing: it is a memory-mapped `uint8` array,
and a batch is one gather from it followed by one widening to `int64`. Quality is measured in bits per byte,

    bpb = sum of -ln p(byte) over the predicted bytes / ln 2 / number of predicted bytes,

which is exact only if every byte is predicted once; `evaluation_windows` sees to that.
"""

import bz2
import gzip
import hashlib
import http.client
import lzma
import math
import mmap
import os
import platform
import shutil
import sysconfig
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset


__all__ = ["ByteDataset", "Corpus", "collate_bytes", "evaluation_windows", "load_corpus"]

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"  # of the 100,000,000 bytes inside the zip

_CHUNK = 1 << 20
_TABLE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_STDLIB_SUFFIXES = {".py", ".txt", ".rst", ".md", ".html"}
# Before 3.12 the tests of some packages lived next to them: leaving all tests out keeps Python versions alike.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three parts: read-only `uint8` arrays of shape `[n_bytes]`, mapped from disk rather than loaded."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load_corpus(
    name_or_path: str | os.PathLike,
    *,
    split: Sequence[float] = (0.9, 0.05, 0.05),
    cache_dir: str | os.PathLike | None = None,
    config_name: str | None = None,
    text_column: str = "text",
    expected_md5: str | None = None,
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
      the UTF-8 bytes of the rows of `text_column`, joined by one newline. A directory of `.txt` files is not
      byte-exact this way (`datasets` drops carriage returns): concatenate them into one file instead.

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

    Raises:
        ValueError: no such file or data set, an empty or corrupt file, an md5 or a split that is wrong.
        ConnectionError: the download failed.

    Example:
        >>> corpus = load_corpus("python-stdlib")
        >>> len(corpus.train) > 10 * len(corpus.test)
        True
    """
    fractions = _exact_fractions(split)
    cache = Path(cache_dir).expanduser() if cache_dir else _default_cache()
    name = os.fspath(name_or_path)
    source = _local_source(name, cache)
    if source is not None and source.is_file() and source.suffix not in _TABLE_READERS:
        parts = {"train": _map(_decompressed(source, cache))}
    else:
        parts = _table_parts(
            source or name, cache, config_name, text_column, cache / "datasets" if cache_dir else None
        )
    if not parts["train"].size:
        raise ValueError(f"the corpus {name!r} is empty: at least one byte of training text is needed")

    if expected_md5 is None and source is not None and source.name in {"enwik8", *(f"enwik8{s}" for s in _OPENERS)}:
        expected_md5 = ENWIK8_MD5
    if expected_md5 is not None:
        _check_md5(source or name, parts, expected_md5)
    return _cut(name, parts, fractions)


class ByteDataset(Dataset):
    """Windows of `block_size` consecutive bytes for a causal language model, as `{"input_ids", "labels"}`, int64.

    Training (`stride=None`): with B = `block_size` and n bytes, window i of epoch e is
    `data[p_e + i B : p_e + (i + 1) B]`, where

        p_e = floor(frac(0.618... e) min(B, n - B len + 1)),    len = max(1, floor((n - B + 1) / B)).

    The length is the same in every epoch, as samplers expect, and the cuts fall elsewhere in each, so that every byte
    is predicted in most epochs, with changing context. Labels and inputs are the same tensor.

    Evaluation (`stride=s`): windows start at 0, s, 2 s, ..., the last one ends with the data. Labels are -100 where an
    earlier window has predicted the byte, and on the very first byte. As the model predicts label j from the inputs
    before j, each byte but the first is then predicted exactly once, after at least B - s bytes (fewer only within the
    first window). Windows are all `block_size` long; data shorter than that is one short window.

    Batches are gathered in one step (`__getitems__`), so give the DataLoader `collate_fn=collate_bytes`. Worker
    processes map the file again instead of receiving its bytes.

    Args:
        data: `uint8` array of shape `[n_bytes]`, usually a part of a `Corpus`, or bytes.
        block_size: bytes per window.
        stride: None for training, else bytes from one evaluation window to the next, 1 ... `block_size` - 1.

    Raises:
        ValueError: data that is not bytes or too short, or a `block_size` or `stride` out of range.

    Example:
        >>> dataset = ByteDataset(b"hello world", block_size=4)
        >>> len(dataset), bytes(dataset[1]["input_ids"].tolist())
        (2, b'o wo')
    """

    def __init__(self, data: np.ndarray | bytes, block_size: int, stride: int | None = None):
        data = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
        _check_window_sizes(data, block_size, stride)
        self.data, self.block_size, self.stride = data, block_size, stride
        self._phase = 0
        self._map_windows()

    def _map_windows(self) -> None:
        width = min(self.block_size, len(self.data))
        self._windows = sliding_window_view(np.asarray(self.data), width)  # [n - width + 1, width]

    def set_epoch(self, epoch: int) -> None:
        """Moves the cuts between training windows to those of epoch 0, 1, ...; evaluation windows never move.

        Call it before the epoch's iterator is made. Loaders prepared by accelerate do so in a single process only;
        with more, call it yourself on every rank. Workers that outlive an epoch (`persistent_workers=True`) hold a
        copy that keeps the phase it was born with.
        """
        if self.stride is None:
            slack = len(self.data) - len(self) * self.block_size
            self._phase = int(epoch * _GOLDEN_RATIO % 1 * min(self.block_size, slack + 1))

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
        return [{"input_ids": inputs, "labels": labels}]

    def __getstate__(self) -> dict:
        state = {key: value for key, value in self.__dict__.items() if key != "_windows"}
        return {**state, "data": _file_range(self.data) or self.data}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if isinstance(self.data, tuple):
            path, offset, size = self.data
            self.data = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(size,))
        self._map_windows()


def evaluation_windows(data: np.ndarray | bytes, block_size: int, stride: int | None = None) -> ByteDataset:
    """Windows that predict every byte of `data` but the first exactly once: `ByteDataset` with a stride.

    `stride=None` means `block_size // 2`: each byte is predicted from at least half a window of context, at twice the
    cost of `stride=block_size - 1`, the cheapest that covers every byte. Report block size and stride with any number.

    Raises:
        ValueError: as `ByteDataset`.

    Example:
        >>> windows = evaluation_windows(b"hello world", block_size=4)
        >>> sum(int((window["labels"] != -100).sum()) for window in windows)
        10
    """
    return ByteDataset(data, block_size, max(1, block_size // 2) if stride is None else stride)


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
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"data is {data.dtype} of shape {data.shape}: a one-dimensional uint8 array is needed")
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


def _file_range(data: np.ndarray) -> tuple[str, int, int] | None:
    """(file, offset, size) of bytes mapped from a file; None for bytes in memory, which pickle by value."""
    base = data
    while isinstance(base, np.ndarray):
        base = base.base
    if not (isinstance(data, np.memmap) and isinstance(base, mmap.mmap) and data.flags.c_contiguous and data.filename):
        return None
    # `offset` of a slice is still that of the array it was cut from, hence the addresses. Maps start on a page.
    map_start = data.offset - data.offset % mmap.ALLOCATIONGRANULARITY
    address = np.frombuffer(base, dtype=np.uint8).ctypes.data
    return str(data.filename), map_start + data.ctypes.data - address, len(data)


def _exact_fractions(split: Sequence[float]) -> dict[str, Fraction]:
    # 0.7 + 0.2 < 0.9 in floating point, which would move a cut by one byte.
    fractions = [Fraction(part).limit_denominator(10**6) for part in split]
    if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) != 1:
        raise ValueError(
            f"split is {tuple(split)}: three fractions of train, validation, test that sum to 1 are needed"
        )
    return dict(zip(("train", "validation", "test"), fractions, strict=True))


def _cut(name: str, parts: dict[str, np.ndarray], fractions: dict[str, Fraction]) -> Corpus:
    train = parts["train"]
    missing = [part for part in ("validation", "test") if part not in parts]
    share = 1 - sum(fractions[part] for part in missing)
    start = math.floor(len(train) * share)
    parts = {**parts, "train": train[:start]}
    for part in missing:
        share += fractions[part]
        stop = math.floor(len(train) * share)
        parts[part] = train[start:stop]
        start = stop
    return Corpus(name, parts["train"], parts["validation"], parts["test"])


def _default_cache() -> Path:
    if "HF_REZERO_CACHE" in os.environ:
        return Path(os.environ["HF_REZERO_CACHE"]).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", home)).expanduser() / "hf_rezero"


def _local_source(name: str, cache: Path) -> Path | None:
    """The file or directory that `name` stands for, fetched or built if need be; None for the name of a data set."""
    if name == "python-stdlib":
        return _stdlib_file(cache)
    if name == "enwik8":
        return _enwik8_file(cache)
    if name.startswith(("http://", "https://")):
        return _download(name, cache, "fetch it by hand and give the path of the file")
    path = Path(name).expanduser()
    if path.exists():
        return path
    known_suffix = path.suffix in {*_OPENERS, *_TABLE_READERS, ".txt", ".bin"}
    if known_suffix or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no file {name!r}: give an existing file, a URL or the name of a data set")
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
    target = cache / f"python-stdlib-{platform.python_version()}-{_key(*ordered)}"
    if not target.is_file():
        with _moved_into_place(target) as out:
            for relative, _ in ordered:
                out.write(_text_or_nothing((root / relative).read_bytes()))
    return target


def _text_or_nothing(content: bytes) -> bytes:
    try:
        content.decode()
    except UnicodeDecodeError:
        return b""
    return b"" if 0 in content else content


def _enwik8_file(cache: Path) -> Path:
    for candidate in (Path("enwik8"), Path("enwik8.zip"), cache / "enwik8", cache / "enwik8.zip"):
        if candidate.is_file():
            return candidate
    return _download(ENWIK8_URL, cache, f"put enwik8 or enwik8.zip into {cache} by hand")


def _download(url: str, cache: Path, remedy: str) -> Path:
    target = cache / f"download-{_key(url)}" / (PurePosixPath(urlsplit(url).path).name or "corpus")
    if target.is_file():
        return target
    request = urllib.request.Request(url, headers={"User-Agent": "hf_rezero"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer, _moved_into_place(target) as out:
            shutil.copyfileobj(answer, out, _CHUNK)
            announced = answer.headers["Content-Length"]
            if announced is not None and out.tell() != int(announced):
                raise OSError(f"{out.tell()} of {announced} bytes arrived")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({error}): {remedy}") from error
    return target


@contextmanager
def _zip_member(path: Path):
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f"{path} holds {len(members)} files, one is needed: unpack it and give the file you want")
        with archive.open(members[0]) as source:
            yield source


_OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zip": _zip_member}


def _decompressed(path: Path, cache: Path) -> Path:
    if path.suffix in {".zst", ".lz4", ".7z", ".rar", ".tar", ".tgz"}:
        raise ValueError(
            f"{path} is an archive of a kind not read here: unpack it, or use one of {', '.join(_OPENERS)}"
        )
    if path.suffix not in _OPENERS:
        return path
    stat = path.stat()
    target = cache / f"{path.stem}-{_key(path.resolve(), stat.st_size, stat.st_mtime_ns)}"
    if target.is_file():
        return target
    try:
        with _OPENERS[path.suffix](path) as source, _moved_into_place(target) as out:
            shutil.copyfileobj(source, out, _CHUNK)
    except (EOFError, OSError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        if getattr(error, "errno", None) is not None:  # a full disk or the like, not the file's fault
            raise
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and fetch it again") from error
    return target


def _table_parts(
    source: str | Path, cache: Path, config_name: str | None, text_column: str, datasets_cache: Path | None
) -> dict[str, np.ndarray]:
    import datasets

    options = {"cache_dir": datasets_cache and str(datasets_cache)}
    try:
        if isinstance(source, Path) and source.is_file():
            tables = datasets.load_dataset(_TABLE_READERS[source.suffix], data_files=str(source), **options)
        else:
            tables = datasets.load_dataset(str(source), config_name, **options)
    except Exception as error:
        raise ValueError(f"{str(source)!r} is neither bytes nor a data set that can be loaded: {error}") from error
    if "train" not in tables:
        raise ValueError(f"{str(source)!r} has the splits {', '.join(tables)}: one called train is needed")

    parts = {}
    for part in {"train", "validation", "test"} & set(tables):
        target = cache / f"dataset-{_key(source, config_name, part, text_column, tables[part]._fingerprint)}"
        if not target.is_file():
            _write_column(tables[part], text_column, target)
        parts[part] = _map(target)
    return parts


def _write_column(table, column: str, target: Path) -> None:
    if getattr(table.features.get(column), "dtype", None) not in {"string", "large_string"}:
        raise ValueError(f"text_column {column!r} is not a column of text: the columns are {dict(table.features)}")
    with _moved_into_place(target) as out:
        separator = b""
        for rows in table.select_columns(column).iter(batch_size=1000):
            out.write(separator + b"\n".join((text or "").encode() for text in rows[column]))
            separator = b"\n"


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


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(tuple(map(str, parts))).encode()).hexdigest()[:16]


@contextmanager
def _moved_into_place(target: Path):
    """A file to write that becomes `target` only once complete, also when several processes write it at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as out:
            yield out
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
