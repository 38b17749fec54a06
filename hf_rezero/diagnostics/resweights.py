"""Residual branches that will never learn, because two zeros in a row let no gradient through."""

import warnings

import torch
from torch import nn

from ..structure.parameters import is_resweight, whole


__all__ = ["blocked_branches", "warn_of_blocked_branches"]

FROZEN = "is 0 and frozen, so that nothing behind it gets a gradient"
ZERO_BRANCH = "is 0 and its branch gives 0, so that neither gets a gradient"


def blocked_branches(model: nn.Module) -> dict[str, str]:
    """Names the residual weights of branches that have something to learn and never will, with the reason.

    In x + w F(x) the gradient of F is proportional to w and that of w to F(x). A branch is blocked for good where w is 0
    and either frozen, as everything is that an adapter method finds, or in front of an F that gives 0, as a
    zero-initialised output matrix makes it. The second is read off the gradient of w: call this after a backward pass.

    Args:
        model: Any module with parameters called `resweight`.

    Returns:
        `{name of the residual weight: reason}`, empty where all is well.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZero
        >>> branch = ReZero(torch.nn.Linear(4, 4))
        >>> branch.resweight.requires_grad_(False).item()
        0.0
        >>> list(blocked_branches(branch))
        ['resweight']
    """
    blocked = {}
    for name, resweight in model.named_parameters():
        # adapter libraries keep the frozen original beside a copy that they train and use
        if not is_resweight(name) or ".original_module." in name or whole(resweight).any():
            continue
        branch = [(n, p) for n, p in _branch(model, name).named_parameters() if not n.endswith("resweight")]
        if not resweight.requires_grad and any(p.requires_grad for _, p in branch):
            blocked[name] = FROZEN
        elif _got_no_gradient(resweight) and any(not n.endswith("bias") and not whole(p).any() for n, p in branch):
            # a zero gradient alone can also come from a zero-initialised head, and that one passes
            blocked[name] = ZERO_BRANCH
    return blocked


def warn_of_blocked_branches(model: nn.Module) -> None:
    """Warns, once for all of them, of what `blocked_branches` finds."""
    blocked = blocked_branches(model)
    if not blocked:
        return
    name, reason = next(iter(blocked.items()))
    warnings.warn(
        f"{len(blocked)} residual branches will never learn: {name} {reason}. Train the residual weights too (with "
        f"PEFT: `modules_to_save`), start them away from 0 (`resweight_init`), or give the last matrix of the branch "
        f"a start that is not 0.",
        stacklevel=2,
    )


def _got_no_gradient(parameter: nn.Parameter) -> bool:
    # no gradient at all says nothing: there was no backward pass yet, or it is kept elsewhere
    return parameter.requires_grad and parameter.grad is not None and not whole(parameter.grad).any()


def _branch(model: nn.Module, name: str) -> nn.Module:
    """The module that a residual weight scales: the sublayer of the same name, or all of its layer."""
    path = name.split(".")[:-1]
    key = path[-1] if path else ""
    for length in range(len(path), -1, -1):
        owner = model.get_submodule(".".join(path[:length]))
        if any(not child.endswith("resweight") for child, _ in owner.named_parameters()):
            sublayer = getattr(owner, key, None)
            return sublayer if length < len(path) and isinstance(sublayer, nn.Module) else owner
    return model


@torch.no_grad()
def resweight_profile(model: nn.Module) -> dict[str, float]:
    """The residual weights of a model by parameter name, in the order of depth; empty where it has none.

    Where the model is sharded, every process must call this.

    Example:
        >>> import torch
        >>> from hf_rezero import ReZero
        >>> from hf_rezero.diagnostics import resweight_profile
        >>> resweight_profile(torch.nn.Sequential(ReZero(torch.nn.Linear(2, 2)), ReZero(torch.nn.Linear(2, 2))))
        {'0.resweight': 0.0, '1.resweight': 0.0}
    """
    return {name: whole(p).item() for name, p in model.named_parameters() if is_resweight(name)}
