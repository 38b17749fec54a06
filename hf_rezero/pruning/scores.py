"""Scores of units without training, the baselines that learned masks have to beat."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..structure.kept import modes_kept
from ..structure.loss import model_loss
from .activations import output_of, watch_readers
from .groups import PruningGroup
from .masks import attach_masks


Scores = dict[str, torch.Tensor]


def first_k(groups: Sequence[PruningGroup]) -> Scores:
    """The index of each unit, so that the first units go first, whatever they compute.

    Example:
        >>> from torch import nn
        >>> from hf_rezero.pruning import find_groups, first_k, prune_, select
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = find_groups(net)
        >>> select(net, groups, first_k(groups), sparsity=0.5)
        {'0': tensor([4, 5, 6, 7])}
    """
    return {group.name: torch.arange(group.num_units).float() for group in groups}


def random(groups: Sequence[PruningGroup], generator: torch.Generator | None = None) -> Scores:
    """Uniform random numbers."""
    return {group.name: torch.rand(group.num_units, generator=generator) for group in groups}


@torch.no_grad()
def magnitude(model: nn.Module, groups: Sequence[PruningGroup]) -> Scores:
    """|W_in| |W_out| of each unit, Euclidean norms without biases and norms; for layers, the norm of their gates."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    scores = {}
    for group in groups:
        if group.gates:
            norms = [torch.cat([tensors[name].flatten() for name in names]).norm() for names in group.gates]
            scores[group.name] = torch.stack(norms).float().cpu()
            continue
        product = torch.ones(group.num_units)
        for side in (group.cuts, group.readers):
            matrices = [cut for cut in side if cut.tensor in tensors and tensors[cut.tensor].ndim > 1]
            product *= sum(_squares(tensors[cut.tensor], cut, group.num_units) for cut in matrices).sqrt()
        scores[group.name] = product
    return scores


def _squares(tensor: torch.Tensor, cut, num_units: int) -> torch.Tensor:
    """Sum of squares of the entries of each unit (units,)."""
    rows = tensor.movedim(cut.dim, 0)[cut.offset : cut.offset + cut.size * num_units]
    return rows.float().square().flatten(1).sum(1).view(num_units, -1).sum(1).cpu()


def apoz(model: nn.Module, groups: Sequence[PruningGroup], batches: Iterable[Any], eps: float = 0.0) -> Scores:
    """Minus the average percentage of zeros of each unit (Hu et al. 2016, arXiv:1607.03250), as a fraction.

    Args:
        model: The model.
        groups: Groups of units; layers have no activation of their own.
        batches: Inputs, tensors or keyword arguments.
        eps: What counts as zero, |x| <= eps; 0 suits ReLU, smooth activations need more.

    Raises:
        ValueError: A group of layers, or no batch.
    """
    return {name: -zeros for name, zeros in _mean_per_unit(model, groups, batches, lambda x: x.abs() <= eps).items()}


def _mean_per_unit(model, groups, batches, statistic: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
    layers = [group.name for group in groups if not group.readers]
    if layers:
        raise ValueError(
            f"{layers[0]!r} is a group of layers, which have no activation: score heads, neurons or channels."
        )
    sums: dict[str, Any] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)

    def observe(name: str, x: torch.Tensor) -> None:
        sums[name] = sums[name] + statistic(x).double().sum(0)
        counts[name] += len(x)

    with watch_readers(model, groups, observe):
        for batch in batches:
            output_of(model, batch)
    if not counts:
        raise ValueError("got no batches: expected at least one.")
    means = {name: (total / counts[name]).float().cpu() for name, total in sums.items()}
    return {group.name: means[group.name].view(group.num_units, -1).mean(1) for group in groups}


def taylor(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
) -> Scores:
    """Mean |dL/dz| at z = 1 over the batches, divided by its Euclidean norm in each group.

    The first-order change of the loss when a unit goes (Michel et al. 2019, arXiv:1905.10650, section 4.1), for units
    and layers; small batches tell more, because signs cancel inside a batch.

    Args:
        model: The model; its gradients and mode are left as they were.
        groups: Its groups.
        batches: Batches for `loss_fn`.
        loss_fn: (model, batch) -> loss; default: `model(**batch).loss`.

    Raises:
        ValueError: No batch was given, or `attach_masks` refuses the model or the groups.
    """
    loss_fn = loss_fn or model_loss
    with modes_kept(model):
        masks = attach_masks(model.eval(), groups, "l1")
        total, count = torch.zeros_like(masks.layer.mask), 0
        try:
            for batch in batches:
                (gradient,) = torch.autograd.grad(loss_fn(model, batch), [masks.layer.mask])
                total, count = total + gradient.abs(), count + 1
        finally:
            masks.detach_()
    if not count:
        raise ValueError("got no batches: expected at least one.")
    by_group = masks.split(total.cpu() / count)
    return {name: score / score.norm().clamp(min=1e-20) for name, score in by_group.items()}
