"""A model of transformers with residual weights, without norms, or with fewer heads and neurons than its config says.

This file travels with the checkpoint of such a model and needs torch and transformers alone. `config.rewritten` says
what differs from the model that transformers builds of the config; `RewrittenLlamaForCausalLM` of this module builds a
`LlamaForCausalLM` and does the same to it. There is such a class for each class of transformers, made when it is asked for.

x <- x + resweight * F(x) (Bachlechner et al. 2020, arXiv:2003.04887): the weight is multiplied into the last projection
of F, which is linear.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.pytorch_utils import Conv1D


PREFIX = "Rewritten"
MODEL_TYPE = "rewritten"
FORMAT = 1
HOW_TO_LOAD = (
    "this model was rewritten with hf_rezero: load it through AutoModel with trust_remote_code=True, or after `import "
    "hf_rezero`; its original class would compute something else"
)
AUTO_CLASSES = [
    auto
    for auto in vars(modeling_auto).values()
    if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None
]


@dataclass(frozen=True)
class Record:
    """What of a model differs from what transformers builds of its config; names are paths from the base model.

    Attributes:
        gates: For each projection with a residual weight, the projection that holds it: itself where none is shared.
        identities: Norms that are gone.
        scales: Factors of token tables, so that the weights of a tied head can be small.
        shapes: Parameters that were cut, or grown.
        numbers: Whole numbers that the modules around these keep, such as the count of heads; `config.` stands before those
            that a module reads from its config.
        resweight_init: Where the residual weights of a new model start.
        fan_in: Whether the weights of a new model start at N(0, 1 / sqrt(inputs)).
        deviations: Standard deviations at which token tables and other starts of the residual stream begin.
        format: Of this record; code refuses a newer one than it knows.
    """

    gates: dict[str, str] = field(default_factory=dict)
    identities: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    resweight_init: float = 0.0
    fan_in: bool = False
    deviations: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Record":
        """The record of a config.

        Raises:
            ValueError: It is newer than this code, or damaged.
        """
        values = getattr(config, "rewritten", None)
        values = values if isinstance(values, Mapping) else {}
        version = values.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise ValueError(
                f"config.rewritten has format {version}, and this code knows formats up to {FORMAT}: upgrade hf_rezero, "
                f"or load with trust_remote_code=True, which takes the code beside the checkpoint."
            )
        names, got = {entry.name for entry in fields(cls)}, set(values)
        wrong = names ^ got if names != got else {n for n in names if not _fits(values[n], getattr(cls(), n))}
        if wrong:
            raise ValueError(
                f"config.rewritten is damaged: {', '.join(sorted(wrong))} is missing, unknown or no such value."
            )
        return cls(**values)

    def changes_nothing(self) -> bool:
        """Whether the config alone describes the model."""
        return not (self.gates or self.identities or self.scales or self.shapes)


def _fits(value: Any, example: Any) -> bool:
    return isinstance(value, (int, float)) if isinstance(example, float) else isinstance(value, type(example))


class ScaledLinear(torch.autograd.Function):
    """w (W x + b) for x (..., D_in), with the gradient of w from <dL/d(wW), W> and dL/d(wb).

    Autograd would keep W x + b for it, D numbers for each token.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        ctx.save_for_backward(x, weight, bias, scale)
        output = nn.functional.linear(x, weight, bias)
        return output.mul_(scale.to(output.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, weight, bias, scale = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        grad_x = (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype)
        unscaled = (rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(weight.dtype)
        grad_weight, grad_scale = unscaled * scale.to(weight.dtype), (unscaled * weight).sum()
        grad_bias = None
        if bias is not None:
            unscaled_bias = rows.sum(0).to(bias.dtype)
            grad_bias, grad_scale = unscaled_bias * scale.to(bias.dtype), grad_scale + (unscaled_bias * bias).sum()
        return grad_x.to(x.dtype), grad_weight, grad_bias, grad_scale.reshape(1).to(scale.dtype)


class Gated(nn.Module):
    """A projection whose output is multiplied by a residual weight of shape (1,), which stays fp32.

    `resweight` is a parameter of this projection, or `holder` has the projection that it is shared with.
    """

    holder: "tuple[Gated] | None" = None  # in a tuple, or it would be registered as a part of this module
    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def gate(self) -> torch.Tensor:
        return self.resweight if self.holder is None else self.holder[0].resweight

    def project(self, x: torch.Tensor, weight: torch.Tensor, ordinary: Callable) -> torch.Tensor:
        """gate * (weight x + bias) for a weight (D_out, D_in); sharded and quantised weights run as `ordinary` does."""
        if type(self.weight) in (nn.Parameter, torch.Tensor) and torch.is_grad_enabled():
            return ScaledLinear.apply(x, weight, self.bias, self.gate)
        output = ordinary(x)
        return output * self.gate.to(output.dtype)


class GatedLinear(Gated, nn.Linear):
    """resweight * (W x + b)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x, self.weight, nn.Linear.forward.__get__(self))


class GatedConv1D(Gated, Conv1D):
    """resweight * (x W + b), with the weight of GPT-2, whose inputs come first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x, self.weight.t(), Conv1D.forward.__get__(self))


GATED: dict[type, type] = {nn.Linear: GatedLinear, Conv1D: GatedConv1D}


def gate_(projection: nn.Module, value: float, holder: nn.Module | None = None) -> None:
    """Give a projection a residual weight of its own, or the one of `holder`; the module stays the same object."""
    projection.__class__ = GATED[type(projection)]
    if holder is None:
        weight = torch.full((1,), float(value), dtype=torch.float32, device=projection.weight.device)
        projection.resweight = nn.Parameter(weight)
    else:
        projection.holder = (holder,)


def ungate_(projection: nn.Module) -> None:
    """Make a projection the ordinary one that it was, without residual weight."""
    projection.__class__ = next(plain for plain, gated in GATED.items() if isinstance(projection, gated))
    projection._parameters.pop("resweight", None)
    vars(projection).pop("holder", None)


class ScaledEmbedding(nn.Embedding):
    """A token table whose rows are multiplied by `embed_scale` on the way in, so that a tied head can be small."""

    embed_scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


def adapts_gated(module: nn.Module) -> bool:
    """Whether a module is an adapter, which can be merged, around a projection with a residual weight."""
    return hasattr(type(module), "merge") and any(isinstance(child, Gated) for child in module.children())


def _guard_merging(outer: nn.Module, name: str, inner: nn.Module) -> None:
    """An adapter adds B A x to w (W x + b), and merges B A into W, where w would multiply it: it must not."""
    if isinstance(inner, Gated) and hasattr(type(outer), "merge"):
        outer.merge = partial(_merge, outer)


def _merge(adapter: Any, *args, **kwargs) -> Any:
    if adapts_gated(adapter):
        raise ValueError(
            "this adapter stands around a projection with a residual weight, which would multiply the merged adapter too: "
            "call fold_resweight_(model) first, which leaves what the model computes as it is, and then merge."
        )
    return type(adapter).merge(adapter, *args, **kwargs)


# PEFT has no place where a projection could say how adapters are merged into it
register_module_module_registration_hook(_guard_merging)


def scale_(table: nn.Embedding, factor: float) -> None:
    """Make a token table one whose rows are multiplied by `factor`."""
    table.__class__, table.embed_scale = ScaledEmbedding, factor


def replay_(base: nn.Module, record: Record) -> None:
    """Do to a model that transformers has just built what was done to the saved one.

    Raises:
        ValueError: The record names something that this model does not have.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    parameters = dict(base.named_parameters(remove_duplicate=False))
    named = [*record.gates, *record.gates.values(), *record.identities, *record.scales, *record.numbers]
    unknown = [name for name in named if name not in modules] + [
        name for name in record.shapes if name not in parameters
    ]
    if unknown:
        raise ValueError(
            f"config.rewritten names {', '.join(unknown[:3])}, which {type(base).__name__} of this config does not have: "
            f"the config was edited, or belongs to another model."
        )
    for name, shape in record.shapes.items():
        old = parameters[name]
        owner, _, attribute = name.rpartition(".")
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        setattr(modules[owner], attribute, nn.Parameter(new, requires_grad=old.requires_grad))
    for name, numbers in record.numbers.items():
        for attribute, value in numbers.items():
            _set_number(modules[name], attribute, value)
    for name in record.identities:
        base.set_submodule(name, nn.Identity())
    for name, holder in sorted(record.gates.items(), key=lambda pair: pair[0] != pair[1]):
        gate_(modules[name], record.resweight_init, None if name == holder else modules[holder])
    for name, factor in record.scales.items():
        scale_(modules[name], factor)


def _set_number(module: nn.Module, attribute: str, value: int) -> None:
    """Set `name`, or `config.name`, in a copy of the config that the module shares with all others until then."""
    own, _, name = attribute.rpartition(".")
    if own:
        setattr(module, own, copy.copy(getattr(module, own)))
    vars(getattr(module, own) if own else module)[name] = value


@torch.no_grad()
def fill_(model: "Rewritten", record: Record) -> None:
    """Fill the parameters whose shapes differ as transformers fills new ones."""
    modules = dict(model.base_model.named_modules(remove_duplicate=False))
    for name in sorted({name.rpartition(".")[0] for name in record.shapes}):
        for tensor in modules[name].parameters(recurse=False):
            tensor._is_hf_initialized = False
        model._init_weights(modules[name])


@torch.no_grad()
def initialize_(model: "Rewritten", record: Record) -> None:
    """Fill the base model with the values at which it starts.

    | tensor                                          | initial value                            |
    |-------------------------------------------------|------------------------------------------|
    | `resweight`                                     | `resweight_init`                         |
    | token tables, other starts of the stream        | N(0, 1)                                  |
    | token tables tied to a head of D inputs         | N(0, 1 / sqrt(D)), with a scale sqrt(D)  |
    | tables of positions and segments                | N(0, 1 / 2)                              |
    | other weights with fan_in inputs                | N(0, 1 / sqrt(fan_in)), biases 0         |
    | norms that are left, heads                      | as transformers does                     |

    The second argument of N is the standard deviation.
    """
    for module in model.base_model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = False  # transformers leaves such tensors alone
        model._init_weights(module)
    parameters = dict(model.base_model.named_parameters(remove_duplicate=False))
    for name, deviation in record.deviations.items():
        init.normal_(parameters[name], std=deviation)


class Rewritten:
    """What a class of transformers inherits before itself to become one of rewritten models."""

    config_class: type
    original: type

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        record, base = Record.of(config), self.base_model
        if base is not self and isinstance(base, Rewritten):
            return  # built by itself, as heads that transformers makes for any model do
        replay_(base, record)
        if any(parameter.is_meta for parameter in base.parameters()):
            return
        fill_(self, record)
        if record.fan_in:
            initialize_(self, record)

    def _init_weights(self, module: nn.Module) -> None:
        """Fill the leaf module with its initial values; the table of `initialize_` has them."""
        record = Record.of(self.config)
        super()._init_weights(module)
        if isinstance(module, Gated) and module.holder is None:
            init.constant_(module.resweight, record.resweight_init)
        if record.fan_in and isinstance(module, (nn.Linear, Conv1D)) and not self._is_in_head(module):
            inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            init.normal_(module.weight, std=inputs**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)

    def _is_in_head(self, module: nn.Module) -> bool:
        base = self.base_model
        if base is self:
            return False
        return any(module is part for child in self.children() if child is not base for part in child.modules())

    def set_attn_implementation(self, *args, **kwargs):
        """As in transformers, also for modules with a config of their own, such as a pruned attention of Phi-3."""
        super().set_attn_implementation(*args, **kwargs)
        for name in Record.of(self.config).numbers:
            config = vars(self.base_model.get_submodule(name)).get("config")
            if config is not None:
                config._attn_implementation_internal = self.config._attn_implementation

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As in transformers; the names are those of the modules, never those of an older release."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def from_pretrained(
        cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs
    ):
        """As in transformers, and refuses weights that do not fit `config.rewritten`.

        Raises:
            ValueError: Weights of the layers are missing, not expected, or of other shapes; or the weights were to be
                quantised on the way, where a residual weight would be lost, or split by tensor parallelism.
            RuntimeError: A head or a token table has another shape, and `ignore_mismatched_sizes` is not given.
        """
        model, loading = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_weights(model, loading, ignore_mismatched_sizes)
        fill_tables_(model, loading)
        return (model, loading) if output_loading_info else model


def check_weights(model: PreTrainedModel, loading: Mapping[str, Any], ignore_mismatched_sizes: bool = False) -> None:
    """Refuse a checkpoint whose weights are not those of its record.

    Raises:
        ValueError: See `Rewritten.from_pretrained`.
    """
    record, modules = Record.of(model.config), dict(model.base_model.named_modules())
    if record.gates and (model.tp_size or 1) > 1:
        raise ValueError(
            f"{type(model).__name__} has residual weights inside of projections, which tensor parallelism splits: load it "
            f"whole on each process, or what fold_resweight_ makes of it."
        )
    lost = [name for name in record.gates if not isinstance(modules.get(name), Gated)]
    if lost:
        raise ValueError(
            f"{lost[0]} was replaced while the model was loaded, which loses its residual weight: load it in floating "
            f"point, multiply the residual weights in with fold_resweight_, and quantise what that saves."
        )
    prefix = _prefix(model)
    recorded = (*record.gates, *record.identities, *record.scales, *record.shapes)
    inside = tuple({prefix + re.sub(r"(^|\.)\d+\..*", r"\1", name) for name in recorded})
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(inside))
    surplus = sorted(name for name in loading["unexpected_keys"] if name.startswith(inside))
    mismatched = sorted(name for name, *_ in loading["mismatched_keys"])
    tables = {f"{prefix}{name}.weight" for name in record.scales}  # of a size that the caller may choose, as elsewhere
    shapes = [name for name in mismatched if name.startswith(inside) and name not in tables]
    wrong = {"missing": missing, "not expected": surplus, "of another shape": shapes}
    if any(wrong.values()):
        raise ValueError(
            f"the weights do not fit {type(model).__name__} of this config: "
            f"{', '.join(f'{what} {names[:3]}' for what, names in wrong.items() if names)}. The checkpoint is damaged or was "
            f"edited: save it anew from the model."
        )
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(
            f"{', '.join(mismatched[:3])} of {type(model).__name__} are of another shape than in the checkpoint: give "
            f"ignore_mismatched_sizes=True for a new head or a new token table."
        )


@torch.no_grad()
def fill_tables_(model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """Fill the token tables that a checkpoint lacks as those of a new model; transformers has filled them with less."""
    new = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    for name, deviation in Record.of(model.config).deviations.items():
        if _prefix(model) + name in new:
            nn.init.normal_(model.base_model.get_parameter(name), std=deviation)


def _prefix(model: PreTrainedModel) -> str:
    """What stands before the names of the base model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


class RewrittenConfig:
    """What a config class of transformers inherits before itself to become one of rewritten models."""

    model_type = MODEL_TYPE
    original: type

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The config of the class that `original_config_class` names.

        Raises:
            ValueError: The record is damaged or newer than this code, or this transformers does not have the class.
        """
        name = config_dict.get("original_config_class")
        config_class = _stock(name) if isinstance(name, str) else None
        if config_class is None or not issubclass(config_class, PreTrainedConfig):
            raise ValueError(
                f"original_config_class={name!r} is no config of transformers {transformers.__version__}: upgrade it, or "
                f"repair config.json."
            )
        register(config_class)
        values = {name: value for name, value in config_dict.items() if value != HOW_TO_LOAD}
        values |= {**values.pop("guarded", {}), "auto_map": auto_map(config_class)}
        result = super(RewrittenConfig, rewritten_class(config_class)).from_dict(values, **kwargs)
        Record.of(result[0] if isinstance(result, tuple) else result)
        return result

    @classmethod
    def from_json_file(cls, json_file):
        """The config of a file that `to_json_file` wrote."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_json_file(self, json_file_path, use_diff: bool = True) -> None:
        """As in transformers, with a text in the place of a number, which the original class refuses."""
        values = json.loads(self.to_json_string(use_diff))
        guard = guard_of(self.original, values)
        values |= {"guarded": {guard: values[guard]} if guard in values else {}, guard: HOW_TO_LOAD}
        Path(json_file_path).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def guard_of(config_class: type, values: Mapping[str, Any]) -> str:
    """A field of these values of a config that can be no text: with one, no model of the original class can be loaded.

    The common base of all config classes takes the text, because the Trainer reads the config of a checkpoint with it.
    """
    common = {entry.name for entry in fields(PreTrainedConfig)}
    for name in reversed([entry.name for entry in fields(config_class) if entry.name not in common]):
        guarded = {**values, name: HOW_TO_LOAD}
        if HOW_TO_LOAD in _refusal(config_class, guarded) and not _refusal(PreTrainedConfig, guarded):
            return name
    raise ValueError(
        f"{config_class.__name__} takes a text for every field: its models cannot be told from rewritten ones."
    )


def _refusal(config_class: type, values: Mapping[str, Any]) -> str:
    """What a config class says to these values; nothing where it takes them."""
    try:
        config_class(**values)
    except Exception as error:  # of huggingface_hub, as a rule, which a file for the Hub does not import
        return str(error) or type(error).__name__
    return ""


@cache
def rewritten_class(stock: type) -> type:
    """The class of rewritten models of a class of transformers, or that of their configs."""
    members = {
        "__module__": __name__,
        "original": stock,
        "__doc__": f"{stock.__name__}, rewritten: see `config.rewritten`.",
    }
    if issubclass(stock, PreTrainedConfig):
        members |= {"_auto_class": "AutoConfig", "__init__": _config_init}
        return type(PREFIX + stock.__name__, (RewrittenConfig, stock), members)
    autos = [auto.__name__ for auto in AUTO_CLASSES if stock in _classes(auto, stock.config_class)]
    in_fp32 = [*(stock._keep_in_fp32_modules_strict or ()), "resweight"]
    members |= {"config_class": rewritten_class(stock.config_class), "_keep_in_fp32_modules_strict": in_fp32}
    members |= {"_auto_class": autos[0] if autos else "AutoModel"}
    return type(PREFIX + stock.__name__, (Rewritten, stock), members)


def _config_init(self, **kwargs):
    type(self).original.__init__(self, **kwargs)


@cache
def _classes(auto: type, config_class: type) -> tuple[type, ...]:
    """What an Auto class makes of a config: one class, as a rule; none that has another config, as one of Qwen2 has."""
    found = auto._model_mapping.get(config_class, ())  # which, unlike its keys, imports no other family
    found = found if isinstance(found, tuple) else (found,)
    return tuple(model_class for model_class in found if model_class.config_class is config_class)


def auto_map(config_class: type) -> dict[str, str]:
    """Which class of this file each Auto class takes."""
    found = {auto.__name__: classes[0] for auto in AUTO_CLASSES if (classes := _classes(auto, config_class))}
    module = __name__.rpartition(".")[2]
    return {
        name: f"{module}.{PREFIX}{stock.__name__}" for name, stock in {"AutoConfig": config_class, **found}.items()
    }


@cache
def register(config_class: type) -> None:
    """Tell the Auto classes of rewritten models of a config class of transformers."""
    for auto in AUTO_CLASSES:
        if classes := _classes(auto, config_class):
            auto.register(rewritten_class(config_class), rewritten_class(classes[0]), exist_ok=True)


def mark_(model: PreTrainedModel, stock: type, record: Record) -> None:
    """Make a model that was changed one of the class whose checkpoints say so, or of `stock` if nothing differs."""
    config_class = stock.config_class
    config, changed = model.config, not record.changes_nothing()
    config.__class__ = rewritten_class(config_class) if changed else config_class
    model.__class__ = rewritten_class(stock) if changed else stock
    if not changed and isinstance(model.base_model, Rewritten):
        model.base_model.__class__ = type(model.base_model).original
    for name in ("rewritten", "original_config_class", "auto_map"):
        vars(config).pop(name, None)
    if changed:
        register(config_class)
        config.rewritten, config.original_config_class = asdict(record), config_class.__name__
        config.auto_map = auto_map(config_class)
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "resweight"}


def _stock(name: str) -> type | None:
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, (PreTrainedConfig, PreTrainedModel)) else None


def __getattr__(name: str) -> type:
    stock = _stock(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return rewritten_class(stock)
