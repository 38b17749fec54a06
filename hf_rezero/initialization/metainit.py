"""MetaInit: learn the norms of the weights without data, so that the network looks locally linear.

Dauphin and Schoenholz 2019, "MetaInit: Initializing learning by learning to initialize", NeurIPS. With g = dL/dtheta on
random inputs and labels and the Hessian product H g = d(||g||^2 / 2)/dtheta, the gradient quotient

    GQ = mean_i | (g_i - (H g)_i) / (g_i + epsilon * s_i) - 1 |,    s_i = 1 where g_i >= 0, else -1,

is small where a gradient step of length 1 hardly changes the gradient. Its derivative is one of the third order: it
costs more time and memory than GradInit, with which it is to be compared.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..files import write_json
from ..structure.loss import Loss
from ..structure.parameters import decays, is_resweight
from .showing import scale_lines, scale_table, steps_bar
from .trial import Reduce, TrialModel, trainable, twice_differentiable_attention


if TYPE_CHECKING:
    from ..picture import Picture

__all__ = ["MetaInitReport", "metainit_", "random_batches"]


@dataclass(repr=False)
class MetaInitReport:
    """What MetaInit found: factors by tensor name, `loss` and `gradient_quotient` by step, wall time in seconds."""

    scales: dict[str, float]
    history: list[dict]
    seconds: float

    def __str__(self) -> str:
        return "\n".join([self._summary(), *scale_lines(self.scales)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return scale_table(self._summary(), self.scales)

    def _summary(self) -> str:
        first, last = (self.history[i]["gradient_quotient"] for i in (0, -1))
        return (
            f"MetaInit: {len(self.history)} steps in {self.seconds:.1f} s, gradient quotient {first:.4g} -> {last:.4g}"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON."""
        write_json(path, asdict(self))

    def plot(self, path: str | os.PathLike | None = None) -> "Picture":
        """Draw loss and gradient quotient by step, and the scale of every tensor; a path writes that as a PNG too."""
        from ..plots import plot_metainit  # matplotlib is slow to import: only who draws waits for it

        return plot_metainit(self, path)


def random_batches(input_size: tuple[int, ...], num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of inputs from N(0, 1) and of random labels: the data of a method without data.

    Args:
        input_size: Shape of the inputs, the batch size first.
        num_classes: Labels are drawn from 0 ... num_classes - 1; their shape is (batch size,).
    """
    while True:
        yield torch.randn(input_size), torch.randint(num_classes, input_size[:1])


def gradient_quotient(loss: Tensor, weights: list[Tensor], epsilon: float = 1e-5) -> Tensor:
    """GQ of a loss, differentiable by the weights; weights without gradient count as 0 in g and in H g.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> round(gradient_quotient((w * torch.tensor([3.0, 5.0])).sum() + w.square().sum(), [w]).item(), 3)
        2.0
    """
    grads = _derivative(loss, weights)
    products = _derivative(sum(g.square().sum() for g in grads) / 2, weights)
    quotients = [
        ((g - h) / (g + torch.where(g >= 0, epsilon, -epsilon)) - 1).abs().sum()
        for g, h in zip(grads, products, strict=True)
    ]
    return torch.stack(quotients).sum() / sum(w.numel() for w in weights)


def _derivative(scalar: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    if not scalar.requires_grad:
        return tuple(torch.zeros_like(w) for w in weights)
    return torch.autograd.grad(scalar, weights, create_graph=True, allow_unused=True, materialize_grads=True)


def _check_resweights(model: nn.Module) -> None:
    closed = [name for name, p in model.named_parameters() if is_resweight(name) and not p.detach().all()]
    if closed:
        raise ValueError(
            f"MetaInit has no answer for residual weights of 0 ({closed[0]} is one of {len(closed)}): the gradient g of every "
            "weight behind them is exactly 0 while H g is not, so that the quotient is |H g| / epsilon, a figure made by "
            "epsilon and not by the model; set them to another value, such as 0.1, or use gradinit_"
        )


def metainit_(
    model: nn.Module,
    batches: Iterable,
    *,
    scale_lr: float = 0.1,
    momentum: float = 0.9,
    num_steps: int = 500,
    epsilon: float = 1e-5,
    min_scale: float = 0.01,
    loss_fn: Loss | None = None,
    reduce: Reduce | None = None,
    callback: Callable[[list[dict]], None] | None = None,
    show_progress_bar: bool | None = None,
) -> MetaInitReport:
    """Scale every weight matrix of a model, in place, by sign descent with momentum on the gradient quotient.

    `v <- momentum * v - scale_lr * sign(dGQ/d||W||)` and `||W|| <- ||W|| + v` per tensor with two or more dimensions;
    the other tensors take part in the quotient only. The defaults are those of the paper's code, which has no floor.
    As in `gradinit_` dropout is off, normalisation layers use the statistics of the batch, attention is torch's math
    kernel, and the model is left alone until the end.

    Args:
        model: Any module in fp32 that can be differentiated three times.
        batches: Such as `random_batches((128, 3, 32, 32), 10)`; one per step. Real data may be given as well.
        scale_lr: Length by which the norm of a tensor changes in the first step.
        momentum: Of the descent.
        num_steps: The number of steps.
        epsilon: Keeps the denominators from zero.
        min_scale: Floor of the factors.
        loss_fn: `loss_fn(model, batch)` returns a scalar; by default the `.loss` of `model(**batch)`.
        reduce: Averages a list of tensors over processes, as in `GradInit`.
        callback: Called with the history after each step.
        show_progress_bar: As for `gradinit_`.

    Returns:
        The factors and the curve.

    Raises:
        ValueError: A residual weight is 0, the batches run out, the quotient is not finite, or any reason of
            `gradinit_` that concerns loss and parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> report = metainit_(model, random_batches((16, 3), 2), num_steps=3, loss_fn=loss_fn)
        >>> sorted(report.scales)
        ['0.weight', '2.weight']
    """
    _check_resweights(model)
    start = time.perf_counter()
    weights = trainable(model)
    trial = TrialModel(model, loss_fn)
    matrices = {name: w.detach() for name, w in weights.items() if decays(w) and w.detach().any()}
    norms = torch.tensor([w.norm().item() for w in matrices.values()], dtype=torch.float64)
    scales, velocity = torch.ones_like(norms), torch.zeros_like(norms)
    history: list[dict] = []
    with steps_bar("MetaInit", num_steps, show_progress_bar) as bar:
        for batch in islice(batches, num_steps):
            factors = dict(zip(matrices, scales.tolist(), strict=True))
            theta = {name: (w.detach() * factors.get(name, 1.0)).requires_grad_() for name, w in weights.items()}
            loss, quotient, slope = _evaluate(trial, theta, matrices, batch, epsilon, reduce)
            history.append({"loss": loss, "gradient_quotient": quotient})
            if not math.isfinite(quotient) or not slope.isfinite().all():
                raise ValueError(
                    f"MetaInit step {len(history) - 1}: loss {loss}, gradient quotient {quotient}, or its gradient"
                )
            velocity = momentum * velocity - scale_lr * slope.sign()
            scales = (scales + velocity / norms).clamp_min(min_scale)
            bar.set_postfix(quotient=f"{quotient:.3g}", refresh=False)
            bar.update()
            if callback:
                callback(history)
    if len(history) < num_steps:
        raise ValueError(f"the batches ran out after {len(history)} of {num_steps} steps; random_batches never ends")
    report = MetaInitReport(dict(zip(matrices, scales.tolist(), strict=True)), history, time.perf_counter() - start)
    with torch.no_grad():
        for name, scale in report.scales.items():
            weights[name].mul_(scale)
    return report


def _evaluate(
    trial: TrialModel,
    theta: dict[str, Tensor],
    matrices: dict[str, Tensor],
    batch,
    epsilon: float,
    reduce: Reduce | None,
) -> tuple[float, float, Tensor]:
    """Loss, gradient quotient and its derivative by the scale of every matrix, dGQ/dm_i = <dGQ/dtheta_i, W0_i>."""

    def evaluate():
        loss = trial.loss([batch])
        quotient = gradient_quotient(loss, list(theta.values()), epsilon)
        by_matrix = torch.autograd.grad(
            quotient, [theta[name] for name in matrices], allow_unused=True, materialize_grads=True
        )
        return loss.detach(), quotient.detach(), by_matrix

    with twice_differentiable_attention():
        loss, quotient, grads = trial.run(theta, evaluate)
    slope = torch.stack([(g * w).sum() for g, w in zip(grads, matrices.values(), strict=True)])
    if reduce:
        loss, quotient, slope = reduce([loss, quotient, slope])
    return loss.item(), quotient.item(), slope.cpu().double()
