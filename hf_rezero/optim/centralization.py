"""Gradient centralisation: gradients of weight matrices with zero mean, under any optimiser."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from .foreach import closure_of, refuse_flat_shards


@torch.no_grad()
def centralize_(group: dict, params: list[Tensor], grads: list[Tensor], conv_only: bool = False) -> None:
    """Take from the gradients of weight matrices their mean over everything but the output dimension, in place.

    g <- g - mean(g)   (Yong et al. 2020, arXiv:2004.01461, equation 1)

    Args:
        group: The group of the parameters. Its `output_dim`, which `param_groups` sets by the type of the module, says
            which dimension counts the outputs; None means that nothing is centralised. In a group without it, every
            tensor of two or more dimensions counts as a weight of the shape (outputs, ...).
        params: The parameters.
        grads: Their gradients.
        conv_only: Leave the matrices of fully connected layers alone.
    """
    output_dim = group.get("output_dim", 0)
    if output_dim is None:
        return
    for p, g in zip(params, grads, strict=True):
        if p.ndim > (2 if conv_only else 1):
            g.sub_(g.mean(_all_but(output_dim, p.ndim), keepdim=True))


@cache
def _all_but(dim: int, ndim: int) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d != dim)


def centralize_gradients(optimizer: Optimizer, conv_only: bool = False) -> Optimizer:
    """Let `optimizer` centralise the gradients before each of its steps, after any clipping.

    If the groups come from `param_groups`, only weights of linear and convolution layers are centralised, never
    embeddings, norms, biases or residual weights. `Conv1D` of transformers and transposed convolutions are centralised
    along their own axis. `p.grad` itself is changed.

    Args:
        optimizer: Any torch optimiser, also one with Lookahead.
        conv_only: Leave fully connected layers alone, an option of the paper.

    Returns:
        The same optimiser.

    Raises:
        ValueError: The optimiser centralises already, or FSDP1 or DeepSpeed has flattened its parameters.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = centralize_gradients(torch.optim.SGD(model.parameters(), lr=1.0))
        >>> before = model.weight.sum(1)
        >>> (model(torch.tensor([1.0, 2.0, 3.0])) ** 2).sum().backward()
        >>> optimizer.step()
        >>> torch.testing.assert_close(model.weight.sum(1), before)
    """
    if not isinstance(conv_only, bool):
        raise ValueError(f"got conv_only={conv_only!r}: expected True or False.")
    if "gc_conv_only" in optimizer.defaults:
        raise ValueError(f"{type(optimizer).__name__} centralises its gradients already: ask for it only once.")
    refuse_flat_shards((p for group in optimizer.param_groups for p in group["params"]), "gradient centralisation")
    for values in (optimizer.defaults, *optimizer.param_groups):
        values["gc_conv_only"] = conv_only

    def centralize(*_):
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            centralize_(group, params, [p.grad for p in params], group["gc_conv_only"])

    def before_step(_, args, kwargs):
        closure = closure_of(args, kwargs)
        if closure is None:
            return centralize()
        # the closure computes the gradients only after this hook
        return (args[0], _then(closure, centralize)), {}

    optimizer.register_step_pre_hook(before_step)
    return optimizer


def _then(closure: Callable, action: Callable) -> Callable:
    def both():
        loss = closure()
        action()
        return loss

    return both
