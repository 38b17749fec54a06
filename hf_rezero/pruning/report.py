"""Reports of what was pruned, and of whether the smaller model computes the same as the masked one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from ..files import write_json
from ..notebook import html_table


if TYPE_CHECKING:
    from ..picture import Picture


# prefixes of the metrics of a run that prunes; the last is the Trainer's own
BEFORE, PRUNED, AT_THE_END = "before", "pruned", "eval"


@dataclass(repr=False)
class PruningReport:
    """What `prune_` and `remove_pruned_` did: `print` it, `save` it as JSON, `plot` it; a notebook shows it as a table.

    Attributes:
        method: How the units were chosen: l1, l0, a score, or "given".
        target_sparsity: The sparsity that was asked for.
        sparsity: Fraction of the parameters of the cut tensors that was removed.
        parameters_before: Parameters of the whole model before pruning.
        parameters_after: Parameters of the whole model after pruning.
        units: Kind and number of the units, by group.
        kept: Indices of the kept units, by group.
        undecided: For L0, the fraction of gates that were neither surely open nor surely closed.
        max_difference: Largest difference between outputs of the masked and the pruned model.
        max_output: Largest output of the masked model.
        metric: Metric of the quality, by its name in the results of the run.
        quality_before: Quality of the whole model on the validation data.
        quality_pruned: Quality right after pruning.
        quality_at_the_end: Quality after the training that followed.
        bytes_before: Size of the weight files, or of the weights if there was no file.
        bytes_after: Size of the weight files after pruning.
    """

    method: str
    target_sparsity: float | None
    sparsity: float
    parameters_before: int
    parameters_after: int
    units: dict[str, tuple[str, int]]
    kept: dict[str, list[int]]
    undecided: float = 0.0
    max_difference: float | None = None
    max_output: float | None = None
    metric: str | None = None
    quality_before: float | None = None
    quality_pruned: float | None = None
    quality_at_the_end: float | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None

    @classmethod
    def from_dict(cls, saved: Mapping) -> "PruningReport":
        """Read what `to_dict` gave, now or in an earlier release."""
        known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        kept = {name: from_ranges(ranges, at_most=saved["units"][name][1]) for name, ranges in saved["kept"].items()}
        return cls(**known | {"kept": kept})

    def take_quality(self, results: Mapping[str, float], metric: str) -> None:
        """Note the quality at each stage from the results of the run."""
        self.metric = metric
        self.quality_before = results.get(f"{BEFORE}_{metric}")
        self.quality_pruned = results.get(f"{PRUNED}_{metric}")
        self.quality_at_the_end = results.get(f"{AT_THE_END}_{metric}")

    def complete(self, results: Mapping[str, Any], metric: str) -> None:
        """Fill in what earlier releases wrote only into the results of the run."""
        if self.metric is None:
            self.take_quality(results, metric)
        if self.bytes_before is None:
            self.bytes_before = results.get("pruning_bytes_before")
            self.bytes_after = results.get("pruning_bytes_after")

    def stages(self) -> dict[str, float]:
        """Return the quality at each stage where it was measured, under its name in words."""
        found = {
            "before": self.quality_before,
            "right after pruning": self.quality_pruned,
            "at the end": self.quality_at_the_end,
        }
        return {words: quality for words, quality in found.items() if quality is not None}

    def sizes(self) -> dict[str, float | None]:
        """Return the sizes for the results of a run, by name."""
        return {
            "pruning_parameters_before": self.parameters_before,
            "pruning_parameters_after": self.parameters_after,
            "pruning_bytes_before": self.bytes_before,
            "pruning_bytes_after": self.bytes_after,
            "pruning_sparsity": self.sparsity,
        }

    def compare(self, masked: torch.Tensor, pruned: torch.Tensor) -> None:
        """Record how far the outputs of the two models are apart."""
        self.max_difference = float((masked - pruned).abs().max())
        self.max_output = float(masked.abs().max())

    @property
    def is_undecided(self) -> bool:
        """Whether so many gates were neither open nor closed that the pruned model is not the one that was trained."""
        return self.undecided > 0.05

    def left_by_kind(self) -> dict[str, tuple[int, int]]:
        """Kept and former units of each kind."""
        counts: dict[str, tuple[int, int]] = {}
        for name, (kind, units) in self.units.items():
            kept, former = counts.get(kind, (0, 0))
            counts[kind] = kept + len(self.kept[name]), former + units
        return counts

    def to_dict(self) -> dict:
        """Return the content of the JSON file, with the kept units as ranges."""
        return asdict(self) | {"kept": {name: to_ranges(indices) for name, indices in self.kept.items()}}

    def save(self, path: str | PathLike) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_dict())

    def plot(self, path: str | PathLike | None = None) -> "Picture":
        """Draw which units are left; with a path, also write the picture there as a PNG."""
        from ..plots import plot_kept  # matplotlib is slow to import: only who draws waits for it

        return plot_kept(self, path)

    def __str__(self) -> str:
        left = ", ".join(f"{kept} of {former} {kind}" for kind, (kept, former) in self.left_by_kind().items())
        return "\n".join([self._size(), f"kept {left}", *self._remarks()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        kinds = self.left_by_kind().items()
        rows = [[kind, str(kept), str(former), f"{kept / former:.0%}"] for kind, (kept, former) in kinds]
        return html_table(self._size(), ["units", "kept", "of", "share"], rows, "\n".join(self._remarks()))

    def _size(self) -> str:
        return (
            f"{self.method}: {self.parameters_before:,} -> {self.parameters_after:,} parameters, "
            f"{self.sparsity:.1%} of the cut tensors removed"
        )

    def _remarks(self) -> list[str]:
        lines = []
        if self.max_difference is not None:
            lines.append(
                f"masked and pruned model differ by at most {self.max_difference:.1e} in outputs up to "
                f"{self.max_output:.3g}"
            )
        if self.is_undecided:
            lines.append(f"{self.undecided:.0%} of the gates were undecided: train longer, or per example")
        return lines


def to_ranges(indices: Sequence[int]) -> str:
    """Sorted numbers as text.

    Example:
        >>> to_ranges([0, 1, 2, 5, 7, 8])
        '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def from_ranges(text: str, at_most: int) -> list[int]:
    """The numbers that `to_ranges` has written.

    Args:
        text: Runs of numbers, from a file.
        at_most: How many there can be.

    Raises:
        ValueError: It is not of this form, or holds more numbers.

    Example:
        >>> from_ranges("0-2,7", at_most=8)
        [0, 1, 2, 7]
        >>> from_ranges("0-99999999999", at_most=8)
        Traceback (most recent call last):
        ...
        ValueError: got the kept units '0-99999999999' of 8: expected numbers and runs of them, such as 0-2,7.
    """
    try:
        pairs = [part.partition("-") for part in text.split(",") if part]
        runs = [range(int(a), int(b or a) + 1) for a, _, b in pairs]
    except (AttributeError, ValueError):
        runs = None
    if runs is None or sum(max(0, run.stop - run.start) for run in runs) > at_most:
        raise ValueError(
            f"got the kept units {text!r:.80} of {at_most}: expected numbers and runs of them, such as 0-2,7."
        )
    return [index for run in runs for index in run]
