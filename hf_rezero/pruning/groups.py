"""What can be cut out of a model together: heads, neurons, channels, layers, residual width."""

from dataclasses import dataclass

from ..structure.cuts import Cut


@dataclass(frozen=True)
class PruningGroup:
    """Units that can be removed one by one without changing what the others compute.

    Attributes:
        name: Qualified name of the module that the units belong to.
        kind: One of `TARGETS`.
        num_units: How many units there are.
        readers: Where the value of a unit is multiplied by weights: a mask scales these entries, and removal
            deletes them.
        cuts: Further entries that go with a unit: the rows that produce it, their biases, its batch norm.
        attributes: Numbers that modules keep besides their tensors: module, attribute, amount for one unit.
        parts: For layers, the module that is removed with each unit; empty for units of tensors.
        gates: For layers, the tensors of each unit that its mask scales.

    Example:
        Two layers of a model that no rule knows:

        >>> from torch import nn
        >>> from hf_rezero.pruning import Cut, PruningGroup
        >>> model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)})
        >>> PruningGroup("a", "neurons", 6, (Cut("b.weight", 1),), (Cut("a.weight", 0), Cut("a.bias", 0))).num_units
        6
    """

    name: str
    kind: str
    num_units: int
    readers: tuple[Cut, ...] = ()
    cuts: tuple[Cut, ...] = ()
    attributes: tuple[tuple[str, str, int], ...] = ()
    parts: tuple[str, ...] = ()
    gates: tuple[tuple[str, ...], ...] = ()
