"""Images for classifiers: files to arrays, and arrays to augmented, normalised batches, without torchvision.

An image is `uint8 [H, W, C]` until its batch is made. A batch is made in one step, so loading costs next to nothing.
"""

import gzip
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import torch
from PIL import Image

from .augmentation import STREAMS, Augmentation, to_floats, uniforms
from .description import DescribedDataset
from .download import DAMAGES, MAX_CORPUS_BYTES, TooLargeError, check_size


Part = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels int64 [N]

_IDX_PREFIXES = {"train": "train", "test": "t10k"}
_MODES = {1: "L", 3: "RGB"}
_CHUNK = 1 << 20


def read_images(path: str | Path, max_bytes: int = MAX_CORPUS_BYTES) -> dict[str, Part]:
    """Read the parts, `train` and `test`, of an `.npz` file or of a folder with MNIST's four IDX files.

    An `.npz` file holds `train_x`, `train_y`, `test_x` and `test_y`, images as `uint8 [N, H, W]` or `[N, H, W, C]`;
    either part may be missing. IDX files are plain or `.gz`. Memory is at most what the arrays need.

    Args:
        path: The file, or the folder.
        max_bytes: What the arrays of an `.npz` file together, or a file of a folder, may need; their headers tell.

    Raises:
        ValueError: The path is neither, a file is damaged or too large, or images and labels do not fit each other.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/two.npz"
        >>> np.savez(path, train_x=np.zeros((2, 8, 8), np.uint8), train_y=[0, 1])
        >>> read_images(path)["train"][0].shape
        (2, 8, 8, 1)
    """
    path = Path(path)
    if path.is_dir():
        parts = _read_idx_folder(path, max_bytes)
    elif path.is_file() and path.suffix == ".npz":
        parts = _read_npz(path, max_bytes)
    else:
        what = "is not an .npz file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: name an .npz file, or a folder with MNIST's IDX files.")
    return {part: _checked(*arrays, f"the {part} part of {path}") for part, arrays in parts.items()}


def _read_idx_folder(folder: Path, max_bytes: int) -> dict[str, Part]:
    parts = {}
    for part, prefix in _IDX_PREFIXES.items():
        files = [sorted(folder.glob(f"{prefix}-{kind}*")) for kind in ("images?idx3", "labels?idx1")]
        if all(files):
            parts[part] = tuple(_read_idx(found[0], max_bytes) for found in files)
    if not parts:
        raise ValueError(
            f"{folder} holds no pair of IDX files such as train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz: "
            f"name the folder that does, or read a folder of image files with --train_dir."
        )
    return parts


def _read_idx(path: Path, max_bytes: int) -> np.ndarray:
    """The array of one file: 0, 0, 8 for uint8, the number of dimensions, their sizes big-endian, the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            dimensions = start[3] if len(start) == 4 else 0
            sizes = file.read(4 * dimensions)
            if start[:3] != b"\0\0\x08" or not dimensions or len(sizes) < 4 * dimensions:
                raise ValueError(
                    f"{path} starts with {start.hex(' ')}: an IDX file of bytes starts with 00 00 08, and its sizes."
                )
            return _values(file, np.frombuffer(sizes, dtype=">u4").tolist(), path, max_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): download it again.") from None


def _values(file: BinaryIO, shape: Sequence[int], path: Path, max_bytes: int) -> np.ndarray:
    """As many bytes as the header promises, into memory that is touched only as far as there are any."""
    promised = math.prod(shape)
    check_size(promised, max_bytes, path)
    values = np.empty(promised, np.uint8)
    view, held = memoryview(values), 0
    while count := file.readinto(view[held : held + _CHUNK]):
        held += count
    if held < promised or file.read(1):
        more = "more" if held == promised else held
        raise ValueError(f"{path} promises {promised} values and holds {more}: download it again.")
    return values.reshape(shape)


def _read_npz(path: Path, max_bytes: int) -> dict[str, Part]:
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if name[-2:] in ("_x", "_y")]
            check_size(sum(_promised(archive, name) for name in names), max_bytes, path)
            arrays = {name: file[name] for name in names}
    except TooLargeError:
        raise
    except (*DAMAGES, ValueError, KeyError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): download it again.") from None
    parts = [part for part in ("train", "validation", "test") if f"{part}_x" in arrays and f"{part}_y" in arrays]
    if not parts:
        names = ", ".join(arrays) or "no such arrays"
        raise ValueError(f"{path} has {names}: train_x and train_y are needed, or test_x and test_y.")
    return {part: (arrays[f"{part}_x"], arrays[f"{part}_y"]) for part in parts}


def _promised(archive: zipfile.ZipFile, name: str) -> int:
    """The bytes of an array by its header, which numpy allocates before it reads."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize


def _checked(images: np.ndarray, labels: np.ndarray, name: str) -> Part:
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in _MODES:
        raise ValueError(
            f"{name} has images of {images.dtype} and shape {images.shape}: "
            f"uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] is needed."
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name} has {len(images)} images, and labels of {labels.dtype} and shape {labels.shape}: "
            f"one whole number for each image is needed."
        )
    return images, labels.astype(np.int64)


# what PIL raises for damaged files, and for those that would fill the memory
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DecodedImages:
    """The column of images of a `datasets` table, decoded and resized when asked for: `uint8 [N, H, W, C]` by rows.

    Args:
        table: A table with a column of the feature `datasets.Image`.
        column: Its name.
        size: Height and width of the result.
        channels: 1 for grey, 3 for colours.

    Raises:
        ValueError: There is no such column, or it holds no images.

    Example:
        >>> table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (40, 30))] * 3})
        >>> table = table.cast_column("image", datasets.Image())
        >>> DecodedImages(table, "image", (8, 8), channels=1)[[0, 2]].shape
        (2, 8, 8, 1)
    """

    def __init__(self, table: datasets.Dataset, column: str, size: tuple[int, int], channels: int):
        if not isinstance(table.features.get(column), datasets.Image):
            images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
            raise ValueError(
                f"column {column!r} holds no images; those that do: {', '.join(images) or 'none'}. "
                f"Name one with --image_column_name."
            )
        self.column = table.select_columns([column])
        self.name, self.size, self.channels = column, size, channels
        self.shape = (len(table), *size, channels)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Sequence[int] | slice) -> np.ndarray:
        height, width = self.size
        try:
            pictures = [image.convert(_MODES[self.channels]) for image in self.column[rows][self.name]]
        except UNREADABLE as error:
            raise ValueError(f"{self._damaged(rows)} cannot be read as an image ({error}): remove it.") from None
        # what PIL does here is what the saved image processor does too
        pixels = [np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in pictures]
        return np.stack(pixels).reshape(-1, height, width, self.channels)

    def _damaged(self, rows: Sequence[int] | slice) -> str:
        """The file, or the row, of the first image that cannot be decoded."""
        undecoded = self.column.cast_column(self.name, datasets.Image(decode=False))
        for row in np.arange(len(self))[rows].tolist():
            try:
                self.column[row][self.name].load()
            except UNREADABLE:
                return undecoded[row][self.name]["path"] or f"row {row}"
        return "one of the rows"


def channel_statistics(
    pixels: np.ndarray | DecodedImages, max_images: int = 100_000
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of values 0 ... 1, over at most `max_images` images.

    Example:
        >>> channel_statistics(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1))
        ([0.5], [0.5])
    """
    rows = np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), max_images)).astype(int))
    counts = np.zeros((pixels.shape[-1], 256))
    for chunk in np.array_split(rows, math.ceil(len(rows) / 1000)):
        for channel, values in enumerate(np.moveaxis(pixels[chunk], -1, 0)):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    share, value = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ value
    variance = share @ value**2 - mean**2
    return mean.tolist(), np.sqrt(variance.clip(min=0)).tolist()


class ImageDataset(DescribedDataset):
    """Normalised images with their labels, as `{"pixel_values": [C, H, W], "labels"}`.

    A batch is made in one step (`__getitems__`), so give the DataLoader `collate_fn=collate_images`. What augmentation
    does to an image depends on `seed`, the epoch and the index of the image alone: a resumed run sees what an
    uninterrupted one does, and so do many processes. `ReZeroTrainer` tells the epoch; in a loop of your own call
    `set_epoch` before each. Workers that outlive an epoch (`persistent_workers=True`) keep the epoch they were born
    with.

    Args:
        pixels: uint8 [N, H, W, C], or `DecodedImages`.
        labels: Whole numbers [N], or None.
        mean: Of each channel, for values 0 ... 1.
        std: Likewise.
        augmentation: For training.
        seed: Of the augmentation.

    Raises:
        ValueError: Numbers that do not fit each other, or a standard deviation of 0.

    Example:
        >>> pixels = np.full((10, 8, 8, 1), 255, np.uint8)
        >>> dataset = ImageDataset(pixels, np.arange(10), mean=[0.5], std=[0.25])
        >>> dataset[3]["pixel_values"].mean().item(), dataset[3]["labels"].item()
        (2.0, 3)
    """

    def __init__(
        self,
        pixels: np.ndarray | DecodedImages,
        labels: np.ndarray | None,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        if labels is not None and len(labels) != len(pixels):
            raise ValueError(f"got {len(pixels)} images with {len(labels)} labels: as many are needed.")
        if {len(mean), len(std)} != {pixels.shape[-1]} or min(std) <= 0:
            raise ValueError(
                f"got mean={list(mean)} and std={list(std)} for images with {pixels.shape[-1]} channels: "
                f"one number for each is needed, and no std of 0."
            )
        self.pixels, self.augmentation, self.seed, self._epoch = pixels, augmentation, seed, 0
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self._mean, self._std = (255 * torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    def set_epoch(self, epoch: int) -> None:
        """Let the augmentation be that of epoch 0, 1, ..."""
        self._epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.__getitems__([range(len(self))[index]])[0]
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        # a list of one batch, not the batch itself: the Trainer's column filter iterates over what it gets here
        rows = np.asarray(indices, dtype=np.int64)
        images = self.pixels[rows]
        if self.augmentation is None:
            pixels = to_floats(images)
        else:
            pixels = self.augmentation(images, uniforms(self.seed, self._epoch, rows, STREAMS))
        batch = {"pixel_values": pixels.sub_(self._mean).div_(self._std)}
        return [batch if self.labels is None else batch | {"labels": self.labels[rows]}]


def collate_images(batch: Mapping | Sequence[Mapping]) -> Mapping[str, torch.Tensor]:
    """The `collate_fn` for `ImageDataset`: of a batch that was made in one step, or of a list of items.

    Example:
        >>> dataset = ImageDataset(np.zeros((3, 8, 8, 1), np.uint8), None, [0.5], [0.5])
        >>> collate_images([dataset[0], dataset[1]])["pixel_values"].shape
        torch.Size([2, 1, 8, 8])
    """
    if isinstance(batch, Mapping):
        return batch
    if len(batch) == 1 and batch[0]["pixel_values"].ndim == 4:
        return batch[0]
    return {key: torch.stack([item[key] for item in batch]) for key in batch[0]}
