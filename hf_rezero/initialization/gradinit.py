"""GradInit: learn one scale per weight tensor, so that the first optimizer step lowers the loss as much as it can.

Zhu et al. 2021, arXiv:2102.08098, Algorithm 1. With the weights theta(m) = m * W0, one scalar m_i per tensor,

    minimise over m   L(S~; theta(m) - eta * A[g]),   g = dL(S; theta(m))/dtheta,   subject to   ||g||_A <= gamma,

where A is the step of the optimizer that will train the model and S~ shares half of its examples with S. The scales
are multiplied into the weights at the end and nothing else remains.

On a ReZero model, resweight = 0, there is little to gain: every inner gradient is exactly zero, the network is the
identity, and scaling a branch changes the speed of its residual weight and no output. What GradInit then tunes is the
scale of embedding and head. It is meant for networks with norms, or with neither norms nor residual weights.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files import write_json
from ..optim.muon import orthogonal_steps
from ..optim.param_groups import output_dims
from ..structure.loss import Loss
from ..structure.parameters import decays, is_resweight
from ..structure.states import check_tensors
from .showing import scale_lines, scale_table, steps_bar
from .trial import Reduce, TrialModel, first_of, map_batch, trainable


if TYPE_CHECKING:
    from ..picture import Picture

Shape = Callable[[Tensor], Tensor]

_SIGN_STEP = ("adam", "adamw", "radam", "ranger", "lamb")
_GRADIENT_STEP = ("sgd", "sgd_normalized", "lars")
_ALGORITHMS = (*_SIGN_STEP, *_GRADIENT_STEP, "muon")
_BETAS, _EPS = (0.9, 0.999), 1e-8  # of the update of the scales, as in the official code
_MAX_DEFAULT_STEPS = 390  # the paper's: one epoch of CIFAR-10 in batches of 128


@dataclass(repr=False)
class GradInitReport:
    """What GradInit found: `print` it, `save` it as JSON, `plot` it; a notebook shows it as a table.

    Attributes:
        scales: Learned factor by tensor name.
        history: One entry per step: `loss`, `grad_norm`, `constrained`, and `trial_loss` after the trial step (`None`
            where the constraint was active).
        algorithm, eta, gamma: Those of the run.
        seconds: Wall time of all steps.
    """

    scales: dict[str, float]
    history: list[dict]
    algorithm: str
    eta: float
    gamma: float
    seconds: float

    @property
    def constrained_steps(self) -> int:
        """In how many steps the gradient norm was above gamma."""
        return sum(entry["constrained"] for entry in self.history)

    def __str__(self) -> str:
        return "\n".join([self._summary(), *scale_lines(self.scales)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return scale_table(self._summary(), self.scales)

    def _summary(self) -> str:
        lines = [
            f"GradInit for {self.algorithm}, eta={self.eta:g}, gamma={self.gamma:.4g}: {len(self.history)} steps in "
            f"{self.seconds:.1f} s, constraint active in {self.constrained_steps}"
        ]
        if self.history:
            first, last = self.history[0], self.history[-1]
            lines += [f"{key}: {first[key]:.4g} -> {last[key]:.4g}" for key in ("loss", "grad_norm")]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON."""
        write_json(path, {**asdict(self), "constrained_steps": self.constrained_steps})

    def plot(self, path: str | os.PathLike | None = None) -> "Picture":
        """Draw loss and gradient norm by step, and the scale of every tensor; a path writes that as a PNG too."""
        from ..plots import plot_gradinit  # matplotlib is slow to import: only who draws waits for it

        return plot_gradinit(self, path)


def _tensors(scales: Tensor, moments: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """What a state holds, by names for a message."""
    return {"scales": scales} | {
        f"moment {i} of {branch}": m for branch, ms in moments.items() for i, m in enumerate(ms)
    }


def _rows(batch: Any) -> int:
    sizes = []
    map_batch(lambda tensor: sizes.append(len(tensor)) if tensor.ndim else None, batch)
    if not sizes or sizes[0] < 2:
        raise ValueError(
            f"a batch needs at least 2 examples along dimension 0 of its tensors, got {sizes[0] if sizes else 'none'}: "
            "half of them are shared by consecutive evaluations"
        )
    return sizes[0]


def half_overlap(batch: Any, fresh: Any) -> list:
    """The batch S~ of Algorithm 1: every second example of `batch`, and of `fresh` those in between.

    Interleaved, because so it is the same S~ for any number of processes that share a batch.

    A batch is cut along dimension 0 of every tensor that has as many rows as its first tensor; all else is kept whole.

    Returns:
        One joined batch; or the two halves, whose losses are to be averaged, where their other dimensions differ (as
        with padding to the longest).

    Raises:
        ValueError: A batch has fewer than 2 examples.

    Example:
        >>> half_overlap((torch.arange(4),), (torch.arange(10, 14),))
        [(tensor([ 1,  3, 10, 12]),)]
    """
    old, new = _rows(batch), _rows(fresh)
    fits = []
    map_batch(lambda a, b: fits.append(a.shape[1:] == b.shape[1:]), batch, fresh)
    if all(fits):
        join = lambda a, b: torch.cat([a[1::2], b[::2]]) if a.ndim and len(a) == old else a  # noqa: E731
        return [map_batch(join, batch, fresh)]
    last = map_batch(lambda a: a[1::2] if a.ndim and len(a) == old else a, batch)
    return [last, map_batch(lambda b: b[::2] if b.ndim and len(b) == new else b, fresh)]


def _stack(scalars: Iterable[Tensor]) -> Tensor:
    """A vector of scalars that may lie on several devices."""
    scalars = list(scalars)
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def _vector(scalars: Iterable[Tensor]) -> Tensor:
    return _stack(scalars).cpu().double()


def default_gamma(algorithm: str, eta: float) -> float:
    """The bound at which the first-order decrease of the loss by one trial step is 0.1 (the paper's rule).

    That decrease is eta <g, A[g]>: eta ||g||_2^2 for the step g, and eta ||g|| for every other step, each in its norm.
    """
    return math.sqrt(0.1 / eta) if algorithm == "sgd" else 0.1 / eta


def _orthogonal(grad: Tensor, output_dim: int) -> Tensor:
    """The step that Muon takes from rest, at a learning rate of 1."""
    factor, (step,) = orthogonal_steps([grad], output_dim)
    return factor * step.to(grad.dtype)


def _shapes(algorithm: str, model: nn.Module, weights: Iterable[Tensor]) -> list[Shape]:
    """f_i of each tensor: the identity, the sign, or Muon's step on the weights that `param_groups` lets it take."""
    if algorithm in _GRADIENT_STEP:
        return [lambda grad: grad for _ in weights]
    dims = output_dims(model) if algorithm == "muon" else {}
    return [partial(_orthogonal, output_dim=dims[w]) if w in dims and decays(w) else torch.sign for w in weights]


def _sizes(shape: Shape, grad: Tensor) -> tuple[Tensor, Tensor]:
    """<f(g), g> and ||f(g)||."""
    direction = shape(grad)
    return torch.dot(direction.flatten(), grad.flatten()), direction.norm()


class _Geometry(NamedTuple):
    """||g||_A, and the factors of f_i(g_i), see `_shapes`, in its derivative by g_i and in the trial step."""

    norm: float
    dual: Tensor
    step: Tensor
    trust_slope: Tensor  # d||g||_A/dm_i through the trust ratio alone
    smallest: float  # the length along d||g||_A/dg that fp numbers can still tell from 0


class NonFiniteStepError(ValueError):
    """A step of GradInit met infinity or NaN, and was not taken."""


class GradInit:
    """Algorithm 1 of GradInit, one step at a time: what `gradinit_` loops over.

    The model is left alone until `fold_()`. Arguments are those of `gradinit_`; the object can be saved in the middle.

    Example:
        >>> model, loss_fn = nn.Linear(3, 1), lambda model, batch: model(batch).square().mean()
        >>> init = GradInit(model, eta=0.01, loss_fn=loss_fn)
        >>> first, second = torch.randn(2, 4, 3)
        >>> init.step(first, half_overlap(first, second))
        >>> again = GradInit(model, eta=0.01, loss_fn=loss_fn)
        >>> again.load_state_dict(init.state_dict())
        >>> again.report().scales == init.report().scales
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eta: float,
        algorithm: str = "adam",
        gamma: float | None = None,
        scale_lr: float = 1e-2,
        min_scale: float = 0.01,
        max_scale: float = 10.0,
        scale_clip: float = 1.0,
        trust_coefficient: float = 1e-3,
        second_order: str = "finite_difference",
        epsilon: float = 1e-3,
        probe_resweight: float | None = None,
        loss_fn: Loss | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"algorithm must be one of {_ALGORITHMS}, got {algorithm!r}")
        if second_order not in ("finite_difference", "double_backward"):
            raise ValueError(f"second_order must be 'finite_difference' or 'double_backward', got {second_order!r}")
        for name, value in {"eta": eta, "gamma": gamma, "scale_lr": scale_lr, "epsilon": epsilon}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not 0 < min_scale <= 1 <= max_scale:
            raise ValueError(f"0 < min_scale <= 1 <= max_scale must hold, got {min_scale} and {max_scale}")
        self.algorithm, self.eta = algorithm, eta
        self.gamma = default_gamma(algorithm, eta) if gamma is None else gamma
        self.scale_lr, self.min_scale, self.max_scale, self.scale_clip = scale_lr, min_scale, max_scale, scale_clip
        self.trust_coefficient, self.second_order, self.epsilon = trust_coefficient, second_order, epsilon
        self.probe_resweight = probe_resweight
        self.reduce = reduce or (lambda tensors: tensors)
        self.weights = trainable(model)
        self.shapes = _shapes(algorithm, model, self.weights.values())
        self.trial = TrialModel(model, loss_fn)
        self.precision = max(torch.finfo(p.dtype).eps for p in self.weights.values())
        self.scaled = [not is_resweight(n) and bool(p.detach().any()) for n, p in self.weights.items()]
        if not any(self.scaled):
            raise ValueError("nothing to scale: every trainable tensor is zero or a residual weight")
        # Trust ratios as the optimizers have them: on matrices only.
        self.trusted = torch.tensor([s and decays(p) for s, p in zip(self.scaled, self.weights.values(), strict=True)])
        # In double precision on the CPU, and 1 for what is not scaled: the same on every process, device and resume.
        self.scales = torch.ones(len(self.weights), dtype=torch.float64)
        # Of each branch: first moment, second moment, number of updates.
        zero = torch.zeros_like(self.scales)
        self.moments = {branch: [zero, zero, zero.new_zeros(())] for branch in ("objective", "constraint")}
        self.history: list[dict] = []
        self.seconds = 0.0
        self._folded = False

    def step(self, batch: Any, trial_batches: Sequence) -> None:
        """One iteration of Algorithm 1.

        Args:
            batch: S, the batch of the gradient.
            trial_batches: S~, the batches whose mean loss is taken after the trial step, as `half_overlap` gives them.

        Raises:
            ValueError: There is no loss.
            NonFiniteStepError: Loss, gradient norm or a scale gradient is not finite; the state is that before the step.

        Warns:
            UserWarning: Tensors without gradient, in the first step.
        """
        if self._folded:
            raise RuntimeError("the scales are in the weights already; make a new GradInit to go on from them")
        start = time.perf_counter()
        theta = self._theta()
        loss, grads = self._gradient(theta, batch)
        geometry = self._geometry(theta, grads)
        self._check_finite(["loss", "gradient norm"], [loss, geometry.norm])
        constrained = geometry.norm > self.gamma
        if constrained:
            trial_loss, slope = None, self._constraint_slope(theta, loss, grads, geometry, batch)
        else:
            trial_loss, slope = self._objective_slope(theta, grads, geometry, trial_batches)
        self._check_finite([f"scale gradient of {name}" for name in self.weights], slope)
        self._update("constraint" if constrained else "objective", slope)
        entry = {"loss": loss, "grad_norm": geometry.norm, "constrained": constrained, "trial_loss": trial_loss}
        self.history.append(entry)
        self.seconds += time.perf_counter() - start

    def fold_(self) -> GradInitReport:
        """Multiply the scales into the weights, W <- m * W0, in place, and return the report.

        Warns:
            UserWarning: The constraint was active in no step or in all of them.
        """
        if self._folded:
            raise RuntimeError("the scales are in the weights already")
        report = self.report()
        self._warn_about_gamma(report)
        with torch.no_grad():
            for name, scale in report.scales.items():
                self.weights[name].mul_(scale)
        self._folded = True
        return report

    def report(self) -> GradInitReport:
        """The state of the run so far."""
        pairs = zip(self.weights, self.scales.tolist(), self.scaled, strict=True)
        scales = {name: scale for name, scale, scaled in pairs if scaled}
        return GradInitReport(scales, list(self.history), self.algorithm, self.eta, self.gamma, self.seconds)

    def state_dict(self) -> dict:
        """What a later `GradInit` on the same unscaled model needs to go on to the bit: tensors, numbers, names."""
        return {
            "names": list(self.weights),
            "scales": self.scales.clone(),
            "moments": {branch: [m.clone() for m in moments] for branch, moments in self.moments.items()},
            "history": [dict(entry) for entry in self.history],
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where another run stopped.

        Raises:
            ValueError: The state is that of a model with other tensors, or holds numbers that are not finite.
        """
        if state["names"] != list(self.weights):
            other = sorted(set(state["names"]) ^ set(self.weights))
            raise ValueError(f"the state is that of another model; tensors of only one of the two: {first_of(other)}")
        check_tensors(_tensors(state["scales"], state["moments"]), _tensors(self.scales, self.moments), "the state")
        self.scales = state["scales"].clone()
        self.moments = {branch: [m.clone() for m in moments] for branch, moments in state["moments"].items()}
        self.history = [dict(entry) for entry in state["history"]]
        self.seconds = state["seconds"]

    @torch.no_grad()
    def _theta(self) -> dict[str, Tensor]:
        """m * W0 for what is scaled, copies of the rest, as leaves."""
        theta = {n: w * m for (n, w), m in zip(self.weights.items(), self.scales.tolist(), strict=True)}
        if self.probe_resweight is not None:
            theta |= {n: torch.full_like(w, self.probe_resweight) for n, w in theta.items() if is_resweight(n)}
        return {name: weight.requires_grad_() for name, weight in theta.items()}

    def _gradient(self, theta: dict[str, Tensor], batch: Any) -> tuple[float, list[Tensor]]:
        """Loss and gradient at theta, averaged over the processes."""
        loss, grads = self.trial.gradient(theta, [batch])
        unused = [name for name, grad in zip(theta, grads, strict=True) if grad is None]
        if unused and not self.history:
            warnings.warn(f"the loss does not depend on these parameters: {first_of(unused)}", stacklevel=4)
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(theta.values(), grads, strict=True)]
        loss, *grads = self.reduce([loss, *filled])
        return loss.item(), grads

    @torch.no_grad()
    def _geometry(self, theta: dict[str, Tensor], grads: list[Tensor]) -> _Geometry:
        """||g||_A = <g, A[g]> / eta, but ||g||_2 for the step g; with the trust ratios of LARS and LAMB inside A."""
        inner, length = map(_vector, zip(*map(_sizes, self.shapes, grads), strict=True))
        weight = _vector(w.norm() for w in theta.values())
        one = torch.ones_like(inner)
        if self.algorithm in ("sgd", "sgd_normalized"):
            norm = inner.sum().sqrt()
            dual = one / norm.clamp_min(1e-300)
            step = one if self.algorithm == "sgd" else dual
            return _Geometry(norm.item(), dual, step, 0 * one, self._smallest(weight, dual * length))
        trusted = self.trusted & (length > 0) & (self.algorithm in ("lars", "lamb"))
        coefficient = self.trust_coefficient if self.algorithm == "lars" else 1.0
        step = torch.where(trusted, coefficient * weight / length, one)
        # Where LARS takes the plain step g, its part of the norm is ||g_i||^2, with the derivative 2 g_i.
        dual = torch.where(trusted, step, 2 * one) if self.algorithm == "lars" else step
        trust_slope = torch.where(trusted, step * inner / self.scales, 0 * one)
        smallest = self._smallest(weight, dual * length)
        return _Geometry((step * inner).sum().item(), dual, step, trust_slope, smallest)

    def _smallest(self, weight: Tensor, direction: Tensor) -> float:
        return 0.1 * self.precision * (weight.norm() / direction.norm().clamp_min(1e-300)).item()

    def _objective_slope(
        self, theta: dict[str, Tensor], grads: list[Tensor], geometry: _Geometry, batches: Sequence
    ) -> tuple[float, Tensor]:
        """dL(S~; theta - eta A[g])/dm, the trial step taken as a constant."""
        self._move_(theta, grads, -self.eta * geometry.step)
        return self._slope(theta, batches)

    def _constraint_slope(
        self, theta: dict[str, Tensor], loss: float, grads: list[Tensor], geometry: _Geometry, batch: Any
    ) -> Tensor:
        """d||g||_A/dm_i = <(H u)_i, W0_i> with u = d||g||_A/dg, plus the part of the trust ratios.

        f(g) counts as constant in u: d<f(g), g> = <f(g), dg> for the sign as for U V^T, whose norms these are dual to.
        """
        if self.second_order == "double_backward":
            dual = [c * f(g) for c, f, g in zip(geometry.dual.tolist(), self.shapes, grads, strict=True)]
            product = self.trial.hessian_product(theta, [batch], dual)
            (slope,) = self.reduce([self._inner(product)])
            return slope.cpu().double() + geometry.trust_slope
        # H u = (g(theta + e u) - g(theta)) / e: ordinary backward passes, so every attention kernel can be used.
        before = self._inner(grads).cpu().double()
        # <u, g> = ||g||_A: the loss changes by the fraction self.epsilon of itself.
        epsilon = max(self.epsilon * abs(loss) / geometry.norm, geometry.smallest)
        self._move_(theta, grads, epsilon * geometry.dual)
        _, after = self._slope(theta, [batch])
        return (after - before) / epsilon + geometry.trust_slope

    @torch.no_grad()
    def _move_(self, theta: dict[str, Tensor], grads: list[Tensor], lengths: Tensor) -> None:
        """theta_i += length_i * f_i(g_i) in place; the gradients are freed before the next backward pass."""
        for weight, shape, grad, length in zip(theta.values(), self.shapes, grads, lengths.tolist(), strict=True):
            weight.add_(shape(grad), alpha=length)
        grads.clear()

    def _slope(self, theta: dict[str, Tensor], batches: Sequence) -> tuple[float, Tensor]:
        """The mean loss of the batches and its derivative by the scales, dL/dm_i = <dL/dtheta_i, W0_i>."""
        loss, grads = self.trial.gradient(theta, batches)
        loss, slope = self.reduce([loss, self._inner(grads)])
        return loss.item(), slope.cpu().double()

    @torch.no_grad()
    def _inner(self, grads: Sequence[Tensor | None]) -> Tensor:
        """<g_i, W0_i> of the scaled tensors, 0 of the others; shape (number of tensors,)."""
        weights = list(self.weights.values())
        return _stack(
            torch.dot(g.flatten(), w.flatten()) if scaled and g is not None else w.new_zeros(())
            for g, w, scaled in zip(grads, weights, self.scaled, strict=True)
        )

    def _update(self, branch: str, slope: Tensor) -> None:
        """Adam on the scales, with its own moments for the objective and for the constraint."""
        slope = slope.clamp(-self.scale_clip, self.scale_clip)
        first, second, count = self.moments[branch]
        first, second, count = first.lerp(slope, 1 - _BETAS[0]), second.lerp(slope**2, 1 - _BETAS[1]), count + 1
        self.moments[branch] = [first, second, count]
        step = first / (1 - _BETAS[0] ** count) / ((second / (1 - _BETAS[1] ** count)).sqrt() + _EPS)
        moved = (self.scales - self.scale_lr * step).clamp(self.min_scale, self.max_scale)
        self.scales = torch.where(torch.tensor(self.scaled), moved, self.scales)

    def _check_finite(self, names: Sequence[str], values: Iterable[float]) -> None:
        bad = [
            f"{name} is {value}"
            for name, value in zip(names, map(float, values), strict=True)
            if not math.isfinite(value)
        ]
        if bad:
            raise NonFiniteStepError(
                f"GradInit step {len(self.history)}: {first_of(bad)}; check the data and the loss, or start from smaller weights"
            )

    def _warn_about_gamma(self, report: GradInitReport) -> None:
        norms = [entry["grad_norm"] for entry in report.history]
        if norms and report.constrained_steps == 0:
            warnings.warn(
                f"the gradient norm, at most {max(norms):.4g}, never reached gamma={self.gamma:.4g} in {len(norms)} "
                "steps: nothing but max_scale kept the scales from growing; a smaller gamma would bind",
                stacklevel=4,
            )
        if norms and report.constrained_steps == len(norms):
            warnings.warn(
                f"the gradient norm, at least {min(norms):.4g}, was above gamma={self.gamma:.4g} in all {len(norms)} "
                "steps: the loss after a trial step was never looked at; take more steps, a larger scale_lr or gamma",
                stacklevel=4,
            )


def _cycle(batches: Iterable) -> Iterator:
    """The batches again and again, or once if they can be iterated over once only or are fewer than two."""
    while True:
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007
            yield batch
        if count < 2 or isinstance(batches, Iterator):
            return


def gradinit_(
    model: nn.Module,
    batches: Iterable,
    *,
    eta: float,
    algorithm: str = "adam",
    gamma: float | None = None,
    scale_lr: float = 1e-2,
    num_steps: int | None = None,
    min_scale: float = 0.01,
    max_scale: float = 10.0,
    loss_fn: Loss | None = None,
    callback: Callable[[GradInit], None] | None = None,
    show_progress_bar: bool | None = None,
    **options,
) -> GradInitReport:
    """Scale every weight tensor of a model, in place, so that the first step of the optimizer helps most.

    Algorithm 1 of GradInit (Zhu et al. 2021, arXiv:2102.08098). Every trainable tensor is in the gradient norm and in
    the trial step; every one with a non-zero norm, tied ones once, gets a scale, except residual weights. Dropout is
    off (so is the gradient checkpointing of Hugging Face models, which their eval mode switches off) and normalisation
    layers use the statistics of the batch, without touching the running ones. Parameters in fp32; autocast belongs
    into `loss_fn`.

    Args:
        model: Any module; it is changed at the very end only, and not at all after an exception.
        batches: Mappings for models whose output has a `.loss`; with `loss_fn` also tensors, tuples and lists. Each
            step takes a batch as S, and half of it with half of the next one as S~
            (`half_overlap`). Anything but an iterator is started again when it ends.
        eta: Learning rate of the training to come.
        algorithm: Its optimizer, which gives A[g] and the norm. "adam", "adamw", "radam", "ranger": sign(g), L1.
            "sgd": g, L2, the paper's. "sgd_normalized": g / ||g||_2, L2, the official code's. "lars", "lamb": g or
            sign(g) times the trust ratio, on matrices; the norm is sum_i ||W_i|| ||g_i|| times the trust coefficient,
            or sum_i ||W_i|| ||g_i||_1 / ||sign(g_i)||_2. "muon": 0.2 sqrt(max(rows, columns)) U V^T of g = U S V^T for
            weights of linear and convolution layers, by the iteration of `Muon`, and sign(g) for the rest; the norm is
            <g, A[g]>, so that factor times the nuclear norm, and L1. Its gradient takes A[g] as constant, as for the
            sign: exact for U V^T; the iteration gives one about 0.9 times as long, within a cosine of 0.999.
        gamma: Bound of the gradient norm; by default eta * gamma = 0.1, for "sgd" eta * gamma^2 = 0.1.
        scale_lr: Learning rate of the scales (Adam). The official runs use 1e-3 to 1e-1, by architecture.
        num_steps: By default one pass over the batches, at most 390 steps.
        min_scale: Floor of the scales.
        max_scale: Ceiling of the scales.
        loss_fn: `loss_fn(model, batch)` returns a scalar.
        callback: Called with the `GradInit` object after each step, e.g. to log `init.history[-1]`.
        show_progress_bar: Whether to show one; default: in a terminal and in a notebook, and not where the output is a
            file.
        **options: Further ones of `GradInit`. `scale_clip=1.0` bounds each scale's gradient. `second_order` is
            "finite_difference" of ordinary gradients or "double_backward", exact, which needs twice differentiable
            operations and has torch take math attention. `epsilon=1e-3` is the size of the finite difference, the
            fraction by which it changes the loss; the gradient of a deep ReLU network jumps, and 1e-2 averages over
            more jumps; under bf16 autocast take 1e-2 as well.
            `probe_resweight` replaces the trainable residual weights during the search: at 0 inner gradients vanish.
            `trust_coefficient=1e-3` is that of LARS. `reduce` averages a list of tensors over processes, e.g.
            `mean_over_processes`: every process then ends with the same scales.

    Returns:
        The scales, the curve, how often the constraint was active, the wall time.

    Raises:
        ValueError: No loss, batches that run out, loss or gradient that is not finite, a parameter that is integer,
            quantised, half precision or sharded, no trainable parameter, or an argument out of range.

    Warns:
        UserWarning: Frozen parameters, parameters without gradient, a gamma that never or always binds.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(4, 16, 3)]
        >>> loss_fn = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        >>> report = gradinit_(model, batches, eta=0.1, algorithm="sgd", scale_lr=0.05, num_steps=20, loss_fn=loss_fn)
        >>> sorted(report.scales)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    limits = {"min_scale": min_scale, "max_scale": max_scale}
    init = GradInit(
        model, eta=eta, algorithm=algorithm, gamma=gamma, scale_lr=scale_lr, loss_fn=loss_fn, **limits, **options
    )
    source = batches if num_steps is None else _cycle(batches)
    steps = _MAX_DEFAULT_STEPS if num_steps is None else num_steps
    with steps_bar("GradInit", num_steps, show_progress_bar) as bar:
        for batch, fresh in islice(pairwise(source), steps):
            init.step(batch, half_overlap(batch, fresh))
            bar.set_postfix(loss=f"{init.history[-1]['loss']:.3g}", refresh=False)
            bar.update()
            if callback:
                callback(init)
    if len(init.history) < (num_steps or 1):
        raise ValueError(
            f"the batches ran out after {len(init.history)} of {num_steps or 1} steps; a step needs a batch and the one "
            "after it: pass a DataLoader or a list of at least two, or an iterator of num_steps + 1"
        )
    return init.fold_()
