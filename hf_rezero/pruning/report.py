"""What a pruning removed, and whether the smaller model is the masked one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike

import torch

from ..files import write_json


@dataclass
class PruningReport:
    """What `prune_` and `remove_pruned_` did.

    Attributes:
        method: How the units were chosen: l1, l0, a score, or "given".
        target_sparsity: What was asked for.
        sparsity: Fraction of the parameters of the cut tensors that went.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        units: Kind and number of the units, by group.
        kept: Indices of the kept units, by group.
        undecided: For L0, the fraction of gates that were neither surely open nor surely closed.
        max_difference: Largest difference between outputs of the masked and the pruned model.
        max_output: Largest output of the masked model.
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

    def compare(self, masked: torch.Tensor, pruned: torch.Tensor) -> None:
        """Record how far the outputs of the two models are apart."""
        self.max_difference = float((masked - pruned).abs().max())
        self.max_output = float(masked.abs().max())

    def left_by_kind(self) -> dict[str, tuple[int, int]]:
        """Kept and former units of each kind."""
        counts: dict[str, tuple[int, int]] = {}
        for name, (kind, units) in self.units.items():
            kept, former = counts.get(kind, (0, 0))
            counts[kind] = kept + len(self.kept[name]), former + units
        return counts

    def to_dict(self) -> dict:
        """As JSON has it, the kept units as ranges."""
        return asdict(self) | {"kept": {name: to_ranges(indices) for name, indices in self.kept.items()}}

    def save(self, path: str | PathLike) -> None:
        """Write JSON."""
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        left = ", ".join(f"{kept} of {former} {kind}" for kind, (kept, former) in self.left_by_kind().items())
        lines = [
            f"{self.method}: {self.parameters_before:,} -> {self.parameters_after:,} parameters, "
            f"{self.sparsity:.1%} of the cut tensors removed",
            f"kept {left}",
        ]
        if self.max_difference is not None:
            lines.append(
                f"masked and pruned model differ by at most {self.max_difference:.1e} in outputs up to "
                f"{self.max_output:.3g}"
            )
        if self.undecided > 0.05:
            lines.append(f"{self.undecided:.0%} of the gates were undecided: train longer, or per example")
        return "\n".join(lines)


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


def from_ranges(text: str) -> list[int]:
    """The numbers that `to_ranges` has written."""
    runs = [part.partition("-") for part in text.split(",") if part]
    return [index for a, _, b in runs for index in range(int(a), int(b or a) + 1)]
