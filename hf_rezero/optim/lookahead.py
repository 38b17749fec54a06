"""Lookahead and SNOO: slow weights behind the steps of any optimiser."""

from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..structure.states import check_tensors
from .arguments import are_numbers
from .foreach import chunks, closure_of
from .loading import entries


def lookahead_defaults(k: int, alpha: float, momentum: float = 0.0) -> dict:
    """The keys of a group that Lookahead reads; they and its counter are saved with the optimiser.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    if not (
        isinstance(k, int) and are_numbers(k, alpha, momentum) and k >= 1 and 0 < alpha <= 1 and 0 <= momentum < 1
    ):
        raise ValueError(
            f"got k={k}, alpha={alpha}, momentum={momentum}: expected a whole k >= 1, 0 < alpha <= 1, 0 <= momentum < 1."
        )
    names = ("k", "alpha", "momentum", "step", "evaluating")
    return {f"lookahead_{name}": value for name, value in zip(names, (k, alpha, momentum, 0, False), strict=True)}


def give_defaults(optimizer: Optimizer, values: dict) -> None:
    """Make these the defaults of an optimiser and of its groups, except where a group has its own."""
    for name, value in values.items():
        optimizer.defaults[name] = value
        for group in optimizer.param_groups:
            group.setdefault(name, value)


def slow_copy(p: Tensor) -> Tensor:
    """The weights, in at least fp32: a bf16 average of bf16 weights would stand still."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)


@torch.no_grad()
def synchronize(group: dict, state: dict) -> None:
    """Count one step of the group; after every k-th, move its slow weights and set the fast ones to them.

    s = slow - fast;  b <- momentum b + s;  slow <- slow - alpha (momentum b + s);  fast <- slow

    Lookahead (Zhang et al. 2019, arXiv:1907.08610, algorithm 1) is momentum = 0; with momentum it is SNOO
    (Kallusky et al. 2025, arXiv:2510.15830).
    """
    group["lookahead_step"] += 1
    if group["lookahead_step"] % group["lookahead_k"]:
        return
    for params in chunks(p for p in group["params"] if "slow" in state.get(p, ())):
        slow = [state[p]["slow"] for p in params]
        fast = [p.to(s.dtype) for p, s in zip(params, slow, strict=True)]
        if group["lookahead_momentum"]:
            _nesterov(slow, fast, [state[p] for p in params], group["lookahead_alpha"], group["lookahead_momentum"])
        else:
            torch._foreach_lerp_(slow, fast, group["lookahead_alpha"])
        _assign(params, slow)


def _nesterov(slow, fast, states, alpha, momentum):
    pull = torch._foreach_sub(slow, fast)
    for state, s in zip(states, slow, strict=True):
        if "slow_momentum" not in state:
            state["slow_momentum"] = torch.zeros_like(s)
    buffers = [state["slow_momentum"] for state in states]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, pull)
    torch._foreach_add_(slow, buffers, alpha=-alpha * momentum)
    torch._foreach_add_(slow, pull, alpha=-alpha)


def _assign(params: list[Tensor], values: list[Tensor]) -> None:
    if all(p.dtype == value.dtype for p, value in zip(params, values, strict=True)):
        torch._foreach_lerp_(params, values, 1.0)  # an exact copy; _foreach_copy_ knows no sharded tensors
    else:
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def lookahead(
    optimizer: Optimizer, k: int = 5, alpha: float = 0.5, momentum: float = 0.0, *, evaluate_slow: bool = False
) -> Optimizer:
    """Put Lookahead, or with momentum > 0 SNOO, around `optimizer`; see `synchronize` for the equations.

    The slow weights start as the weights before the first step, live in `optimizer.state[p]["slow"]` in fp32, and are
    saved and loaded with the optimiser, as are the counters in its groups: a run resumes exactly in mid-cycle.
    A step that a `GradScaler` skips does not count.

    Args:
        optimizer: Any torch optimiser. Copying or pickling the object (not its state dict) drops Lookahead.
        k: Steps of `optimizer` between two moves of the slow weights.
        alpha: How far the slow weights move; the outer learning rate of SNOO.
        momentum: Nesterov momentum of the slow weights.
        evaluate_slow: Give the optimiser `eval()`, which puts the slow weights into the model, and `train()`, which
            puts the fast ones back, as the paper advises; the Trainer of transformers calls both. A model saved
            after `eval()` holds the slow weights.

    Returns:
        The same optimiser.

    Raises:
        ValueError: A hyper-parameter is out of its range, or the optimiser has Lookahead, `eval` or `train` already.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=5, alpha=0.5)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lookahead_step"]
        1
    """
    if not isinstance(evaluate_slow, bool):
        raise ValueError(f"got evaluate_slow={evaluate_slow!r}: expected True or False.")
    if "lookahead_k" in optimizer.defaults:
        raise ValueError(f"{type(optimizer).__name__} has Lookahead already: ask for it only once.")
    # groups that are added later inherit the defaults
    give_defaults(optimizer, lookahead_defaults(k, alpha, momentum))
    seen, initial = set(), {}

    def before_step(optimizer, args, kwargs):
        refuse_step_in_eval(optimizer)
        may_get_gradients = closure_of(args, kwargs) is not None
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p not in seen and (p.grad is not None or may_get_gradients):
                    seen.add(p)
                    if "slow" not in optimizer.state.get(p, ()):
                        # not into the state yet: many optimisers take a state that is not empty for one that they have filled
                        initial[p] = slow_copy(p)

    def after_step(optimizer, *_):
        if _is_skipped(optimizer):
            return forget()
        for p, slow in initial.items():
            if p.grad is None:
                seen.discard(p)
            else:
                optimizer.state[p]["slow"] = slow
        initial.clear()
        for group in optimizer.param_groups:
            synchronize(group, optimizer.state)

    def forget(*_):
        seen.clear()
        initial.clear()

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    optimizer.register_load_state_dict_post_hook(forget)
    keep_precision(optimizer)
    if evaluate_slow:
        give_modes(optimizer)
    return optimizer


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether the step changed nothing: fused optimisers check the overflow flag of a `GradScaler` themselves."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and found_inf.item() > 0


def keep_precision(optimizer: Optimizer) -> None:
    """Load slow weights as they were saved: torch would cast them to the type of the parameter."""
    saved = {}

    def before_load(optimizer, state_dict):
        for key, p, entry in entries(optimizer, state_dict):
            saved[p] = {name: entry[name] for name in ("slow", "slow_momentum") if name in entry}
            named = {f"{name} of parameter {key}": tensor for name, tensor in saved[p].items()}
            check_tensors(named, dict.fromkeys(named, p), "the state of Lookahead")

    def after_load(optimizer):
        for p, entry in saved.items():
            for name, value in entry.items():
                optimizer.state[p][name] = value.to(p.device, copy=True)
        saved.clear()
        # a checkpoint without Lookahead lacks these keys: its weights become the first slow ones
        for group in optimizer.param_groups:
            for name in (name for name in optimizer.defaults if name.startswith("lookahead_")):
                group.setdefault(name, optimizer.defaults[name])

    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(after_load)


def give_modes(optimizer: Optimizer) -> None:
    """Give the optimiser `eval()` and `train()`, which exchange the fast weights for the slow ones and back."""
    if hasattr(optimizer, "eval") or hasattr(optimizer, "train"):
        raise ValueError(f"{type(optimizer).__name__} has train() and eval() of its own: leave out evaluate_slow.")
    optimizer.eval = partial(_exchange, optimizer, evaluating=True)
    optimizer.train = partial(_exchange, optimizer, evaluating=False)


@torch.no_grad()
def _exchange(optimizer: Optimizer, evaluating: bool) -> None:
    for group in optimizer.param_groups:
        if group["lookahead_evaluating"] == evaluating:
            continue
        group["lookahead_evaluating"] = evaluating
        for p in group["params"]:
            entry = optimizer.state.get(p, {})
            if evaluating and "slow" in entry:
                entry["fast"] = p.clone()
                p.copy_(entry["slow"])
            elif "fast" in entry:
                p.copy_(entry.pop("fast"))


def refuse_step_in_eval(optimizer: Optimizer) -> None:
    """Refuse a step on the slow weights."""
    if any(group["lookahead_evaluating"] for group in optimizer.param_groups):
        raise RuntimeError("the model holds the slow weights of Lookahead: call optimizer.train() before a step.")
