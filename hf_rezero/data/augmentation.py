"""Random crops, flips and colours of images in batches."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.nn import functional as F


_LUMA = torch.tensor([0.299, 0.587, 0.114])


STREAMS = 7  # random numbers of one image: crop y and x, flip, brightness, contrast, saturation, angle


def uniforms(seed: int, epoch: int, rows: np.ndarray, count: int) -> np.ndarray:
    """Random numbers `[len(rows), count]` in [0, 1) that depend on seed, epoch and row, and on nothing else.

    A generator would have to be wound on to resume in the middle of an epoch, and to agree with other processes. This
    is splitmix64, which turns a counter into random bits.

    Example:
        >>> a, b = uniforms(0, 1, np.array([5, 6]), 2), uniforms(0, 1, np.array([6]), 2)
        >>> bool((a[1] == b[0]).all())
        True
    """
    start = np.array([seed % 2**32, epoch % 2**32], dtype=np.uint64)
    key = _mix(_mix(start[0]) + start[1])
    counter = rows.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    return (_mix(_mix(counter) ^ key) >> np.uint64(11)) / 2.0**53


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, each off by default.

    In this order: a shift by up to `crop_padding` pixels in each direction, black coming in; a mirror image half of
    the time if `flip`; factors of brightness, contrast and saturation within 1 +- the number given; a rotation by up
    to `rotation` degrees.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> augment = Augmentation(crop_padding=4, flip=True, rotation=2)
        >>> augment(np.zeros((5, 32, 32, 3), np.uint8), uniforms(0, 0, np.arange(5), 7)).shape
        torch.Size([5, 3, 32, 32])
    """

    crop_padding: int = 0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    rotation: float = 0.0

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"got {name}={getattr(self, name)}: factors of 1 +- 0 ... 1 can be had.")
        if self.crop_padding < 0 or not 0 <= self.rotation <= 180:
            raise ValueError(
                f"got crop_padding={self.crop_padding} and rotation={self.rotation}: "
                f"0 or more pixels and 0 ... 180 degrees can be had."
            )

    def __call__(self, images: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        """Change images.

        Args:
            images: uint8 [B, H, W, C].
            draws: [B, 7], numbers in [0, 1) for each image.

        Returns:
            Floats [B, C, H, W] of 0 ... 255.
        """
        y, x, flip, *factors, angle = np.moveaxis(draws, 1, 0)
        pixels = torch.from_numpy(self._crop(images, y, x, flip < 0.5)).float()
        for adjust, strength, draw in zip(
            (_brightness, _contrast, _saturation),
            (self.brightness, self.contrast, self.saturation),
            factors,
            strict=True,
        ):
            if strength:
                factor = torch.from_numpy(1 + strength * (2 * draw - 1)).float().view(-1, 1, 1, 1)
                pixels = adjust(pixels, factor).clamp_(0, 255)
        return _rotate(pixels, torch.from_numpy(self.rotation * (2 * angle - 1)).float()) if self.rotation else pixels

    def _crop(self, images: np.ndarray, y: np.ndarray, x: np.ndarray, flip: np.ndarray) -> np.ndarray:
        """Shifted and mirrored images, with the channels first: uint8 [B, C, H, W]."""
        padding, (size, height, width, _) = self.crop_padding, images.shape
        if padding:
            padded = np.zeros((size, height + 2 * padding, width + 2 * padding, images.shape[3]), images.dtype)
            padded[:, padding:-padding, padding:-padding] = images
            windows = sliding_window_view(padded, (height, width), axis=(1, 2))  # [B, 2 p + 1, 2 p + 1, C, H, W]
            top, left = ((draw * (2 * padding + 1)).astype(int) for draw in (y, x))
            images = windows[np.arange(size), top, left]
        else:
            images = np.ascontiguousarray(np.moveaxis(images, -1, 1))
        if self.flip:
            images[flip] = images[flip][..., ::-1]
        return images


def to_floats(images: np.ndarray) -> torch.Tensor:
    """Images uint8 [B, H, W, C] as floats [B, C, H, W] of 0 ... 255."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).float()


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """The luminance of pixels [B, C, ...], as [B, 1, ...]."""
    return torch.einsum("c,bc...->b...", _LUMA, pixels)[:, None] if pixels.shape[1] == 3 else pixels


def _brightness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return pixels.mul_(factor)


def _contrast(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = _grey(pixels.mean((2, 3), keepdim=True))
    return pixels.mul_(factor).add_(mean * (1 - factor))


def _saturation(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.lerp(_grey(pixels), pixels, factor)


def _rotate(pixels: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Rotate each image about its centre, black coming in."""
    height, width = pixels.shape[2:]
    # F.affine_grid does the same in five times the time; coordinates are -1 ... 1 from edge to edge
    y, x = (torch.arange(1, 2 * size, 2) / size - 1 for size in (height, width))
    cos, sin = (turn.view(-1, 1, 1) for turn in (degrees.deg2rad().cos(), degrees.deg2rad().sin()))
    from_x, from_y = cos * x - sin * height / width * y[:, None], sin * width / height * x + cos * y[:, None]
    return F.grid_sample(pixels, torch.stack([from_x, from_y], -1), align_corners=False)
