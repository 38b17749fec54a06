"""Gradients by depth."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..notebook import html_table
from ..structure.loss import model_loss


if TYPE_CHECKING:
    from ..picture import Picture

CONTAINERS = (nn.ModuleList, nn.Sequential)


class GradientStatistics(NamedTuple):
    """The norm of the mean gradient of some parameters, and the variance between batches relative to its square."""

    norm: float
    relative_variance: float


class GradientProfile(dict[str, GradientStatistics]):
    """The gradient of each part by its name; `plot` draws it, and a notebook shows it as a table."""

    def plot(self, path: str | os.PathLike | None = None) -> "Picture":
        """Draw the norms by depth; a path writes that as a PNG too."""
        from ..plots import plot_gradients  # matplotlib is slow to import: only who draws waits for it

        return plot_gradients(self, path)

    def _repr_html_(self) -> str:
        rows = [[name, f"{g.norm:.3g}", f"{g.relative_variance:.3g}"] for name, g in self.items()]
        return html_table(f"gradient by depth, {len(self)} parts", ["part", "norm", "relative variance"], rows)


def gradient_profile(
    model: nn.Module, batches: Any, *, loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
) -> GradientProfile:
    """The gradient of the loss by depth: the layers of the stack one by one, other modules by their names.

    With the gradients g_b of n batches and their mean g, the norm is ||g|| and the relative variance
    sum_b ||g_b - g||^2 / ((n - 1) ||g||^2), nan for one batch and where g is 0. The stack is the kind of block in
    `ModuleList`s and `Sequential`s that holds the most parameters. Frozen parameters are left out.

    Args:
        model: Used in the mode that it is in; gradients, buffers and the random state come back as they were.
        batches: One batch, or a list of batches of the same size.
        loss_fn: The scalar loss of (model, batch); the default is `model(**batch).loss`.

    Raises:
        ValueError: There is no batch, no trainable parameter or no scalar loss.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM
        >>> from hf_rezero.diagnostics import gradient_profile
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
        >>> ids = torch.arange(8)[None]
        >>> list(gradient_profile(model, {"input_ids": ids, "labels": ids}))
        ['model.embed_tokens', 'model.layers.0', 'model.layers.1', 'lm_head']
    """
    batches = batches if isinstance(batches, list) else [batches]
    groups = _by_depth(model)
    if not batches or not groups:
        raise ValueError(
            f"{len(batches)} batches, {len(groups)} groups of trainable parameters: expected some of both."
        )
    weights = [p for group in groups.values() for p in group]
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in weights]
    squares = dict.fromkeys(groups, 0.0)
    for gradient in _gradients(model, weights, batches, loss_fn or model_loss):
        for total, g in zip(sums, gradient, strict=True):
            total += g
        for name, part in _split(groups, gradient):
            squares[name] += _squared_norm(part)
    n = len(batches)
    parts = _split(groups, sums)
    return GradientProfile(
        {name: _statistics(_squared_norm(part) / n**2, squares[name] / n, n) for name, part in parts}
    )


def _gradients(model: nn.Module, weights: list[Tensor], batches: list, loss_fn: Callable) -> Iterator[tuple]:
    """The gradient of each batch; buffers and random numbers are put back after each."""
    devices = {p.device for p in weights if p.device.type == "cuda"}
    for batch in batches:
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.random.fork_rng(devices), torch.enable_grad():
                loss = loss_fn(model, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise ValueError(f"the loss must be a scalar tensor with a gradient, got {loss!r}")
                yield torch.autograd.grad(loss.reshape(()), weights, materialize_grads=True, allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _statistics(square: float, mean_square: float, n: int) -> GradientStatistics:
    has_variance = n > 1 and square > 0
    variance = max(mean_square - square, 0.0) * n / (n - 1) / square if has_variance else math.nan
    return GradientStatistics(math.sqrt(square), variance)


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors)


def _split(groups: dict[str, list], tensors: Sequence[Tensor]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    start = 0
    for name, group in groups.items():
        yield name, tensors[start : start + len(group)]
        start += len(group)


def _by_depth(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by the block that they are in, or by the first module that holds no block."""
    blocks = _blocks(model)
    above = {name[:i] for name in blocks for i, letter in enumerate(name) if letter == "."}
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
            groups[next(prefix for prefix in prefixes if prefix not in above)].append(parameter)
    return dict(groups)


def _blocks(model: nn.Module) -> list[str]:
    """The names of the repeated blocks: the class in a container that holds the most parameters.

    Of two that hold as many, such as the stages of a net and the layers in them, the one with more blocks. Modules
    without children, as in a plain `Sequential`, count as one class.
    """
    found = defaultdict(list)
    for name, container in model.named_modules():
        if isinstance(container, CONTAINERS):
            for part, module in container.named_children():
                if not isinstance(module, CONTAINERS):
                    is_leaf = next(module.children(), None) is None
                    found[nn.Module if is_leaf else type(module)].append((f"{name}.{part}".lstrip("."), module))
    repeated = [members for members in found.values() if len(members) > 1]

    def size(members: list) -> tuple[int, int]:
        return sum(p.numel() for p in {p for _, module in members for p in module.parameters()}), len(members)

    return [name for name, _ in max(repeated, key=size)] if repeated else []
