"""Pictures of an .npz file with train_x, train_y, test_x, test_y (uint8, NHWC)."""

import os
from collections.abc import Iterator
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn


NAMES = ("train_x", "train_y", "test_x", "test_y")
HELP = ".npz with train_x, train_y, test_x, test_y (uint8, NHWC)"
BATCH = 128  # of ResNets


def read_images(path: str | os.PathLike, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The arrays of the file as they are."""
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in names}


def floats(pixels: Tensor) -> Tensor:
    """Pixels from -2 to 2, channels first; in memory they are still last."""
    return ((pixels.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)


def shifted(x: Tensor, rows: Tensor, columns: Tensor, margin: int) -> Tensor:
    """Each picture in a frame of zeros, cut out at its own row and column, from 0 to twice the margin."""
    line = torch.arange(x.shape[-1])
    i, j = (rows[:, None] + line)[:, None, :, None], (columns[:, None] + line)[:, None, None, :]
    padded = nn.functional.pad(x, (margin,) * 4)
    return padded[torch.arange(len(x))[:, None, None, None], torch.arange(3)[:, None, None], i, j]


def endless_rows(length: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of full batches without end, in a new order for each pass."""
    size = min(batch_size, length)
    while True:
        order = rng.permutation(length)
        yield from (order[i : i + size] for i in range(0, length - size + 1, size))


# --- what the ResNets share


def standardized(path: str | os.PathLike, count: int | None) -> dict[str, Tensor]:
    """Pictures of 16 x 16 with mean 0 and deviation 1 by channel of the training part, and their classes."""
    data = {name: values[:count] for name, values in read_images(path).items()}
    pictures = {
        name: nn.functional.adaptive_avg_pool2d(data[name].permute(0, 3, 1, 2) / 255, 16)
        for name in ("train_x", "test_x")
    }
    center, spread = (f(pictures["train_x"], dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return data | {name: (x - center) / spread for name, x in pictures.items()}


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each picture or not, and shift it by up to 2 pixels, 0 beyond the border."""
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    rows, columns = (torch.randint(5, (len(x),), generator=generator) for _ in range(2))
    return shifted(x, rows, columns, 2)


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, Tensor]) -> float:
    """Per cent of the test pictures."""
    model.eval()
    pairs = zip(data["test_x"].split(256), data["test_y"].split(256), strict=True)
    return 100 * float(sum((model(x).logits.argmax(1) == y).sum() for x, y in pairs)) / len(data["test_y"])


def final_error(accuracies: list[float]) -> float:
    """Mean error of the last two epochs, per cent."""
    return 100 - mean(accuracies[-2:])
