"""What a network tells about its depth: the spectrum of its Jacobian, its gradients and its residual weights."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..notebook import html_table


if TYPE_CHECKING:
    from ..picture import Picture

PER_EXAMPLE = ("attention_mask", "token_type_ids", "position_ids")


class JacobianMoments(NamedTuple):
    """The mean squared singular value of each example, and the standard error of the estimate, (B,) each."""

    mean_square: Tensor
    standard_error: Tensor


class JacobianBounds(NamedTuple):
    """Bounds of the extreme singular values of each example, (B,) each.

    The largest singular value is at least `largest` and the smallest at most `smallest`; some singular value lies
    within the residual of either.
    """

    largest: Tensor
    largest_residual: Tensor
    smallest: Tensor
    smallest_residual: Tensor


class JacobianSpectrum(Tensor):
    """Singular values (B, n) that `plot` draws and a notebook shows as a table; what is computed with them is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def plot(self, path: str | os.PathLike | None = None) -> "Picture":
        """Draw the histogram of all of them; a path writes that as a PNG too."""
        from ..plots import plot_jacobian  # matplotlib is slow to import: only who draws waits for it

        return plot_jacobian({"": {"": self.flatten().tolist()}}, path)

    def _repr_html_(self) -> str:
        rows = [
            [str(i), f"{s.max():.4g}", f"{s.square().mean():.4g}", f"{s.min():.4g}"]
            for i, s in enumerate(self.as_subclass(Tensor))
        ]
        head = ["example", "largest", "mean square", "smallest"]
        return html_table(f"{self.shape[1]} singular values of each example", head, rows)

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # saved as a plain tensor


def jacobian_spectrum(
    function: Callable, inputs: Tensor | Mapping[str, Tensor], *, chunk_size: int = 64
) -> JacobianSpectrum:
    """The singular values of the input-output Jacobian J = d vec(y) / d vec(x), example by example, in float64.

    A network through which signals pass at any depth has them all near 1; ReZero starts at exactly 1 (Bachlechner et
    al. 2020, arXiv:2003.04887, section 5.1 and figure 5). J is computed whole and takes 8 n_out n_in bytes for one
    example: see `jacobian_moments` and `jacobian_bounds` for more than some thousand inputs.

    A module is not touched: a float64 copy of it in eval mode is used, without dropout. Parts that compute in fp32
    whatever comes, such as the RMSNorm of Llama, leave singular values below 1e-7 of the largest to rounding.

    Args:
        function: A module, or any function of a batch in float64 that returns a batch; each example is its own.
        inputs: A floating-point tensor (B, ...), or for Hugging Face models a batch: `input_ids` (B, T) or
            `inputs_embeds` (B, T, D), taken from the embeddings to the last hidden state, or `pixel_values`
            (B, C, H, W), taken to the logits.
        chunk_size: Rows of J that are computed at a time; 1 for functions that cannot be vectorised.

    Returns:
        Singular values (B, min(n_out, n_in)) in descending order, float64.

    Raises:
        TypeError: The inputs are not floating point, or the function does not return one tensor.
        ValueError: Batch norm in training mode or other coupling between examples, padding, a batch without a known
            key, an output that does not depend on the inputs, or a Jacobian that is not finite.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM
        >>> from hf_rezero.diagnostics import jacobian_spectrum
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=8, num_hidden_layers=32, num_attention_heads=2))
        >>> sigma = jacobian_spectrum(model, {"input_ids": torch.arange(8).view(2, 4)})
        >>> sigma.shape, sigma.min().item(), sigma.max().item()
        (torch.Size([2, 32]), 1.0, 1.0)
    """
    if chunk_size < 1:
        raise ValueError(f"got chunk_size={chunk_size}: expected at least 1.")
    values = torch.stack([_singular_values(point, chunk_size) for point in _points(function, inputs)])
    return values.as_subclass(JacobianSpectrum)


def jacobian_moments(
    function: Callable,
    inputs: Tensor | Mapping[str, Tensor],
    *,
    num_samples: int = 64,
    seed: int = 0,
    chunk_size: int = 16,
) -> JacobianMoments:
    """An estimate of the mean squared singular value ||J||_F^2 / min(n_out, n_in), for models of any size.

    With random signs u, E ||J^T u||^2 = ||J||_F^2 (Hutchinson 1989): `num_samples` backward passes for each example.

    Args:
        function: As in `jacobian_spectrum`.
        inputs: As in `jacobian_spectrum`.
        num_samples: Random vectors for each example, at least 2.
        seed: Of these vectors; the global random state is left alone.
        chunk_size: Backward passes at a time; 1 for functions that cannot be vectorised.

    Raises:
        TypeError, ValueError: As `jacobian_spectrum`, or fewer than 2 samples.

    Example:
        >>> import torch
        >>> from hf_rezero.diagnostics import jacobian_moments
        >>> [value.item() for value in jacobian_moments(lambda x: 3 * x, torch.randn(1, 5))]
        [9.0, 0.0]
    """
    if num_samples < 2 or chunk_size < 1:
        raise ValueError(f"got {num_samples=}, {chunk_size=}: expected at least 2 samples and chunks of at least 1.")
    generator = torch.Generator().manual_seed(seed)
    moments = []
    for point in _points(function, inputs):
        signs = torch.randint(0, 2, (num_samples, point.num_outputs), generator=generator).to(point.x) * 2 - 1
        squares = torch.cat([point.vjp(u).square().sum(1) for u in signs.split(chunk_size)])
        squares /= min(point.num_outputs, point.num_inputs)
        moments.append(torch.stack((squares.mean(), squares.std() / num_samples**0.5)))
    return JacobianMoments(*torch.stack(moments, dim=1))


def jacobian_bounds(
    function: Callable, inputs: Tensor | Mapping[str, Tensor], *, num_steps: int = 32, seed: int = 0
) -> JacobianBounds:
    """Bounds of the largest and the smallest singular value by products with J and J^T alone, for models of any size.

    Golub-Kahan bidiagonalisation J V = U B with full reorthogonalisation (Golub and Kahan 1965): the singular values
    of B lie between those of J, and each is within its residual of one of them. `num_steps` = min(n_out, n_in) is
    exact. The largest converges in few steps; the smallest does only where it stands apart, so look at its residual.

    Args:
        function: As in `jacobian_spectrum`, and twice differentiable.
        inputs: As in `jacobian_spectrum`.
        num_steps: Pairs of products for each example; memory grows by n_out + n_in numbers each.
        seed: Of the first vector; the global random state is left alone.

    Raises:
        TypeError, ValueError: As `jacobian_spectrum`, or `num_steps` below 1.

    Example:
        >>> import torch
        >>> from hf_rezero.diagnostics import jacobian_bounds
        >>> bounds = jacobian_bounds(lambda x: x * torch.tensor([5.0, 2.0, 0.5]), torch.randn(1, 3))
        >>> round(bounds.largest.item(), 6), round(bounds.smallest.item(), 6)
        (5.0, 0.5)
    """
    if num_steps < 1:
        raise ValueError(f"got num_steps={num_steps}: expected at least 1.")
    generator = torch.Generator().manual_seed(seed)
    bounds = []
    for point in _points(function, inputs):
        forward, backward = point.jvp, point.vjp
        if point.num_inputs > point.num_outputs:  # else the null space of J would hide its smallest singular value
            forward, backward = backward, forward
        size = min(point.num_inputs, point.num_outputs)
        start = torch.randn(size, generator=generator, dtype=torch.float64).to(point.x.device)
        values, residuals = _golub_kahan(forward, backward, start, num_steps)
        bounds.append(torch.stack((values[0], residuals[0], values[-1], residuals[-1])))
    return JacobianBounds(*torch.stack(bounds, dim=1))


class _Linearisation:
    """A function at one example, x -> y, and products with its Jacobian, all from the graph of one forward pass."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.x = x.detach().requires_grad_()
        # the fused attention kernels cannot be differentiated twice, nor vectorised
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self.y = _checked_output(function(self.x), len(x))
        if not self.y.requires_grad:
            raise ValueError("the output does not depend on the inputs, or was computed without gradient.")
        self.num_inputs, self.num_outputs = self.x.numel(), self.y.numel()
        self._transposed = None

    def vjp(self, rows: Tensor) -> Tensor:
        """U J for U (k, n_out): (k, n_in)."""
        return _products(self.y, self.x, rows)

    def jvp(self, rows: Tensor) -> Tensor:
        """V J^T for V (k, n_in): (k, n_out), as the derivative of J^T u by u, which is linear in u."""
        if self._transposed is None:
            u = torch.zeros_like(self.y, requires_grad=True)
            (product,) = torch.autograd.grad(self.y, self.x, u, create_graph=True, materialize_grads=True)
            self._transposed = product, u
        return _products(*self._transposed, rows)


def _products(y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    # a single row goes without vmap, which does not know every operation
    if len(rows) == 1:
        (product,) = torch.autograd.grad(y, x, rows.view_as(y), retain_graph=True, materialize_grads=True)
    else:
        rows = rows.view(-1, *y.shape)
        (product,) = torch.autograd.grad(y, x, rows, retain_graph=True, materialize_grads=True, is_grads_batched=True)
    return product.detach().reshape(len(rows), -1)


def _checked_output(y: Any, count: int) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(
            f"the function returned a {type(y).__name__}: pass one that returns a tensor, or for a Hugging Face model "
            "a batch with input_ids, inputs_embeds or pixel_values."
        )
    if y.dtype != torch.float64:
        raise TypeError(f"the function returned {y.dtype} for float64: what it holds must be float64 too.")
    if not y.ndim or len(y) != count:
        raise ValueError(f"the output has the shape {tuple(y.shape)} for {count} examples: expected one row for each.")
    return y


def _points(function: Callable, inputs: Tensor | Mapping[str, Tensor]) -> Iterator[_Linearisation]:
    """The linearisation at each example, one at a time."""
    model = _float64_copy(function) if isinstance(function, nn.Module) else function
    forward, x = _bind(model, inputs)
    if not len(x):
        raise ValueError("there is no example in the batch.")
    together = None
    if len(x) > 1:
        with torch.no_grad():
            together = _checked_output(forward(x, slice(None)), len(x))
    for i in range(len(x)):
        rows = slice(i, i + 1)
        point = _Linearisation(lambda e, rows=rows: forward(e, rows), x[rows])
        if together is not None and not torch.allclose(together[rows], point.y, rtol=1e-6, atol=1e-8):
            raise ValueError(
                f"the output of example {i} depends on the others of the batch or on chance: the function must treat "
                "every example by itself (batch norm: call eval() first)."
            )
        yield point


def _float64_copy(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"{name or 'the module'} is a {type(module).__name__} in training mode, whose statistics couple the "
                "examples of a batch: call eval() first, and its running statistics are used."
            )
    return copy.deepcopy(model).double().eval()


def _bind(model: Callable, inputs: Tensor | Mapping[str, Tensor]) -> tuple[Callable[[Tensor, slice], Tensor], Tensor]:
    """A function of some examples and of where they stand in the batch, and all examples, in float64."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            raise TypeError(f"inputs of {inputs.dtype} have no derivative: pass token ids as {{'input_ids': ...}}.")
        return lambda x, rows: model(x), inputs.double()
    if not isinstance(inputs, Mapping) or not isinstance(model, nn.Module):
        raise TypeError(
            f"got inputs of type {type(inputs).__name__} for a {type(model).__name__}: expected a tensor, or a batch "
            "for a Hugging Face model."
        )
    if "pixel_values" in inputs:
        return lambda x, rows: model(pixel_values=x).logits, inputs["pixel_values"].double()
    return _bind_text(model, inputs)


def _bind_text(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Callable[[Tensor, slice], Tensor], Tensor]:
    base = getattr(model, "base_model", model)
    mask = inputs.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("attention_mask has zeros: cut the examples to the same length, without padding.")
    if "inputs_embeds" in inputs:
        x = inputs["inputs_embeds"].double()
    elif "input_ids" in inputs:
        with torch.no_grad():
            embed: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue] a method
            x = embed(inputs["input_ids"])
    else:
        raise ValueError(
            f"the batch has the keys {sorted(inputs)}: expected input_ids, inputs_embeds or pixel_values among them."
        )
    others = {key: inputs[key] for key in PER_EXAMPLE if inputs.get(key) is not None}

    def forward(x: Tensor, rows: slice) -> Tensor:
        return base(inputs_embeds=x, **{key: value[rows] for key, value in others.items()}).last_hidden_state

    return forward, x


def _singular_values(point: _Linearisation, chunk_size: int) -> Tensor:
    is_wide = point.num_outputs <= point.num_inputs
    product, size = (point.vjp, point.num_outputs) if is_wide else (point.jvp, point.num_inputs)
    basis = torch.eye(size, dtype=torch.float64, device=point.x.device)
    jacobian = torch.cat([product(rows) for rows in basis.split(chunk_size)])
    if not jacobian.isfinite().all():
        raise ValueError("the Jacobian is not finite: the model has overflowed at this input.")
    return torch.linalg.svdvals(jacobian)


def _golub_kahan(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], v: Tensor, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Singular values of the bidiagonal B, descending, and the residual of each, 0 once the space is exhausted.

    A v_k = beta_{k-1} u_{k-1} + alpha_k u_k,    A^T u_k = alpha_k v_k + beta_k v_{k+1};    A is m x n with n <= m.
    """
    right, left, alphas, betas = [v / v.norm()], [], [], []
    for _ in range(min(num_steps, len(v))):
        p, alpha = _orthogonalised(forward(right[-1][None])[0], left)
        alphas.append(alpha)
        # rounding alone is left of a vector this small
        tiny = torch.finfo(torch.float64).eps * len(v) * max(alphas + betas)
        if alpha <= tiny:
            betas.append(0.0)
            break
        left.append(p / alpha)
        q, beta = _orthogonalised(backward(left[-1][None])[0], right)
        is_exhausted = beta <= tiny or len(right) == len(v)
        betas.append(0.0 if is_exhausted else beta)
        if is_exhausted:
            break
        right.append(q / beta)
    bidiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    bidiagonal += torch.diag(torch.tensor(betas[:-1], dtype=torch.float64), diagonal=1)
    vectors, values, _ = torch.linalg.svd(bidiagonal)
    return values, betas[-1] * vectors[-1].abs()


def _orthogonalised(vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, float]:
    """What is left of the vector across the basis, and its norm; twice is enough (Giraud et al. 2005)."""
    if basis:
        matrix = torch.stack(basis)
        for _ in range(2):
            vector = vector - matrix.T @ (matrix @ vector)
    return vector, vector.norm().item()
