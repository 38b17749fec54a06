"""Which parameters are decayed, which gradients are centralised, and at which rate residual weights move."""

from collections import defaultdict
from itertools import chain

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..structure.modules import is_conv1d
from ..structure.parameters import decays, is_resweight


def output_dims(model: nn.Module) -> dict[nn.Parameter, int]:
    """The dimension that counts the outputs, of every weight of a linear or convolution layer.

    The layers are known by type; of other libraries, `Conv1D` of transformers by its name. A weight that is an
    embedding too, tied to the head, is left out.
    """
    dims = {}
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvTransposeNd) or is_conv1d(module):
            dims[module.weight] = 1
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            dims[module.weight] = 0
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            dims.pop(module.weight, None)
    return dims


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, resweight_learning_rate: float | None = None
) -> list[dict]:
    """Split the trainable parameters into the groups that a torch optimizer takes, the decayed matrices first.

    Args:
        model: Any module.
        weight_decay: Decay of the tensors with two or more dimensions; the others get 0.
        resweight_learning_rate: Own learning rate of the residual weights; `None` leaves it to the optimizer.

    Returns:
        Groups without empty ones: matrices, vectors, residual weights. Each has an `output_dim` for gradient
        centralisation, so matrices are split further if they differ in it, as they do by device mesh where they are
        sharded.

    Raises:
        ValueError: A learning rate for residual weights, and no residual weight that is trained.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZero, param_groups
        >>> groups = param_groups(ReZero(torch.nn.Linear(4, 4)), weight_decay=0.1, resweight_learning_rate=0.01)
        >>> [(len(group["params"]), group["weight_decay"], group.get("lr")) for group in groups]
        [(1, 0.1, None), (1, 0.0, None), (1, 0.0, 0.01)]
    """
    dims = output_dims(model)
    matrices, vectors, resweights = (defaultdict(list) for _ in range(3))
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups = resweights if is_resweight(name) else matrices if decays(p) else vectors
            groups[dims.get(p), p.device_mesh if isinstance(p, DTensor) else None].append(p)
    if resweight_learning_rate is not None and not resweights:
        raise ValueError(
            f"got resweight_learning_rate={resweight_learning_rate}, but {type(model).__name__} has no trainable "
            f"`resweight`: leave the argument out."
        )
    own_rate = {} if resweight_learning_rate is None else {"lr": resweight_learning_rate}
    return list(
        chain(
            _groups(matrices, weight_decay=weight_decay),
            _groups(vectors, weight_decay=0.0),
            _groups(resweights, weight_decay=0.0, **own_rate),
        )
    )


def resweight_groups(model: nn.Module, optimizer: Optimizer) -> list[int]:
    """The indices of the groups that hold residual weights of the model.

    Raises:
        ValueError: There is none, or one holds other parameters too.
    """
    resweights = {id(p) for name, p in model.named_parameters() if is_resweight(name) and p.requires_grad}
    shares = [{id(p) in resweights for p in group["params"]} for group in optimizer.param_groups]
    if {True} not in shares or {True, False} in shares:
        raise ValueError(
            f"the residual weights of {type(model).__name__} were asked for, and the groups of the optimizer hold "
            f"{'them together with others' if {True, False} in shares else 'none'}: use `param_groups`, and a model "
            f"with trainable `resweight`."
        )
    return [index for index, share in enumerate(shares) if share == {True}]


def _groups(by_kind: dict, **options) -> list[dict]:
    return [{"params": params, "output_dim": dim, **options} for (dim, _), params in by_kind.items()]
