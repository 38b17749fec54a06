"""Weights laid out in memory by their shapes, for the products of one token: generation on a CPU."""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..structure.modules import is_linear, output_dim
from ..structure.parameters import FLOATS


ORDERS = ("fastest", "rows", "columns")
# another order must be worth it: what is within this share of the time is noise
WORTH_IT = 0.97
# weights that are timed one after the other, so that the caches do not hold them, and the memory that their copies take
AT_ONCE, BYTES_AT_ONCE = 8, 2**27


@dataclass(frozen=True)
class LayoutTimes:
    """All weights of one shape, type and order.

    Attributes:
        microseconds: Of one product by rows and by columns; empty where the order was given and not measured.
        before: The order that the weights had, "rows" or "columns".
        after: The order that they have now.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    num_weights: int
    microseconds: dict[str, float]
    before: str
    after: str


@dataclass(frozen=True)
class LayoutReport:
    """What `layout_` measured and did.

    Attributes:
        shapes: One entry for each shape, type and order of weights.
        skipped: The modules that were left as they are, and why.
    """

    shapes: tuple[LayoutTimes, ...]
    skipped: dict[str, str]

    @property
    def ratio(self) -> float | None:
        """Time of all products of a token after the change against before; None where nothing was measured."""
        before = sum(s.num_weights * s.microseconds[s.before] for s in self.shapes if s.microseconds)
        after = sum(s.num_weights * s.microseconds[s.after] for s in self.shapes if s.microseconds)
        return after / before if before else None

    def __str__(self) -> str:
        lines = [f"{'weights':>7} {'shape':>16} {'by rows':>10} {'by columns':>10}  order"]
        for s in self.shapes:
            rows, columns = (f"{s.microseconds[o]:.0f} us" if s.microseconds else "-" for o in ORDERS[1:])
            shape = f"{s.in_features:,} -> {s.out_features:,}"
            lines.append(f"{s.num_weights:>7} {shape:>16} {rows:>10} {columns:>10}  {s.after}")
        return "\n".join([*lines, *(f"left alone: {name} is {reason}" for name, reason in self.skipped.items())])


@torch.no_grad()
def layout_(
    model: nn.Module, order: Literal["fastest", "rows", "columns"] = "fastest", *, tokens: int = 1, rounds: int = 15
) -> LayoutReport:
    """Store each weight of a linear layer in the order in memory whose product is the fastest on this CPU.

    y = x W^T reads all of W (out, in) for one row x (1, in), by rows, the order of `nn.Linear`, or by columns, that of
    GPT-2's `Conv1D`. Other kernels read the one and the other, and which of them is faster depends on the shape and on
    the processor: both are timed, for each shape of the model. Values, names, shapes and checkpoints stay what they
    are. Sums are taken in another order, so that the last bits of results can differ. Training does not gain.

    Args:
        model: Any model on a CPU, changed in place.
        order: "fastest", or "rows" or "columns" for all weights: "rows" undoes it for models without `Conv1D`.
        tokens: Rows of the product that is timed: the size of the batch in generation.
        rounds: How often the two orders are timed, in turn; the medians count.

    Returns:
        The times, the orders, and what was left alone: weights that are shared, hooked, parametrised, quantised,
        sharded or on another device.

    Raises:
        ValueError: An unknown order, or fewer than one token or round.

    Example:
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM, layout_
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2))
        >>> report = layout_(model.eval())
        >>> sorted((shape.in_features, shape.out_features, shape.num_weights) for shape in report.shapes)
        [(64, 64, 8), (64, 256, 2), (64, 264, 1), (256, 64, 2)]
    """
    if order not in ORDERS or tokens < 1 or rounds < 1:
        raise ValueError(
            f"got order={order!r}, tokens={tokens}, rounds={rounds}: expected an order of {', '.join(ORDERS)}, and at "
            f"least one token and one round."
        )
    groups, skipped = _weights_by_shape(model)
    shapes = []
    for (in_features, out_features, dtype, before), modules in groups.items():
        times = _microseconds(modules, before, tokens, rounds) if order == "fastest" else {}
        after = _faster(times, before) if order == "fastest" else order
        for module in modules:
            module.weight.data = _ordered(module, after)
        shapes.append(LayoutTimes(in_features, out_features, dtype, len(modules), times, before, after))
    return LayoutReport(tuple(shapes), skipped)


def _weights_by_shape(model: nn.Module) -> tuple[dict[tuple, list[nn.Module]], dict[str, str]]:
    """The linear modules by what decides the time of their products, and those to leave alone."""
    uses = Counter(
        _address(p) for m in model.modules() for p in m._parameters.values() if p is not None and _is_plain(p)
    )
    groups, skipped = defaultdict(list), {}
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        if reason := _obstacle(module, uses):
            skipped[name] = reason
        else:
            matrix = _matrix(module)
            groups[matrix.shape[1], matrix.shape[0], matrix.dtype, _order(matrix)].append(module)
    return groups, skipped


def _obstacle(module: nn.Module, uses: Counter) -> str:
    """Why the weight of a linear module stays as it is; empty if it need not."""
    weight = module.weight
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)  # accelerate replaces it
    if is_parametrized(module) or "weight" not in module._parameters:
        return "parametrised"
    if not _is_plain(weight):
        return f"a {type(weight.data).__name__} of {weight.dtype} on {weight.device}"
    if hooked:
        return "hooked"
    if uses[_address(weight)] > 1:
        return "shared"
    return "" if weight.is_contiguous() or weight.t().is_contiguous() else "a view of a larger tensor"


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether it is a tensor in floating point on a CPU, neither quantised nor sharded."""
    return type(weight.data) is torch.Tensor and weight.dtype in FLOATS and weight.device.type == "cpu"


def _address(weight: torch.Tensor) -> int:
    return weight.untyped_storage().data_ptr()


def _matrix(module: nn.Module) -> torch.Tensor:
    """W (out, in), as a view of the weight."""
    return module.weight.data if output_dim(module) == 0 else module.weight.data.t()


def _order(matrix: torch.Tensor) -> str:
    return "rows" if matrix.is_contiguous() else "columns"


def _ordered(module: nn.Module, order: str) -> torch.Tensor:
    """The weight in this order in memory; itself if it has it."""
    matrix = _matrix(module)
    ordered = matrix.contiguous() if order == "rows" else matrix.t().contiguous().t()
    return ordered if output_dim(module) == 0 else ordered.t()


def _microseconds(modules: list[nn.Module], before: str, tokens: int, rounds: int) -> dict[str, float]:
    """Median time of one product in either order; the modules have their first order again afterwards."""
    first = modules[0].weight
    sample = modules[: max(1, min(AT_ONCE, BYTES_AT_ONCE // first.nbytes))]
    inputs = torch.randn(tokens, _matrix(modules[0]).shape[1], dtype=first.dtype)
    weights = {order: [_ordered(module, order) for module in sample] for order in ORDERS[1:]}
    times = defaultdict(list)
    for _ in range(rounds + 1):
        for order, ordered in weights.items():
            for module, weight in zip(sample, ordered, strict=True):
                module.weight.data = weight
            start = time.perf_counter()
            for module in sample:
                module(inputs)
            times[order].append(1e6 * (time.perf_counter() - start) / len(sample))
    for module, weight in zip(sample, weights[before], strict=True):
        module.weight.data = weight
    return {order: median(taken[1:]) for order, taken in times.items()}


def _faster(times: dict[str, float], before: str) -> str:
    other = "columns" if before == "rows" else "rows"
    return other if times[other] < WORTH_IT * times[before] else before
