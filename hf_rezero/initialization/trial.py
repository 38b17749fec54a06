"""The loss of a model at other weights than its own, and the gradients of it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..structure.kept import random_numbers_kept
from ..structure.loss import Loss, model_loss


def map_batch(function: Callable, *batches: Any) -> Any:
    """Apply a function to the tensors at the same place of nested mappings, lists and tuples; keep other leaves."""
    first = batches[0]
    if isinstance(first, Tensor):
        return function(*batches)
    if isinstance(first, Mapping):
        return {key: map_batch(function, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, list | tuple):
        items = [map_batch(function, *items) for items in zip(*batches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Eval mode, but for normalisation by the statistics of the batch; every flag returns to what it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            # Set one by one: a model may override train().
            module.training = isinstance(module, nn.modules.batchnorm._NormBase)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class TrialModel(nn.Module):
    """The loss of a model at other weights than its own; the model comes back as it was, also after an exception."""

    def __init__(self, model: nn.Module, loss_fn: Loss | None = None) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn or model_loss
        devices = {p.device for p in model.parameters()}
        self.device = next(iter(devices))
        self.cuda_devices = [device for device in devices if device.type == "cuda"]

    def forward(self, function: Callable) -> Any:
        return function()

    def run(self, weights: dict[str, Tensor], function: Callable) -> Any:
        """Call a function while the model has these weights.

        The backward pass belongs into the function too: checkpointed parts of the model are computed again in it, from
        whatever weights the model has then.
        """
        # Copies, so that running statistics are updated there and not in the model.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        state = {f"model.{name}": tensor for name, tensor in (weights | buffers).items()}
        # Each call starts from the same random numbers: two gradients that are compared see the same noise.
        # The weights may have moved in place since autocast, if it is on around us, cached their low-precision copies.
        torch.clear_autocast_cache()
        with _dropout_off(self.model), random_numbers_kept(self.cuda_devices), torch.enable_grad():
            return functional_call(self, state, (function,))

    def loss(self, batches: Sequence) -> Tensor:
        """The mean loss of the batches at the weights of the model."""
        losses = [self.loss_fn(self.model, map_batch(lambda t: t.to(self.device), batch)) for batch in batches]
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"the loss must be a scalar tensor with a gradient, got {loss!r}")
        return torch.stack([loss.reshape(()) for loss in losses]).mean()

    def gradient(self, weights: dict[str, Tensor], batches: Sequence) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and its gradient by tensor, `None` for tensors that the loss does not contain."""

        def evaluate():
            loss = self.loss(batches)
            return loss.detach(), list(torch.autograd.grad(loss, list(weights.values()), allow_unused=True))

        return self.run(weights, evaluate)

    def hessian_product(self, weights: dict[str, Tensor], batches: Sequence, vector: list[Tensor]) -> list[Tensor]:
        """The exact product of the Hessian of the loss with a vector, by a second backward pass."""
        leaves = list(weights.values())

        def evaluate():
            grads = torch.autograd.grad(self.loss(batches), leaves, create_graph=True, allow_unused=True)
            # A gradient that does not depend on the weights, or is missing, has no part in it.
            pairs = [(g, v) for g, v in zip(grads, vector, strict=True) if g is not None and g.requires_grad]
            if not pairs:
                return [torch.zeros_like(leaf) for leaf in leaves]
            outputs, directions = zip(*pairs, strict=True)
            return torch.autograd.grad(outputs, leaves, directions, allow_unused=True, materialize_grads=True)

        try:
            with twice_differentiable_attention():
                return list(self.run(weights, evaluate))
        except RuntimeError as error:
            error.add_note("second_order='finite_difference' needs no second backward pass")
            raise


def twice_differentiable_attention():
    """A context in which torch's attention can be differentiated twice, as its fused kernels cannot (pytorch#116350)."""
    return sdpa_kernel(SDPBackend.MATH)


def first_of(names: Sequence[str]) -> str:
    """The first eight names and the number of the rest."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _refusal(parameter: nn.Parameter) -> str | None:
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
        return "has no values yet: initialise or load the model first"
    if hasattr(parameter, "device_mesh") or hasattr(parameter, "_is_flat_param") or hasattr(parameter, "ds_id"):
        return "is sharded: learn the scales before the model is wrapped"
    if not parameter.is_floating_point():
        return f"is {parameter.dtype}: an integer or quantised weight has no scale, start from the float model"
    if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
        return f"is {parameter.dtype}: learn the scales in fp32, model.float(), and convert the model afterwards"
    return None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, tied ones once.

    Raises:
        ValueError: A parameter is integer, quantised, half precision, sharded or without values, or all are frozen.

    Warns:
        UserWarning: Some parameters are frozen.
    """
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if reason := _refusal(parameter):
            raise ValueError(f"{name} {reason}")
    frozen = [name for name, p in named.items() if not p.requires_grad]
    if len(frozen) == len(named):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; frozen are: {first_of(frozen) or 'none'}"
        )
    if frozen:
        warnings.warn(f"frozen parameters are used as they are and not scaled: {first_of(frozen)}", stacklevel=4)
    return {name: p for name, p in named.items() if p.requires_grad}


Reduce = Callable[[list[Tensor]], list[Tensor]]


def mean_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Average tensors over all processes of the default group, in place; the `reduce` of a plain torchrun job."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(dist.get_world_size())
    return tensors
