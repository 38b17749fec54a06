"""Names of optimisers, `[gc+][lookahead+|snoo+]BASE`, and their arguments as one text."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
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


@dataclass(frozen=True)
class Base:
    """One of our optimisers, as its name in `--optim` selects it.

    Attributes:
        make: Its class.
        trial_step: The algorithm of `gradinit_` that takes the same kind of step; None if there is none.
        fixed: Arguments that belong to the name.
        by_element: Whether it acts on each element alone, so that it works on flattened weights too.
    """

    make: type[Optimizer]
    trial_step: str | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    by_element: bool = False


BASES = {
    "radam": Base(RAdam, trial_step="adam", by_element=True),
    "ranger": Base(Ranger, trial_step="adam"),
    "lars": Base(LARS, trial_step="lars"),
    "larc": Base(LARS, trial_step="lars", fixed={"clip": True}),
    "ranger_lars": Base(RangerLARS, trial_step="lamb"),
    "lamb": Base(LAMB, trial_step="lamb"),
    "muon": Base(Muon, trial_step="muon"),
}
_ADAMW = """adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_torch_8bit adamw_torch_4bit
adamw_anyprecision adamw_8bit adamw_bnb_8bit paged_adamw_8bit paged_adamw_32bit""".split()
# trial steps for the optimisers of transformers, by their names there
TRIAL_STEPS_ELSEWHERE = dict.fromkeys(_ADAMW, "adam") | {"sgd": "sgd_normalized"}
OUTER = {
    "lookahead": {"lookahead_k": 5, "lookahead_alpha": 0.5, "lookahead_momentum": 0.0},
    "snoo": {"lookahead_k": 20, "lookahead_alpha": 0.7, "lookahead_momentum": 0.5},
}


class OptimizerName(NamedTuple):
    """The parts of a name: centralisation, the outer loop (or None), and the optimiser inside."""

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
            f"got the optimiser {name!r}: expected [gc+][lookahead+ or snoo+]NAME, such as gc+lookahead+sgd."
        )
    if base in ("ranger", "ranger_lars") and prefixes:
        raise ValueError(
            f"got the optimiser {name!r}, but {base} has Lookahead and centralised gradients already: leave out the prefixes."
        )
    return OptimizerName(centralize, rest[0] if rest else None, base)


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Read `name=value,name=value`, where a value is a number, True, False, None, a tuple, or otherwise a text.

    Raises:
        ValueError: The text does not have this form.

    Example:
        >>> parse_arguments("betas=(0.9, 0.99),eps=1e-6,nesterov=True,mode=fast")
        {'betas': (0.9, 0.99), 'eps': 1e-06, 'nesterov': True, 'mode': 'fast'}
    """
    arguments = {}
    for item in split_items(text or ""):
        name, separator, value = item.partition("=")
        if not separator or not name.strip().isidentifier():
            raise ValueError(f"got optim_args={text!r}: expected name=value,name=value, such as betas=(0.9,0.99),k=6.")
        try:
            arguments[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            arguments[name.strip()] = value.strip()
    return arguments


def split_items(text: str) -> list[str]:
    """Split at commas outside brackets.

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
    """The arguments of the optimiser inside, and those of its wrappers: `lookahead_*` and `gc_conv_only`.

    Raises:
        ValueError: The text is malformed, or an argument is for a wrapper that the name does not ask for.
    """
    inner = parse_arguments(text)
    known = [*OUTER["lookahead"], "lookahead_evaluate_slow"] * bool(name.outer) + ["gc_conv_only"] * name.centralize
    around = {key: inner.pop(key) for key in known if key in inner}
    expected = f"any of {', '.join(known)}" if known else "none"
    for key in inner:
        if key.startswith(("lookahead_", "gc_")):
            raise ValueError(
                f"got optim_args={text!r} with {key}: expected {expected} for the wrappers of {name.base}."
            )
    return inner, around


def wrap(optimizer: Optimizer, name: OptimizerName, around: Mapping[str, Any]) -> Optimizer:
    """Put the wrappers around `optimizer` for which its name asks."""
    if name.centralize:
        centralize_gradients(optimizer, conv_only=around.get("gc_conv_only", False))
    if name.outer:
        options = OUTER[name.outer] | {key: value for key, value in around.items() if key != "gc_conv_only"}
        lookahead(optimizer, **{key.removeprefix("lookahead_"): value for key, value in options.items()})
    return optimizer


@dataclass(frozen=True)
class OptimizerSpec:
    """What the name and the arguments of an optimiser ask for, read once.

    Attributes:
        name: The parts of the name.
        arguments: Those of the optimiser inside.
        around: Those of Lookahead and of gradient centralisation.
    """

    name: OptimizerName
    arguments: Mapping[str, Any]
    around: Mapping[str, Any]

    @property
    def base(self) -> Base | None:
        """The optimiser inside if it is ours; None if its name belongs to transformers."""
        return BASES.get(self.name.base)

    @property
    def trial_step(self) -> str:
        """The algorithm of `gradinit_` with the trial step of the optimiser inside.

        Raises:
            ValueError: There is none.

        Example:
            >>> parse_optimizer("gc+lookahead+sgd").trial_step
            'sgd_normalized'
        """
        step = self.base.trial_step if self.base else TRIAL_STEPS_ELSEWHERE.get(self.name.base)
        if step is None:
            known = [name for name, base in BASES.items() if base.trial_step] + [*TRIAL_STEPS_ELSEWHERE]
            raise ValueError(
                f"got the optimiser {self.name.base!r}, for which GradInit has no trial step; it has one for "
                f"{', '.join(known)}. Take one of these, or choose a step: run gradinit_(model, batches, "
                f"algorithm=...) and then train without GradInit, or pass GradInitConfig(algorithm=...)."
            )
        return step

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """Put the wrappers around `optimizer` for which the name asks."""
        return wrap(optimizer, self.name, self.around)


@lru_cache
def parse_optimizer(name: str, arguments: str | None = None) -> OptimizerSpec:
    """Read `--optim` and `--optim_args`.

    Raises:
        ValueError: One of them is malformed, or an argument is for a wrapper that the name does not ask for.

    Example:
        >>> spec = parse_optimizer("lookahead+radam", "lookahead_k=6,eps=1e-6")
        >>> spec.base.make.__name__, dict(spec.arguments), dict(spec.around)
        ('RAdam', {'eps': 1e-06}, {'lookahead_k': 6})
    """
    parsed = parse_name(name)
    return OptimizerSpec(parsed, *split_arguments(parsed, arguments))
