"""Names of optimizers, `[gc+][lookahead+|snoo+]BASE`, and their arguments as one text."""

import ast
from typing import Any, NamedTuple

from torch.optim import Optimizer

from .centralization import centralize_gradients
from .lamb import LAMB
from .lars import LARS
from .lookahead import lookahead
from .muon import Muon
from .radam import RAdam
from .ranger import Ranger
from .ranger_lars import RangerLARS


BASES = {
    "radam": RAdam,
    "ranger": Ranger,
    "lars": LARS,
    "larc": LARS,
    "ranger_lars": RangerLARS,
    "lamb": LAMB,
    "muon": Muon,
}
FIXED = {"larc": {"clip": True}}
OUTER = {
    "lookahead": {"lookahead_k": 5, "lookahead_alpha": 0.5, "lookahead_momentum": 0.0},
    "snoo": {"lookahead_k": 20, "lookahead_alpha": 0.7, "lookahead_momentum": 0.5},
}


class OptimizerName(NamedTuple):
    """What a name asks for: centralisation, the outer loop (or None), and the optimizer inside."""

    centralize: bool
    outer: str | None
    base: str


def parse_name(name: str) -> OptimizerName:
    """Read `[gc+][lookahead+|snoo+]BASE`.

    Raises:
        ValueError: The prefixes are unknown, or in another order.

    Example:
        >>> parse_name("gc+lookahead+sgd")
        OptimizerName(centralize=True, outer='lookahead', base='sgd')
    """
    name = getattr(name, "value", name)  # transformers has its names as an enum
    *prefixes, base = name.split("+")
    centralize = prefixes[:1] == ["gc"]
    rest = prefixes[centralize:]
    if len(rest) > 1 or rest and rest[0] not in OUTER or not base:
        raise ValueError(
            f"the optimizer {name!r} came: expected [gc+][lookahead+ or snoo+]NAME, such as gc+lookahead+sgd."
        )
    if base in ("ranger", "ranger_lars") and prefixes:
        raise ValueError(f"the optimizer {name!r} came, but {base} is Lookahead with centralised gradients already.")
    return OptimizerName(centralize, rest[0] if rest else None, base)


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Read `name=value,name=value`, where a value is a number, True, False, None, a tuple, or else a text.

    Raises:
        ValueError: It is not of this form.

    Example:
        >>> parse_arguments("betas=(0.9, 0.99),eps=1e-6,nesterov=True,mode=fast")
        {'betas': (0.9, 0.99), 'eps': 1e-06, 'nesterov': True, 'mode': 'fast'}
    """
    arguments = {}
    for item in split_items(text or ""):
        name, separator, value = item.partition("=")
        if not separator or not name.strip().isidentifier():
            raise ValueError(
                f"optim_args={text!r} came: expected name=value,name=value, such as betas=(0.9,0.99),k=6."
            )
        try:
            arguments[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            arguments[name.strip()] = value.strip()
    return arguments


def split_items(text: str) -> list[str]:
    """Split at commas that stand in no bracket.

    Example:
        >>> split_items("betas=(0.9, 0.99),k=6")
        ['betas=(0.9, 0.99)', 'k=6']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def split_arguments(name: OptimizerName, text: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the optimizer inside, and those of what stands around it: `lookahead_*` and `gc_conv_only`.

    Raises:
        ValueError: The text is malformed, or an argument is for a wrapper that the name does not ask for.
    """
    inner = parse_arguments(text)
    known = [*OUTER["lookahead"], "lookahead_evaluate_slow"] * bool(name.outer) + ["gc_conv_only"] * name.centralize
    around = {key: inner.pop(key) for key in known if key in inner}
    for key in inner:
        if key.startswith(("lookahead_", "gc_")):
            raise ValueError(f"optim_args={text!r} came with {key}: expected any of {known} around {name.base}.")
    return inner, around


def wrap(optimizer: Optimizer, name: OptimizerName, around: dict[str, Any]) -> Optimizer:
    """Put around `optimizer` what its name says."""
    if name.centralize:
        centralize_gradients(optimizer, conv_only=around.get("gc_conv_only", False))
    if name.outer:
        options = OUTER[name.outer] | {key: value for key, value in around.items() if key != "gc_conv_only"}
        lookahead(optimizer, **{key.removeprefix("lookahead_"): value for key, value in options.items()})
    return optimizer
