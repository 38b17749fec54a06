"""Which tensors one kernel call can take together, and how many of them fit into a cache."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .loading import CheckedOptimizer


# A list of this many numbers stays in the cache of one core between the kernels of an update: twice as fast at
# width 256. A GPU gains nothing from it, and each further list costs another launch.
CPU_CHUNK = 2**17


def evaluate(closure: Callable | None):
    """The loss that the closure of `Optimizer.step` computes, or None."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def closure_of(args: tuple, kwargs: dict) -> Callable | None:
    """The closure among the arguments of a hook of `Optimizer.step`, the first of which is the optimiser."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def buckets(group: dict, state: dict, new_state: Callable[[Tensor], dict]) -> Iterator[tuple[int, list[Tensor]]]:
    """Count one step for every parameter with a gradient, and yield (step, parameters) in lists of one kind.

    The parameters of a list share step, dtype, device, mesh, and whether they are matrices.

    Args:
        group: A group of `Optimizer.param_groups`.
        state: `Optimizer.state`; the step is an int, which loading does not cast to the type of the parameter.
        new_state: The state of a parameter before its first step.

    Raises:
        RuntimeError: A gradient is sparse or a parameter complex.
    """
    by_kind = defaultdict(list)
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        if grad.is_sparse or p.is_complex():
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} and type {p.dtype} has a {grad.layout} gradient: only "
                f"dense real ones are supported. Give this parameter to torch.optim.SparseAdam or Adam."
            )
        entry = state[p]
        if "step" not in entry:
            entry.update(new_state(p))
        step = entry["step"] = int(entry["step"]) + 1
        by_kind[step, p.dtype, p.device, mesh_of(p), p.ndim >= 2].append(p)
    for (step, *_), params in by_kind.items():
        for chunk in chunks(params):
            yield step, chunk


def mesh_of(p: Tensor) -> DeviceMesh | None:
    """The devices over which a tensor is sharded: no kernel takes tensors of two meshes, or sharded and plain ones."""
    return p.device_mesh if isinstance(p, DTensor) else None


def chunks(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Cut into lists of at most `CPU_CHUNK` numbers, or of one larger tensor, and at each change of the mesh.

    On a GPU a list may have any length.
    """
    chunk, size, last_mesh = [], 0, None
    for p in params:
        mesh = mesh_of(p)
        is_full = p.is_cpu and size + p.numel() > CPU_CHUNK
        if chunk and (is_full or mesh != last_mesh):
            yield chunk
            chunk, size = [], 0
        last_mesh = mesh
        chunk.append(p)
        size += p.numel()
    if chunk:
        yield chunk


def lie_alike(*lists: list[Tensor]) -> bool:
    """Whether the tensors at each place of the lists lie in memory in the same order.

    Fused kernels walk them in the order of storage, including any gaps. If the orders are the same and one tensor has no
    gaps, such as a state made by `zeros_like`, none of them has.
    """
    if all(map(Tensor.is_contiguous, chain(*lists))):  # as nearly always, and quick to ask
        return True
    return all(len({tensor.stride() for tensor in tensors}) == 1 for tensors in zip(*lists, strict=True))


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients, in the memory layout of their parameters, so that a fused kernel may take them."""
    grads: list[Tensor] = [p.grad for p in params]  # pyright: ignore[reportAssignmentType] those without are left out
    if lie_alike(params, grads):
        return grads
    return [
        g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)
    ]


def refuse_flat_shards(params: Iterable[Tensor], technique: str) -> None:
    """Refuse parameters that FSDP1 or DeepSpeed has flattened: they are no longer matrices.

    Raises:
        ValueError: FSDP1 or DeepSpeed ZeRO-3 holds the parameters.
    """
    for p in params:
        if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id"):
            raise ValueError(
                f"{technique} needs whole weight matrices, but got a parameter that FSDP1 or DeepSpeed ZeRO has "
                f"flattened (shape {tuple(p.shape)}), on which it would silently compute something else. Use FSDP2 "
                f"(`fully_shard`, `fsdp_version: 2`) or an optimiser that acts on each element alone, such as radam."
            )


class WholeMatrices(CheckedOptimizer):
    """An optimiser that refuses flattened parameters in every group; as one of several base classes it must be the first."""

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, after checking that its tensors have kept their shapes."""
        super().add_param_group(param_group)
        refuse_flat_shards(self.param_groups[-1]["params"], type(self).__name__)


def norms(tensors: list[Tensor]) -> Tensor:
    """(n,) Euclidean norms in fp32, of the whole tensors even if they are sharded, with one reduction for the list."""
    stacked = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32)))
    return stacked.full_tensor() if hasattr(stacked, "full_tensor") else stacked


def scale_(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its factor; on a GPU the factors stay tensors, so that nothing waits for them."""
    torch._foreach_mul_(tensors, factors.tolist() if factors.device.type == "cpu" else list(factors.unbind()))
