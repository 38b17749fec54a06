"""Muon: momentum with orthogonal steps for the weights of layers, AdamW for everything else."""

from collections import defaultdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..structure.parameters import whole
from .adamw import adam_state, adamw_, check_hyperparameters
from .arguments import are_numbers
from .foreach import WholeMatrices, buckets, evaluate, gradients


# coefficients of the quintic a x + b x^3 + c x^5 that lifts small singular values fastest (Jordan et al. 2024)
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T for each matrix U S V^T in (n, rows, columns): the singular values become 0.7 to 1.2.

    Newton-Schulz iteration x <- a x + (b x x^T + c (x x^T)^2) x in bf16, all matrices in one product.

    Example:
        >>> sigma = torch.linalg.svdvals(orthogonalize(torch.randn(2, 8, 32)).float())
        >>> bool((sigma > 0.5).all() and (sigma < 1.5).all())
        True
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(WholeMatrices):
    """Muon (Jordan et al. 2024) for weights of linear and convolution layers, AdamW for the other parameters.

    m <- mu m + (1 - mu) g;  p <- (1 - lr wd) p - 0.2 lr sqrt(max(rows, columns)) orthogonalize(mu m + (1 - mu) g)

    The factor gives the step the root mean square of a step of AdamW (Liu et al. 2025, arXiv:2502.16982, section 2.2),
    so that both use the same learning rate. On matrices, the only tensors that `torch.optim.Muon` takes, the step equals
    that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`. Embeddings, norms, biases and residual weights go to AdamW; so does every
    parameter of a group whose `output_dim` is None.

    Args:
        params: Parameters, or better the groups of `param_groups`, which know what is a weight of a layer.
        lr: Learning rate.
        momentum: mu, the decay of the mean gradient.
        betas: Decay of the first and of the second moment of AdamW.
        eps: Added to the corrected root in AdamW.
        weight_decay: Decoupled: p shrinks by lr * weight_decay in every step.
        num_iterations: Newton-Schulz iterations; fewer are cheaper, and the step is less orthogonal.
        fused: False for the foreach path of AdamW; None takes the fused kernel wherever torch has one.

    Raises:
        ValueError: A hyper-parameter is out of its range, or FSDP1 or DeepSpeed has flattened the parameters.

    Example:
        >>> from hf_rezero import ReZero, param_groups
        >>> model = ReZero(torch.nn.Linear(3, 3))
        >>> optimizer = Muon(param_groups(model, weight_decay=0.1), lr=3e-3)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        num_iterations: int = 5,
        fused: bool | None = None,
    ):
        check_hyperparameters(lr, betas, eps, weight_decay)
        if not (are_numbers(momentum, num_iterations) and 0 <= momentum < 1 and num_iterations in range(1, 101)):
            raise ValueError(
                f"got momentum={momentum}, num_iterations={num_iterations}: expected a momentum in [0, 1) and 1 "
                f"to 100 iterations."
            )
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        super().__init__(params, adam | {"momentum": momentum, "num_iterations": num_iterations})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride] torch has overloads
        """Update every parameter that has a gradient; returns the loss of the closure."""
        loss = evaluate(closure)
        for group in self.param_groups:
            output_dim = group.get("output_dim", 0)
            new_state = adam_state if output_dim is None else muon_state
            for step, params in buckets(group, self.state, new_state):
                grads, states = gradients(params), [self.state[p] for p in params]
                if output_dim is not None and params[0].ndim >= 2:
                    muon_(params, grads, states, group, output_dim)
                else:
                    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "fused")}
                    adamw_(params, grads, states, step=step, **options)
        return loss


def muon_state(p: Tensor) -> dict:
    """A momentum of zero for a weight, the state of AdamW for a vector."""
    return {"step": 0, "momentum_buffer": torch.zeros_like(p)} if p.ndim >= 2 else adam_state(p)


def muon_(params: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, output_dim: int) -> None:
    """One step of Muon on a list of weights, those of one shape together."""
    lr, momentum = group["lr"], group["momentum"]
    buffers = [state["momentum_buffer"] for state in states]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    by_shape = defaultdict(list)
    for p, update in zip(params, torch._foreach_lerp(grads, buffers, momentum), strict=True):
        by_shape[p.shape].append((p, update))
    for pairs in by_shape.values():
        updates = [whole(update) for _, update in pairs]
        factor, steps = orthogonal_steps(updates, output_dim, group["num_iterations"])
        for (p, _), step in zip(pairs, steps, strict=True):
            p.sub_(as_sharded(step.to(p.dtype), p), alpha=lr * factor)


def orthogonal_steps(updates: list[Tensor], output_dim: int, num_iterations: int = 5) -> tuple[float, list[Tensor]]:
    """The factor 0.2 sqrt(max(rows, columns)), and `orthogonalize` of updates of one shape, in bf16."""
    turned = torch.stack([update.transpose(0, output_dim) for update in updates])  # (n, outputs, ...)
    steps = orthogonalize(turned.flatten(2), num_iterations)
    return 0.2 * max(steps.shape[1:]) ** 0.5, list(steps.reshape(turned.shape).transpose(1, output_dim + 1))


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of the tensor where `like` is sharded."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
