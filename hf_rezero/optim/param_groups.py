"""Which parameters are decayed, which gradients are centralised, and at which rate residual weights move."""

from collections import defaultdict
from itertools import chain

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..structure.modules import is_conv1d
from ..structure.parameters import decays, is_resweight


def output_dims(model: nn.Module) -> dict[nn.Parameter, int]:
    """The dimension that counts the outputs, for every weight of a linear or convolution layer.

    Layers are recognised by type, and `Conv1D` of transformers by its name. A head that is tied to an embedding is left
    out.
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
    """Split the trainable parameters into the groups that a torch optimiser takes, the decayed matrices first.

    Args:
        model: Any module.
        weight_decay: Decay of the tensors with two or more dimensions; the others get 0.
        resweight_learning_rate: Learning rate of the residual weights; `None` means that of the optimiser.

    Returns:
        The groups that are not empty, of matrices, vectors and residual weights. Each group has one `output_dim` for
        gradient centralisation and one device mesh, so parameters that differ in these are split further.

    Raises:
        ValueError: A learning rate for residual weights was given, and no residual weight is trained.

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
        ValueError: There is no such group, or one holds other parameters too.
    """
    resweights = {id(p) for name, p in model.named_parameters() if is_resweight(name) and p.requires_grad}
    shares = [{id(p) in resweights for p in group["params"]} for group in optimizer.param_groups]
    if {True} not in shares or {True, False} in shares:
        raise ValueError(
            f"got an optimiser whose groups hold "
            f"{'residual weights together with other parameters' if {True, False} in shares else 'no residual weight'} "
            f"of {type(model).__name__}: use `param_groups`, and a model with trainable `resweight`."
        )
    return [index for index, share in enumerate(shares) if share == {True}]


def _groups(by_kind: dict, **options) -> list[dict]:
    return [{"params": params, "output_dim": dim, **options} for (dim, _), params in by_kind.items()]
