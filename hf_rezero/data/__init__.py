"""Corpora, windows of bytes, images, and the tokenizer whose ids are bytes."""

from importlib import import_module
from typing import TYPE_CHECKING

from .bpe import train_bpe
from .corpora import Corpus, load_corpus
from .tokenizer import byte_tokenizer
from .tokens import Tokens, load_tokens
from .windows import ByteDataset, collate_bytes, evaluation_windows


if TYPE_CHECKING:
    from .augmentation import Augmentation
    from .images import DecodedImages, ImageDataset, channel_statistics, collate_images, read_images

# `datasets`, which images need, takes a second to import
_WITH_IMAGES = {
    "Augmentation": "augmentation",
    "DecodedImages": "images",
    "ImageDataset": "images",
    "channel_statistics": "images",
    "collate_images": "images",
    "read_images": "images",
}

__all__ = [
    "Augmentation",
    "ByteDataset",
    "Corpus",
    "DecodedImages",
    "ImageDataset",
    "Tokens",
    "byte_tokenizer",
    "channel_statistics",
    "collate_bytes",
    "collate_images",
    "evaluation_windows",
    "load_corpus",
    "load_tokens",
    "read_images",
    "train_bpe",
]


def __getattr__(name: str):
    if name not in _WITH_IMAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WITH_IMAGES[name]}", __name__), name)
