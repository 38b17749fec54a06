"""Measures how fast one core turns a file of bytes, or of token ids, into int64 training batches, and a text into ids.

Four paths from a file to batches, all through `torch.utils.data.DataLoader` with a random sampler, in interleaved rounds:

- `gathered`: `hf_rezero.data.ByteDataset`, a batch in one gather and one widening;
- `per item`: the usual map-style dataset over a memory map, a slice and a tensor per window;
- `tokenizer`: `byte_tokenizer` on the text of a window, whose ids are the same;
- `token ids gathered`: `ByteDataset` over the ids that `load_tokens` keeps, repeated to as many bytes.

Two paths from a text to the ids of a BPE that was trained on its beginning:

- `tokenizers alone`: the `tokenizers` library on the pieces that `load_tokens` cuts, whose ids are thrown away;
- `load_tokens`: which also counts the bytes behind each id and writes both to a new cache.

The slower paths read a part of the file. The unit is 10^6 bytes per second, of ids as they are stored where windows of ids
are gathered, and of text elsewhere; the figure is the
median of the rounds, each one pass in a new random order. A first pass, not counted, brings the file into the page
cache.

    python scripts/reproduce/run.py data_speed --output scripts/reproduce/results/data_speed.json
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from common.record import save
from hf_rezero.data.bpe import train_bpe
from hf_rezero.data.corpora import load_corpus
from hf_rezero.data.documents import decode, pieces
from hf_rezero.data.tokenizer import byte_tokenizer
from hf_rezero.data.tokens import PIECES_OF_A_TASK, Encoder, load_tokens
from hf_rezero.data.windows import ByteDataset, collate_bytes


class PerItemDataset(Dataset):
    """The plain way: window i is `data[i B : (i + 1) B]`, widened on its own."""

    def __init__(self, data: np.ndarray, block_size: int):
        self.data, self.block_size = data, block_size

    def __len__(self) -> int:
        return len(self.data) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.data[index * self.block_size : (index + 1) * self.block_size]
        inputs = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": inputs, "labels": inputs}


class TokenizerDataset(PerItemDataset):
    """The same windows as text through the tokenizer; characters cut by a window's edge are lost."""

    def __init__(self, data: np.ndarray, block_size: int):
        super().__init__(data, block_size)
        self.tokenizer = byte_tokenizer()

    def __getitems__(self, indices: list[int]) -> list[str]:
        windows = (self.data[i * self.block_size : (i + 1) * self.block_size] for i in indices)
        return [window.tobytes().decode(errors="ignore") for window in windows]

    def collate(self, texts: list[str]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer(texts, split_special_tokens=True, padding=True, return_tensors="pt")
        return {"input_ids": batch.input_ids, "labels": batch.input_ids}


def batches(dataset: Dataset, collate: Callable, batch_size: int) -> int:
    """Read a pass in random order, and return the bytes that were read."""
    loader = DataLoader(dataset, batch_size=batch_size, sampler=RandomSampler(dataset), collate_fn=collate)
    windows = sum(len(batch["input_ids"]) for batch in loader)
    return windows * dataset.block_size * dataset.data.itemsize


def tokenizers_alone(encoder: Encoder, text: np.ndarray) -> int:
    """Tokenize a text by the `tokenizers` library alone, and return its bytes."""
    cut = pieces(text, None)
    while some := list(islice(cut, PIECES_OF_A_TASK)):
        encoder.backend.encode_batch([decode(text, piece) for piece in some], add_special_tokens=False)
    return len(text)


def ours(tokenizer, text: np.ndarray, cache: Path, calls: count) -> int:
    """Tokenize a text into a cache of its own, and return its bytes."""
    load_tokens(text, tokenizer, cache_dir=cache / f"pass-{next(calls)}")
    return len(text)


def repeated(ids: np.ndarray, size: int, path: Path) -> np.ndarray:
    """Memory-mapped ids, over and over, of `size` bytes."""
    np.save(path, np.resize(ids, size // ids.itemsize))
    return np.load(path, mmap_mode="r")


def paths(data: np.ndarray, folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """What is timed, by name; each returns the bytes that it read."""
    small = TokenizerDataset(data[: args.tokenizer_bytes], args.block_size)
    text = data[: args.token_bytes]
    bpe = train_bpe(text[: args.bpe_bytes], args.vocab_size)
    ids = repeated(load_tokens(text, bpe, cache_dir=folder).ids, len(data), folder / "ids.npy")
    read = partial(batches, batch_size=args.batch_size)
    return {
        "gathered": partial(read, ByteDataset(data, args.block_size), collate_bytes),
        "per item": partial(read, PerItemDataset(data[: args.per_item_bytes], args.block_size), collate_bytes),
        "tokenizer": partial(read, small, small.collate),
        "token ids gathered": partial(read, ByteDataset(ids, args.block_size), collate_bytes),
        "tokenizers alone": partial(tokenizers_alone, Encoder(bpe), text),
        "load_tokens": partial(ours, bpe, text, folder, count()),
    }


def measure(timed: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """The speeds of each path in 10^6 bytes per second, in interleaved rounds; the first is not counted."""
    speeds = {name: [] for name in timed}
    for round_ in range(rounds + 1):
        for name, read in timed.items():
            start = time.perf_counter()
            size = read()
            if round_ > 0:
                speeds[name].append(size / (time.perf_counter() - start) / 1e6)
    return speeds


def stdlib_text(path: Path, size: int) -> Path:
    """Fills `path` with `size` bytes of text: the Python standard library, over and over."""
    text = load_corpus("python-stdlib", split=(1, 0, 0)).train
    with path.open("wb") as out:
        for start in range(0, size, len(text)):
            out.write(text[: size - start])
    return path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="raw or compressed file to read; by default a text is made")
    parser.add_argument("--size", type=int, default=100_000_000, help="bytes of the text made (default: 10^8)")
    parser.add_argument("--block_size", type=int, default=512, help="bytes per window (default: 512)")
    parser.add_argument("--batch_size", type=int, default=64, help="windows per batch (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, help="counted passes of each path (default: 7)")
    parser.add_argument("--per_item_bytes", type=int, default=20_000_000, help="read per item (default: 2 x 10^7)")
    parser.add_argument("--tokenizer_bytes", type=int, default=1_000_000, help="tokenized (default: 10^6)")
    parser.add_argument("--token_bytes", type=int, default=5_000_000, help="tokenized by a BPE (default: 5 x 10^6)")
    parser.add_argument("--bpe_bytes", type=int, default=1_000_000, help="that the BPE is trained on (default: 10^6)")
    parser.add_argument("--vocab_size", type=int, default=8192, help="of the BPE (default: 8192)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures; by default they are only printed")
    return parser.parse_args()


# of the paths on tokens, which older result files do not have
IN_WORDS = {
    "token ids gathered": "token ids gathered, MB of ids",
    "tokenizers alone": "from text to token ids: `tokenizers` alone",
    "load_tokens": "from text to token ids: `load_tokens`, with the bytes behind each, to disk",
}


def table(results: dict) -> list[list[str]]:
    """One row for each path."""
    rows = [["from file to int64 batches of 64 x 512, one core", "MB/s, median"]]
    return [*rows, *([IN_WORDS.get(path, path), f"{speed:.1f}"] for path, speed in results["median"].items())]


def main() -> None:
    """Measure, print, and write the result file."""
    args = parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for every path
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or stdlib_text(Path(folder, "text"), args.size)
        data = load_corpus(path, split=(1, 0, 0)).train
        speeds = measure(paths(data, Path(folder), args), args.rounds)
        size = len(data)

    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:18} {medians[name]:8.1f} MB/s   (rounds: {min(values):.1f} ... {max(values):.1f})")
    if args.output:
        result = {
            "unit": "10^6 bytes per second, of ids as stored where they are gathered, else of text; one core, median",
            "bytes": size,
            "block_size": args.block_size,
            "batch_size": args.batch_size,
            "token_bytes": args.token_bytes,
            "vocab_size": args.vocab_size,
            "median": medians,
            "rounds": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
        }
        save(args.output, result)
