"""ReZero for any residual network of transformers: residual weights in place of norms, put in from outside."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..structure.architectures import Architecture, ResidualLayer
from ..structure.modules import child, join
from ..structure.parameters import check_plain, is_resweight
from ..structure.probe import example_of, first_tensor, run_quietly
from ..structure.residual import row_of, stacks
from .modeling_rewritten import GATED, Record, gate_, initialize_, scale_
from .record import stock_class, write_record


CHOICES = {
    "norm": ("remove", "keep"),
    "final_norm": ("keep", "remove"),
    "qk_norm": ("keep", "remove"),
    "resweight_sharing": ("sublayer", "layer"),
    "init": ("fan_in", "keep"),
}
# tables that add less than this root mean square to the stream are small for the sake of their tied head
SMALL = 0.5


@dataclass(frozen=True)
class ReZeroReport:
    """What `rezero_` did.

    Attributes:
        layers: Names of the residual layers.
        gates: The projections with a residual weight, each with the one that holds it.
        removed_norms: Names of the norms that are gone.
        initialized: Whether the weights are new.
    """

    layers: tuple[str, ...]
    gates: Mapping[str, str]
    removed_norms: tuple[str, ...]
    initialized: bool

    def __str__(self) -> str:
        weights = len(set(self.gates.values()))
        return (
            f"{len(self.layers)} layers, {weights} residual weights on {len(self.gates)} projections, "
            f"{len(self.removed_norms)} norms removed, weights {'new' if self.initialized else 'as they were'}"
        )


@dataclass(frozen=True)
class Layer:
    """A residual layer of a network, and what the table of architectures says of it."""

    name: str
    module: nn.Module
    architecture: Architecture
    row: ResidualLayer

    @property
    def writers(self) -> list[str]:
        """The last projection of each branch, by full names."""
        return [join(self.name, path) for path in self.row.writers]

    def parts(self, paths: Iterable[str]) -> list[str]:
        """Full names of those of the paths that the layer has."""
        return [join(self.name, path) for path in paths if child(self.module, path) is not None]


@torch.no_grad()
def rezero_(
    model: PreTrainedModel,
    *,
    pretrained: bool | None = None,
    norm: str | None = None,
    resweight_init: float | None = None,
    resweight_sharing: str = "sublayer",
    final_norm: str | None = None,
    qk_norm: str = "keep",
    init: str | None = None,
    batch: Mapping[str, Any] | None = None,
) -> ReZeroReport:
    """Make a model of transformers a ReZero model: x <- x + w F(x) for each branch F (Bachlechner et al. 2020).

    The residual weight w, of shape (1,) and fp32, is a parameter `resweight` of the last projection of its branch. In a
    new model it starts at 0, the norms of the residual stream go, and the weights start anew (`initialize_` has the
    table); in a pretrained one w starts at 1 and all else stays, so that it computes what it did, to the bit.

    The table `hf_rezero.structure.architectures` says where branches end and norms stand. A small run checks it: with all
    branches at 0 and these norms gone each layer must return its input, to the bit.

    Args:
        model: Changed in place, with its config; its class becomes a subclass of what it was, and `save_pretrained`,
            `push_to_hub` and the Trainer write checkpoints that AutoModel reads.
        pretrained: Whether the weights are worth keeping; must be said of a model that came from a checkpoint.
        norm: "remove" or "keep" the norms of the residual stream. Default: they stay in a pretrained model.
        resweight_init: Default: 0, or 1 in a pretrained model.
        resweight_sharing: One residual weight for each "sublayer", or one for each "layer", as in the paper.
        final_norm: "keep" or "remove" those behind the last layer. Default: as `norm`. Where only this one is left, the
            loss does not see how large the stream grows, and nothing holds it.
        qk_norm: "keep" or "remove" those of queries and keys.
        init: "fan_in" for new weights, or "keep". Default: they are kept in a pretrained model.
        batch: Keyword arguments of a forward pass for the small run, where `structure.probe` can make none.

    Returns:
        What was done.

    Raises:
        ValueError: No row of the table describes the layers, or the small run disproves it; residual weights are there
            already; a last projection is tied, quantised, sharded or wrapped. The model is then as it was.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_rezero import rezero_
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 48, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
        >>> print(rezero_(model))
        48 layers, 96 residual weights on 96 projections, 97 norms removed, weights new
        >>> ids = torch.arange(8)[None]
        >>> stream = model(ids, output_hidden_states=True).hidden_states
        >>> torch.equal(stream[0], stream[-1]), isinstance(model, LlamaForCausalLM)
        (True, True)
    """
    norm, init = norm or ("keep" if pretrained else "remove"), init or ("keep" if pretrained else "fan_in")
    final_norm = final_norm or norm
    weight = float(pretrained or False) if resweight_init is None else float(resweight_init)
    _check_choices(norm=norm, init=init, final_norm=final_norm, qk_norm=qk_norm, resweight_sharing=resweight_sharing)
    _check_model(model, pretrained)
    layers = _find_layers(model)
    _check_writers(model, layers)
    if norm == "remove":
        _check_norms_are_named(layers)
    _probe(model, layers, _example(model, batch))
    removed = _norms(model, layers, stream=norm == "remove", final=final_norm == "remove", qk=qk_norm == "remove")
    for name in removed:
        model.set_submodule(name, nn.Identity())
    gates = _gate_layers(model, layers, weight, shared=resweight_sharing == "layer")
    deviations = _deviations(model, layers[0].architecture) if init == "fan_in" else {}
    write_record(model, resweight_init=weight, fan_in=init == "fan_in", deviations=deviations)
    if init == "fan_in":
        initialize_(model, Record.of(model.config))
        _scale_small_tables(model, layers, _example(model, batch))
    return ReZeroReport(tuple(layer.name for layer in layers), gates, tuple(removed), init == "fan_in")


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"got {name}={value!r}: expected {' or '.join(map(repr, CHOICES[name]))}.")


def _check_model(model: nn.Module, pretrained: bool | None) -> None:
    """Refuse what is no model of transformers, has residual weights, or may have weights worth keeping."""
    if stock_class(model) is None:
        raise ValueError(
            f"{type(model).__name__} is no model of transformers: rezero_ builds on its classes, so that checkpoints load "
            f"anywhere. Wrap the branches of other networks in hf_rezero.ReZero."
        )
    check_plain(model)
    found = next((name for name, _ in model.named_parameters() if is_resweight(name)), None)
    if found is not None:
        raise ValueError(f"{found} is there already: rezero_ goes once over a model.")
    if pretrained is None and getattr(model, "name_or_path", ""):
        raise ValueError(
            f"this model comes from {model.name_or_path}: say pretrained=True to keep what it computes, or "
            f"pretrained=False to start with new weights."
        )


def _find_layers(model: nn.Module) -> list[Layer]:
    """The layers of every stack that the table describes."""
    layers = []
    for stack_name, stack in stacks(model, at_least=1):
        found = {join(stack_name, str(i)): (module, row_of(module)) for i, module in enumerate(stack)}
        if not any(row for _, row in found.values()):
            continue
        for name, (module, row) in found.items():
            if row is None:
                raise ValueError(
                    f"{name} is a {type(module).__name__} that no row of the table describes: {HOW_TO_DESCRIBE}"
                )
            layers.append(Layer(name, module, *row))
    if not layers:
        raise ValueError(f"no row of the table describes the layers of {type(model).__name__}: {HOW_TO_DESCRIBE}")
    return layers


HOW_TO_DESCRIBE = "add one to hf_rezero.structure.architectures.ARCHITECTURES, as the guide of any architecture shows."


def _check_writers(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Refuse last projections that are no plain linear layers with a weight of their own."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for name in (writer for layer in layers for writer in layer.writers):
        module = model.get_submodule(name)
        if type(module) not in GATED:
            raise ValueError(
                f"{name} is a {type(module).__name__}: expected {' or '.join(plain.__name__ for plain in GATED)}. Put "
                f"adapters on, quantise and shard afterwards."
            )
        if len(owners[module.weight]) > 1:
            raise ValueError(
                f"{' and '.join(owners[module.weight])} are one tensor: a residual weight needs one of its own."
            )


def _check_norms_are_named(layers: Iterable[Layer]) -> None:
    """Refuse a layer with a norm that its row does not know."""
    for layer in layers:
        row = layer.row
        named = {*layer.parts((*row.branch_norms, *row.stream_norms, *row.qk_norms))}
        for path, module in layer.module.named_modules():
            if "norm" in type(module).__name__.lower() and join(layer.name, path) not in named:
                raise ValueError(
                    f"{join(layer.name, path)} is a norm that the row of its layer does not name: {HOW_TO_DESCRIBE}"
                )


def _example(model: nn.Module, batch: Mapping[str, Any] | None) -> Mapping[str, Any]:
    batch = example_of(model) if batch is None else batch
    if batch is None:
        raise ValueError(
            f"{type(model).__name__} reads {getattr(model, 'main_input_name', None)}: give a batch for a small run."
        )
    return batch


def _probe(model: nn.Module, layers: Iterable[Layer], batch: Mapping[str, Any]) -> None:
    """Run the model with zeros for all branches and without the norms of its layers; each layer must be the identity."""
    unchanged: dict[str, bool] = {}

    def watch(name: str):
        def compare(module, args, kwargs, output):
            before, after = _stream(args, kwargs), first_tensor(output)
            unchanged[name] = before is not None and after is not None and torch.equal(before, after)

        return model.get_submodule(name).register_forward_hook(compare, with_kwargs=True)

    handles = [watch(layer.name) for layer in layers]
    for layer in layers:
        for name in layer.writers:
            handles.append(
                model.get_submodule(name).register_forward_hook(lambda m, args, output: torch.zeros_like(output))
            )
        for name in layer.parts((*layer.row.branch_norms, *layer.row.stream_norms)):
            handles.append(model.get_submodule(name).register_forward_hook(lambda m, args, output: args[0]))
    try:
        run_quietly(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    wrong = next((layer for layer in layers if not unchanged.get(layer.name, False)), None)
    if wrong is not None:
        raise ValueError(
            f"{wrong.name} ({type(wrong.module).__name__}) {'changes its input' if wrong.name in unchanged else 'is not run'} "
            f"with {', '.join(wrong.row.writers)} at 0 and without its norms: it is no layer x + F(x) with these branches. "
            f"{HOW_TO_DESCRIBE.capitalize()}"
        )


def _stream(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    return first_tensor(args) if args else kwargs.get("hidden_states")


def _norms(model: nn.Module, layers: list[Layer], *, stream: bool, final: bool, qk: bool) -> list[str]:
    """Full names of the norms to remove."""
    removed, architecture = [], layers[0].architecture
    for layer in layers:
        row = layer.row
        removed += layer.parts((*row.branch_norms, *row.stream_norms)) if stream else []
        removed += layer.parts(row.qk_norms) if qk else []
    endings = (*(architecture.embedding_norms if stream else ()), *(architecture.final_norms if final else ()))
    inside = tuple(f"{layer.name}." for layer in layers)
    return removed + [n for n, _ in model.named_modules() if ends_with(n, endings) and not n.startswith(inside)]


def ends_with(name: str, endings: Iterable[str]) -> bool:
    """Whether the last parts of a dotted name are one of the endings."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _gate_layers(model: nn.Module, layers: Iterable[Layer], weight: float, *, shared: bool) -> dict[str, str]:
    gates = {}
    for layer in layers:
        for name in layer.writers:
            gates[name] = layer.writers[0] if shared else name
            holder = None if gates[name] == name else model.get_submodule(gates[name])
            gate_(model.get_submodule(name), weight, holder)
    return gates


def _deviations(model: PreTrainedModel, architecture: Architecture) -> dict[str, float]:
    """The standard deviations of what starts the residual stream, by names of the base model."""
    head, found = model.get_output_embeddings(), {}
    tied = None if head is None else head.weight
    for name, parameter in model.base_model.named_parameters(remove_duplicate=False):
        owner = name.removesuffix(".weight")
        if not parameter.requires_grad or parameter.ndim < 2:
            continue
        if ends_with(owner, architecture.embeddings):
            is_table = parameter.ndim == 2 and parameter is tied
            inputs = (
                parameter[0].numel() if parameter.ndim == 4 or is_table else 1
            )  # a projection of pictures reads pixels
            found[name] = inputs**-0.5
        elif ends_with(owner, architecture.positions):
            found[name] = 0.5
    return found


def _scale_small_tables(model: PreTrainedModel, layers: list[Layer], batch: Mapping[str, Any]) -> None:
    """Multiply the rows of tables that are small for their tied head, where the model itself does not."""
    head = model.get_output_embeddings()
    tied = [
        m
        for m in model.base_model.modules()
        if type(m) is nn.Embedding and head is not None and m.weight is head.weight
    ]
    if tied and _share_of_tables(model, tied, [layer for layer in layers if layer.name.endswith(".0")], batch) < SMALL:
        for table in tied:
            scale_(table, table.embedding_dim**0.5)
        write_record(model)


def _share_of_tables(
    model: nn.Module, tables: list[nn.Embedding], layers: list[Layer], batch: Mapping[str, Any]
) -> float:
    """The largest root mean square that the tables add to what one of the layers reads."""
    streams: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

    def run_and_look(*handles) -> None:
        look = lambda name: lambda module, args, kwargs: streams[name].append(_stream(args, kwargs))  # noqa: E731
        watched = [layer.module.register_forward_pre_hook(look(layer.name), with_kwargs=True) for layer in layers]
        try:
            run_quietly(model, batch)
        finally:
            for handle in (*watched, *handles):
                handle.remove()

    run_and_look()
    run_and_look(*(table.register_forward_hook(lambda m, args, output: torch.zeros_like(output)) for table in tables))
    return max((a - b).float().square().mean().sqrt().item() for a, b in streams.values())
