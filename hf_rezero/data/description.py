"""What a data set is, as the record of a run takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from torch.utils.data import Dataset, Subset


T = TypeVar("T")


@dataclass
class DataDescription:
    """How much there is to read, and for windows of bytes or tokens how they lie.

    Attributes:
        examples: How many; None where a stream does not know.
        of: Of how many these are the first, where they are not all.
        bytes: Of the text in all windows together.
        tokens: Likewise; None where tokens are bytes.
        block_size: Bytes or tokens of a window.
        stride: Bytes or tokens from one window to the next.
    """

    examples: int | None = None
    of: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    block_size: int | None = None
    stride: int | None = None

    def to_dict(self) -> dict[str, int]:
        """Return what is known."""
        return {name: value for name, value in vars(self).items() if value is not None}


class DescribedDataset(Dataset):
    """A data set that says what it is."""

    def describe(self) -> DataDescription:
        """Say how many examples there are."""
        return DataDescription(examples=len(self))


def describe_data(dataset) -> DataDescription:
    """Describe any data set, also the first part of one.

    Example:
        >>> from hf_rezero.data import evaluation_windows
        >>> windows = evaluation_windows(b"to be or not to be", block_size=8)
        >>> describe_data(Subset(windows, range(3))).to_dict()
        {'examples': 3, 'of': 4, 'bytes': 18, 'block_size': 8, 'stride': 4}
    """
    if isinstance(dataset, Subset):
        found = describe_data(dataset.dataset)
        found.of = found.examples if len(dataset.dataset) > len(dataset) else None
        found.examples = len(dataset)
        return found
    if isinstance(dataset, DescribedDataset):
        return dataset.describe()
    try:
        return DataDescription(examples=len(dataset))
    except TypeError:
        return DataDescription()


def from_known(cls: type[T], saved: Mapping) -> T:
    """Build a dataclass from JSON: unknown keys are ignored, and what is missing or null has its default.

    Example:
        >>> from_known(DataDescription, {"examples": 3, "of": None, "colour": "blue"}).to_dict()
        {'examples': 3}
    """
    return cls(**{f.name: saved[f.name] for f in fields(cls) if saved.get(f.name) is not None})
