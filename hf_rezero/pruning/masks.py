"""Masks on a model that learn which of its units to keep.

A mask is a factor for each unit, after its activation. As the value of a unit is only ever multiplied by weights, the
factors are multiplied into these weights, W x diag(z). This gives the same product as masking the activations, at a cost
that does not grow with the batch. The same operation folds the mask into the weights at the end.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from ..structure.cuts import Cut
from ..structure.parameters import is_resweight
from ..structure.states import check_loads_of
from .groups import PruningGroup
from .mask_layers import MASK_LAYERS, FixedMaskLayer, MaskLayer
from .penalty import Penalty
from .select import Sizes, keep_above, of_kind, openness_of, select, unit_costs


def masks_of(model: nn.Module) -> "Masks | None":
    """The masks that are attached to a model."""
    return getattr(model, "pruning_masks", None)


class Masks(nn.Module):
    """The masks of all groups of a model, as one vector; the submodule `pruning_masks` of the model they are attached to.

    In each step, add `masks.penalty()` to the loss, and call `masks.before_step()` before and `masks.after_step()` after
    `optimizer.step()`. Give `masks.parameters()` a group of their own without weight decay.

    Args:
        model: The model that the masks act on.
        groups: Its groups.
        layer: One `L1MaskLayer` or `L0MaskLayer` for all units of all groups, in their order.
        weights: What the penalty of each unit is multiplied by (units of all groups,).
        pull: The penalty, see `Penalty`.
        min_keep: How many units of each group are never caught, as one number or by kind of group.
        sphere: Keep the norm of the weights that read each unit, |W_i| = const.
        alternate_steps: Train the weights and the masks in turn, this many steps each; 0 trains both in every step.
        hold_resweight: Do not train residual weights together with masks: they would grow as the masks shrink.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[PruningGroup],
        layer: MaskLayer,
        weights: torch.Tensor,
        pull: Penalty,
        *,
        min_keep: int | Mapping[str, int] = 1,
        sphere: bool = False,
        alternate_steps: int = 0,
        hold_resweight: bool = True,
    ):
        super().__init__()
        self.groups, self.layer, self.pull, self.min_keep = list(groups), layer, pull, min_keep
        self.alternate_steps, self.hold_resweight = alternate_steps, hold_resweight
        self.sizes = Sizes(model, groups)
        self.register_buffer("weights", weights)
        self._counts = [group.num_units for group in groups]
        self._current, self._handles = None, []
        self._model = [model]  # in a list, or the model would be its own grandchild
        self.sphere = _Sphere(model, groups) if sphere else None
        check_loads_of(self)

    @property
    def model(self) -> nn.Module:
        """The model that the masks act on."""
        return self._model[0]

    def forward(self, x):
        """The identity, because a `Sequential` runs all its children."""
        return x

    def split(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split one value for each unit of all groups by group."""
        parts = values.split(self._counts, dim=-1)
        return {group.name: part for group, part in zip(self.groups, parts, strict=True)}

    def current(self) -> dict[str, torch.Tensor]:
        """The factors of the running forward pass, or those without noise."""
        if self._current is None:
            return self.split(self.layer.estimate())
        return self._current

    def openness(self) -> dict[str, torch.Tensor]:
        """How open each unit is, 0 to 1, by group; differentiable."""
        return self.split(self.layer.openness())

    def expected_sparsity(self) -> torch.Tensor:
        """The fraction of the prunable parameters that is expected to go; differentiable."""
        return self.sizes.sparsity(self.openness())

    def penalty(self) -> torch.Tensor:
        """lambda * sum of weight_i * |m_i|, or of weight_i * P(z_i != 0), or the penalty that steers to a target."""
        return self.pull(self)

    def before_step(self) -> None:
        """Drop the gradients of what must not move in this step; an optimiser skips tensors without gradient."""
        own = {id(p) for p in self.parameters()}
        masks_turn = not self.alternate_steps or int(self.pull.steps) // self.alternate_steps % 2 == 1
        weights_turn = not self.alternate_steps or not masks_turn
        for name, parameter in self.model.named_parameters():
            is_mask = id(parameter) in own
            held = self.hold_resweight and is_resweight(name)
            if held or not (masks_turn if is_mask else weights_turn):
                parameter.grad = None

    def after_step(self) -> None:
        """Catch, clamp and count, after the optimiser's step."""
        if self.sphere is not None:
            self.sphere.project()
        self.layer.settle()
        self.layer.catch(self.protected() | self._beyond_target())
        self.pull.after_step(self)
        self._current = None

    def protected(self) -> torch.Tensor:
        """The best `min_keep` units of each group (units of all groups,)."""
        best = []
        for group, scores in zip(self.groups, self.layer.scores().split(self._counts), strict=True):
            floor = min(of_kind(self.min_keep, group), group.num_units)
            mask = torch.zeros_like(scores, dtype=torch.bool)
            best.append(mask.index_fill_(0, scores.topk(floor).indices, True))
        return torch.cat(best)

    def _beyond_target(self) -> torch.Tensor:
        """L1 masks that must not be caught yet, however small: the target of this step is met without them."""
        closed = self.layer.scores() == 0
        if not self.layer.catches or self.pull.target_sparsity is None:
            return torch.zeros_like(closed)
        order = self.layer.scores().argsort(stable=True)
        target = self.pull.warmup() * self.pull.target_sparsity

        def sparsity(count: int) -> float:
            openness = torch.ones(len(order), device=order.device).index_fill_(0, order[:count], 0.0)
            return float(self.sizes.sparsity(self.split(openness)))

        count = bisect_left(range(len(order) + 1), target, lo=int(closed.sum()), key=sparsity)
        return torch.ones_like(closed).index_fill_(0, order[:count], False)

    def polarisation(self) -> float:
        """The fraction of L0 gates that are neither surely open nor surely closed; 0 for L1."""
        return self.layer.undecided()

    def detach_(self) -> None:
        """Take the masks off the model, leaving its weights as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if masks_of(self.model) is self:
            del self.model.pruning_masks

    def _attach(self) -> None:
        by_module = defaultdict(list)
        for group in self.groups:
            for reader in group.readers:
                by_module[reader.tensor.rpartition(".")[0]].append((reader, group.name, None))
            for unit, tensors in enumerate(group.gates):
                for tensor in tensors:
                    by_module[tensor.rpartition(".")[0]].append((Cut(tensor, -1), group.name, unit))
        for name, factors in by_module.items():
            module = self.model.get_submodule(name)
            scaling = _Scaling(self, module, factors)
            self._handles += [
                module.register_forward_pre_hook(scaling.enter),
                module.register_forward_hook(scaling.leave, always_call=True),
            ]
        self._handles.append(self.model.register_forward_pre_hook(self._sample, with_kwargs=True, prepend=True))
        self.model.pruning_masks = self

    def _sample(self, module, args, kwargs) -> None:
        """Draw the factors once for a forward pass, so that gradient checkpointing recomputes with the same ones."""
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim)
        first = next(tensors, None)
        self._current = self.split(self.layer(None if first is None else len(first)))


class _Scaling:
    """Hooks that run a module with tensors multiplied by masks."""

    def __init__(self, masks: Masks, module: nn.Module, factors: list[tuple[Cut, str, int | None]]):
        self.masks, self.module, self.factors, self.originals = masks, module, factors, {}

    def enter(self, module, args):
        values = self.masks.current()
        for cut, group, unit in self.factors:
            z = values[group]
            if z.ndim == 2:
                args = (_scale_input(args[0], module, z, cut.size), *args[1:])
                continue
            name = cut.tensor.rpartition(".")[2]
            tensor = module._parameters[name]
            self.originals.setdefault(name, tensor)
            module._parameters[name] = scale(tensor, z if unit is None else z[unit], cut)
        return args

    def leave(self, module, args, output):
        module._parameters.update(self.originals)
        self.originals.clear()


def scale(tensor: torch.Tensor, z: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Multiply the entries of each unit by its factor, in fp32, rounded once; `z` without dimension scales all."""
    if z.ndim:
        shape = [1] * tensor.ndim
        shape[cut.dim] = -1
        z = z.repeat_interleave(cut.size).view(shape)
    return (tensor * z).to(tensor.dtype)


def _scale_input(x: torch.Tensor, module: nn.Module, z: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply the features of each example (B, ...) by its own factors (B, units)."""
    z = z.repeat_interleave(size, dim=1).to(x.dtype)
    if isinstance(module, nn.modules.conv._ConvNd):
        return x * z.view(*z.shape, *[1] * (x.ndim - 2))
    return x * z.view(len(z), *[1] * (x.ndim - 2), -1)


class _Sphere(nn.Module):
    """|W_i| of the weights that read unit i stays what it was at the start (He et al. 2017)."""

    def __init__(self, model: nn.Module, groups: Sequence[PruningGroup]):
        super().__init__()
        tensors = dict(model.named_parameters(remove_duplicate=False))
        self.readers = [(cut, tensors[cut.tensor]) for group in groups for cut in group.readers]
        self.register_buffer("norms", torch.cat([_norms(tensor.detach(), cut) for cut, tensor in self.readers]))

    @torch.no_grad()
    def project(self) -> None:
        now = [_norms(tensor, cut) for cut, tensor in self.readers]
        start = self.norms.split([len(norms) for norms in now])
        for (cut, tensor), norms, wanted in zip(self.readers, now, start, strict=True):
            tensor.copy_(scale(tensor, wanted / norms.clamp(min=1e-12), cut))


def _norms(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    squares = tensor.float().square().movedim(cut.dim, 0).flatten(1).sum(1)
    return squares.view(-1, cut.size).sum(1).sqrt()


def attach_masks(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    kind: str = "l1",
    *,
    lambda_: float = 1e-3,
    target_sparsity: float | None = None,
    warmup_steps: int = 0,
    branch_lambda: Mapping[str, float] | None = None,
    module_costs: Mapping[str, float] | str | None = "units",
    min_keep: int | Mapping[str, int] = 1,
    sphere: bool = False,
    alternate_steps: int = 0,
    hold_resweight: bool = True,
    **layer_options,
) -> Masks:
    """Put a learned mask on every unit of the groups; in eval mode the model computes what it did before, to the bit.

    Args:
        model: The model; it gains the submodule `pruning_masks`.
        groups: From `find_groups`, or made by hand.
        kind: "l1" for `L1MaskLayer`, "l0" for `L0MaskLayer`, whose arguments follow in `layer_options`.
        lambda_: Factor of the penalty. With a target it is only the initial value for L1, and unused for L0.
        target_sparsity: Fraction of the prunable parameters to remove, instead of a fixed factor.
        warmup_steps: Steps over which the factor, or the target, grows from 0.
        branch_lambda: Further factors by kind or by pattern of group names: {"heads": 2.0, "*.layers.0.*": 0.0}.
        module_costs: How much the penalty charges for a unit: "units" charges the same for all, "params" by parameters,
            and costs as in `unit_costs` by FLOPs or seconds. Charges are divided by their mean.
        min_keep: How many units stay in each group, as one number or by kind of group.
        sphere: See `Masks`; for L1 and groups of units.
        alternate_steps: See `Masks`.
        hold_resweight: See `Masks`.
        layer_options: Arguments of the mask layer.

    Raises:
        ValueError: Masks are attached already, residual weights are still 0, the model is compiled, or options do not go
            together.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hf_rezero.pruning import attach_masks, find_groups, remove_pruned_
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> masks = attach_masks(net, find_groups(net), "l1", lambda_=0.1)
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.0)
        >>> for _ in range(50):
        ...     loss = net(torch.ones(1, 4)).square().mean() + masks.penalty()
        ...     loss.backward()
        ...     masks.before_step()
        ...     optimizer.step()
        ...     masks.after_step()
        ...     optimizer.zero_grad()
        >>> report = remove_pruned_(net, masks)
        >>> net[0].out_features < 8
        True
    """
    _check_attachable(model, groups, kind, sphere, layer_options)
    layer_class = MASK_LAYERS[kind]
    device = next(model.parameters()).device
    layer = layer_class(sum(group.num_units for group in groups), **layer_options)
    weights = _weights(model, groups, branch_lambda or {}, module_costs)
    penalty = Penalty if target_sparsity is None else layer_class.steered
    pull = penalty(lambda_, warmup_steps, target_sparsity)
    options = {"sphere": sphere, "alternate_steps": alternate_steps, "hold_resweight": hold_resweight}
    masks = Masks(model, groups, layer, weights, pull, min_keep=min_keep, **options).to(device)
    masks.train(model.training)
    masks._attach()
    return masks


def _weights(model, groups, branch_lambda: Mapping[str, float], module_costs) -> torch.Tensor:
    """(units of all groups,), mean 1 before the factors of the branches."""
    if module_costs == "units":
        costs = {group.name: torch.ones(group.num_units) for group in groups}
    else:
        costs = unit_costs(model, groups, None if module_costs == "params" else module_costs)
    all_costs = torch.cat([costs[group.name] for group in groups])
    factors = [
        math.prod(f for pattern, f in branch_lambda.items() if pattern == group.kind or fnmatch(group.name, pattern))
        for group in groups
        for _ in range(group.num_units)
    ]
    return all_costs / all_costs.mean() * torch.tensor(factors)


def _check_attachable(model, groups, kind: str, sphere: bool, options: Mapping) -> None:
    if kind not in MASK_LAYERS:
        raise ValueError(f"got kind={kind!r}: expected {' or '.join(map(repr, MASK_LAYERS))}.")
    if masks_of(model) is not None:
        raise ValueError("the model has masks already: call remove_pruned_, or take them off with masks.detach_().")
    if not groups:
        raise ValueError("got no groups: expected those of find_groups(model), or your own.")
    if len({group.name for group in groups}) < len(groups):
        raise ValueError("got two groups of the same name: expected each unit in one group only.")
    if hasattr(model, "_orig_mod"):
        raise ValueError("got a compiled model: attach the masks to the model inside, and compile after removal.")
    if sphere and not (MASK_LAYERS[kind].is_scale and all(group.readers for group in groups)):
        raise ValueError("got sphere=True: expected L1 masks, and groups of units rather than of layers.")
    if options.get("per_example") and any(group.gates for group in groups):
        raise ValueError("got per_example=True with layers as a target: their residual weights serve a whole batch.")
    zero = [n for n, p in model.named_parameters() if is_resweight(n) and not p.detach().any()]
    if zero:
        raise ValueError(
            f"{len(zero)} residual weights are still 0, the first is {zero[0]}: a branch behind a weight of 0 looks "
            f"useless, so all its masks would close. Train first, and attach the masks later."
        )


def finalize_masks(
    masks: Masks, *, round_to: int | Mapping[str, int] = 1
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Decide which units go: those with a mask of 0 and, until a target sparsity is reached, the weakest others.

    From here on the model runs with the decided factors, even in training. The penalty is 0, and all weights learn.

    Args:
        masks: From `attach_masks`.
        round_to: Keep a multiple of this many units in each group, as one number or by kind of group.

    Returns:
        Sorted indices of the kept units, and the factors of all units with 0 for the others, both by group.

    Raises:
        ValueError: The target cannot be reached, or a mask is NaN.
    """
    if not torch.isfinite(masks.layer.scores()).all():
        raise ValueError("the masks hold values that are not finite: go back to an earlier checkpoint.")
    factors = masks.split(masks.layer.estimate())
    scores = {
        # -1e6 is below any score: what is closed goes first
        name: torch.where(factors[name] == 0, -1e6 + score, score)
        for name, score in masks.split(masks.layer.scores()).items()
    }
    limits = {"min_keep": masks.min_keep, "round_to": round_to}
    kept, target = keep_above(masks.groups, scores, -1e5, **limits), masks.pull.target_sparsity
    if target is not None and float(masks.sizes.sparsity(openness_of(kept, masks.groups))) < target:
        kept = select(masks.sizes, masks.groups, scores, target, scope="global", **limits)
    openness = openness_of(kept, masks.groups)
    factors = {name: factor * openness[name].to(factor) for name, factor in factors.items()}
    masks.layer = FixedMaskLayer(torch.cat([factors[group.name] for group in masks.groups]), masks.layer.kind)
    masks.pull = Penalty(0.0, target_sparsity=target).to(masks.weights.device)
    masks.alternate_steps, masks._current = 0, None
    return kept, factors
