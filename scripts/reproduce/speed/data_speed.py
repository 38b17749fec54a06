"""Measures how fast one core turns a file of bytes into int64 training batches.

Three paths over the same text, all through `torch.utils.data.DataLoader` with a random sampler, in interleaved rounds:

- `gathered`: `hf_rezero.data.ByteDataset`, a batch in one gather and one widening;
- `per item`: the usual map-style dataset over a memory map, a slice and a tensor per window;
- `tokenizer`: `byte_tokenizer` on the text of a window, whose ids are the same.

The last two read a part of the file, as they are slower. The unit is 10^6 bytes of text per second; the figure is the
median of the rounds, each one pass in a new random order. A first pass, not counted, brings the file into the page
cache.

    python scripts/reproduce/run.py data_speed --output scripts/reproduce/results/data_speed.json
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from common.record import save
from hf_rezero.data.corpora import load_corpus
from hf_rezero.data.tokenizer import byte_tokenizer
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


def megabytes_per_second(dataset: Dataset, collate, batch_size: int) -> float:
    loader = DataLoader(dataset, batch_size=batch_size, sampler=RandomSampler(dataset), collate_fn=collate)
    start = time.perf_counter()
    windows = sum(len(batch["input_ids"]) for batch in loader)
    return windows * dataset.block_size / (time.perf_counter() - start) / 1e6


def measure(data: np.ndarray, args: argparse.Namespace) -> dict[str, list[float]]:
    small = TokenizerDataset(data[: args.tokenizer_bytes], args.block_size)
    paths = {
        "gathered": (ByteDataset(data, args.block_size), collate_bytes),
        "per item": (PerItemDataset(data[: args.per_item_bytes], args.block_size), collate_bytes),
        "tokenizer": (small, small.collate),
    }
    speeds = {name: [] for name in paths}
    for round_ in range(args.rounds + 1):
        for name, (dataset, collate) in paths.items():
            speed = megabytes_per_second(dataset, collate, args.batch_size)
            if round_ > 0:
                speeds[name].append(speed)
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
    parser.add_argument("--output", type=Path, help="JSON file for the figures; by default they are only printed")
    return parser.parse_args()


def table(results: dict) -> list[list[str]]:
    """One row for each path."""
    rows = [["from file to int64 batches of 64 x 512, one core", "MB/s, median"]]
    return [*rows, *([path, f"{speed:.1f}"] for path, speed in results["median"].items())]


def main() -> None:
    """Measure, print, and write the result file."""
    args = parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for every path
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or stdlib_text(Path(folder, "text"), args.size)
        data = load_corpus(path, split=(1, 0, 0)).train
        speeds = measure(data, args)
        size = len(data)

    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:10} {medians[name]:8.1f} MB/s   (rounds: {min(values):.1f} ... {max(values):.1f})")
    if args.output:
        result = {
            "unit": "10^6 bytes of text per second, one core, median of the rounds",
            "bytes": size,
            "block_size": args.block_size,
            "batch_size": args.batch_size,
            "median": medians,
            "rounds": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
        }
        save(args.output, result)
