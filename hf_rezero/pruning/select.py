"""How many parameters are left, what a unit costs, and which units stay at a wanted sparsity."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .groups import PruningGroup


Kept = Mapping[str, torch.Tensor]


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; a tensor with two names appears twice."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


class Sizes:
    """The number of parameters of a model as a function of how open the units of its groups are.

    A tensor that loses fraction a of its rows and fraction b of its columns keeps (1 - a)(1 - b) of its entries; one
    inside a layer is multiplied by how open the layer is. So the count is exact for units that are there or not, and
    the expectation for units that are there with independent probabilities.

    Args:
        model: The model before anything is removed.
        groups: Its groups.

    Attributes:
        total: Parameters of the model, tied ones counted once.
        prunable: Parameters of the tensors from which the groups can take something.
    """

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        tensors = dict(model.named_parameters())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        names = {id(tensor): name for name, tensor in tensors.items()}
        aliases = {n: names[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        self.cuts, self.layers = defaultdict(set), defaultdict(set)
        for group in groups:
            for cut in (*group.readers, *group.cuts):
                if cut.tensor in aliases:
                    self.cuts[aliases[cut.tensor]].add((cut.dim, cut.size, cut.offset, group.name))
            for unit, part in enumerate(group.parts):
                inside = (name for name in self.shapes if name.startswith(f"{part}."))
                for name in inside:
                    self.layers[name].add((group.name, unit))
        self.touched = [name for name in self.shapes if name in self.cuts or name in self.layers]
        self.total = sum(math.prod(shape) for shape in self.shapes.values())
        self.prunable = sum(math.prod(self.shapes[name]) for name in self.touched)

    def left(self, openness: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The parameters of the prunable tensors that are left, given how open (units,) each group is; 0 to 1."""
        closed = {name: (1 - values).sum() for name, values in openness.items()}
        return sum(self._left(name, closed, openness) for name in self.touched)

    def _left(self, name: str, closed: Mapping, openness: Mapping) -> torch.Tensor:
        lengths = list(self.shapes[name])
        for dim, size, _, group in self.cuts[name]:
            lengths[dim] = lengths[dim] - size * closed[group]
        for group, unit in self.layers[name]:
            lengths.append(openness[group][unit])
        return math.prod(lengths)

    def sparsity(self, openness: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The fraction of the prunable parameters that goes."""
        return 1 - self.left(openness) / self.prunable


def unit_costs(
    model: nn.Module, groups: Sequence[PruningGroup], module_costs: Mapping[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """What each unit costs (units,): its share of the weights, times what their modules cost.

    Args:
        model: The model.
        groups: Its groups.
        module_costs: Cost of one weight of each module, such as its uses per example (`weight_uses`: FLOPs / 2) or
            its seconds per weight (`weight_seconds`); `None` counts parameters.

    Example:
        >>> from torch import nn
        >>> from hf_rezero.pruning import find_groups, unit_costs
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> unit_costs(net, find_groups(net))["0"]  # 4 weights, 1 bias, 2 weights out
        tensor([7., 7., 7.])
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))

    def price(tensor: str) -> float:
        return 1.0 if module_costs is None else module_costs.get(tensor.rpartition(".")[0], 0.0)

    costs = {}
    for group in groups:
        own = [cut for cut in (*group.readers, *group.cuts) if cut.tensor in tensors]
        each = sum(
            cut.size * tensors[cut.tensor].numel() / tensors[cut.tensor].shape[cut.dim] * price(cut.tensor)
            for cut in own
        )
        inside = [
            sum(p.numel() * price(n) for n, p in tensors.items() if n.startswith(f"{part}.")) for part in group.parts
        ]
        costs[group.name] = torch.tensor(inside or [float(each)] * group.num_units, dtype=torch.float)
    return costs


def select(
    model: "nn.Module | Sizes",
    groups: Sequence[PruningGroup],
    scores: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    scope: str = "group",
    min_keep: int | Mapping[str, int] = 1,
    round_to: int | Mapping[str, int] = 1,
) -> dict[str, torch.Tensor]:
    """The units to keep so that at least `sparsity` of the prunable parameters goes, the lowest scores first.

    Args:
        model: The model before removal, or its `Sizes`.
        groups: Its groups.
        scores: (units,) for each group, higher is better.
        sparsity: Fraction of the parameters of all tensors that the groups can cut, from 0 to 1.
        scope: "group" takes the same fraction of each group, "global" compares scores across groups.
        min_keep: How many units stay in each group, as one number or by kind of group.
        round_to: Keep a multiple of this many units in each group, likewise; layers are not rounded.

    Returns:
        Sorted indices of the kept units, by group.

    Raises:
        ValueError: The sparsity cannot be reached, or `min_keep` is more than a group has.
    """
    if scope not in ("group", "global"):
        raise ValueError(f"got scope={scope!r}: expected 'group' or 'global'.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"got sparsity={sparsity}: expected a fraction of at least 0 and below 1.")
    sizes = model if isinstance(model, Sizes) else Sizes(model, groups)
    ranks = _ranks(groups, scores, scope)

    def kept_at(threshold: float) -> dict[str, torch.Tensor]:
        return keep_above(groups, ranks, threshold, min_keep=min_keep, round_to=round_to)

    def reached(threshold: float) -> float:
        return float(sizes.sparsity(openness_of(kept_at(threshold), groups)))

    thresholds = sorted({float(rank) for ranks_of_group in ranks.values() for rank in ranks_of_group})
    low, high = 0, len(thresholds)  # search the first threshold that removes enough
    thresholds.append(math.inf)
    if reached(math.inf) < sparsity:
        raise ValueError(
            f"got sparsity={sparsity}, but at most {reached(math.inf):.3f} of the prunable parameters can go while "
            f"each group keeps its min_keep units: lower the target or min_keep, or add targets."
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(thresholds[middle]) >= sparsity else (middle + 1, high)
    return kept_at(thresholds[low])


def of_kind(value: int | Mapping[str, int], group: PruningGroup) -> int:
    """A number for all groups, or for each kind of group."""
    return value.get(group.kind, 1) if isinstance(value, Mapping) else value


def _floor(group: PruningGroup, min_keep: int | Mapping[str, int]) -> int:
    floor = of_kind(min_keep, group)
    if not 0 <= floor <= group.num_units:
        raise ValueError(
            f"got min_keep={floor} for {group.name!r}, which has {group.num_units} {group.kind}: expected 0 to that number."
        )
    return floor


def keep_above(
    groups: Sequence[PruningGroup],
    scores: Mapping[str, torch.Tensor],
    threshold: float,
    *,
    min_keep: int | Mapping[str, int],
    round_to: int | Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """Sorted indices of the units that score at least `threshold`, with the limits of `select`."""
    kept = {}
    for group in groups:
        # layers are removed one by one: a round number of them brings nothing
        multiple = 1 if group.parts else of_kind(round_to, group)
        kept[group.name] = _keep(scores[group.name], threshold, _floor(group, min_keep), multiple)
    return kept


def _ranks(groups, scores, scope: str) -> dict[str, torch.Tensor]:
    """The scores themselves, or for scope "group" the fraction of the group that scores lower."""
    ranks = {}
    for group in groups:
        score = scores[group.name].detach().double().cpu()
        if score.shape != (group.num_units,) or not score.isfinite().all():
            raise ValueError(
                f"got the scores of {group.name!r} with shape {tuple(score.shape)}: expected finite values, one for "
                f"each of {group.num_units} units."
            )
        order = score.argsort(stable=True).argsort() / group.num_units
        ranks[group.name] = order if scope == "group" else score
    return ranks


def _keep(ranks: torch.Tensor, threshold: float, floor: int, multiple: int) -> torch.Tensor:
    """Indices of the units at or above the threshold, at least `floor`, rounded up to a multiple with the best others."""
    count = max(int((ranks >= threshold).sum()), floor)
    count = min(math.ceil(count / multiple) * multiple, len(ranks))
    return ranks.argsort(descending=True, stable=True)[:count].sort().values


def openness_of(kept: Kept, groups: Sequence[PruningGroup]) -> dict[str, torch.Tensor]:
    """1 for a kept unit, 0 for a removed one, (units,) by group; groups without an entry keep all."""
    openness = {group.name: torch.ones(group.num_units, dtype=torch.float64) for group in groups}
    for name, indices in kept.items():
        openness[name] = torch.zeros_like(openness[name]).index_fill_(0, indices.cpu(), 1.0)
    return openness
