"""A small run of a model, which tells whether it is what a table says of it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .kept import modes_kept, random_numbers_kept
from .modules import config_of


TOKENS = 5


def example_of(model: nn.Module) -> dict[str, Tensor] | None:
    """A batch of one random text, picture or spectrogram, as its config has it; None for what is no such model.

    Example:
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
        >>> example_of(model)["input_ids"].shape
        torch.Size([1, 5])
    """
    config, reads = config_of(model), getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters(), None)
    if config is None or first is None:
        return None
    ids = torch.randint(getattr(config, "vocab_size", None) or 1, (1, TOKENS), generator=generator)
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    shapes = {
        "pixel_values": lambda: (getattr(config, "num_channels", 3), *_sides(getattr(config, "image_size", 32))),
        "input_features": lambda: (config.num_mel_bins, 2 * config.max_source_positions),
    }
    if reads == "input_ids":
        batch = {reads: ids, **decoder}
    elif reads in shapes:
        batch = {reads: torch.randn(1, *shapes[reads](), generator=generator).to(first.dtype), **decoder}
    else:
        return None
    return {name: value.to(first.device) for name, value in batch.items()}


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


@contextmanager
def zeroed(model: nn.Module, tensors: Iterable[str]) -> Iterator[None]:
    """Run modules with zeros in place of some of their parameters; the parameters themselves are not touched."""
    originals = []
    try:
        for name in tensors:
            path, _, attribute = name.rpartition(".")
            own, tensor = model.get_submodule(path)._parameters, model.get_parameter(name)
            originals.append((own, attribute, tensor))
            own[attribute] = nn.Parameter(torch.zeros_like(tensor[..., :1]).expand_as(tensor), requires_grad=False)
        yield
    finally:
        for own, attribute, tensor in reversed(originals):
            own[attribute] = tensor


@torch.no_grad()
def run_quietly(model: nn.Module, example: Mapping[str, Tensor]) -> None:
    """One forward pass in eval mode, after which modes and random numbers are what they were."""
    with modes_kept(model), random_numbers_kept():
        model.eval()
        model(**example)


def first_tensor(values: Any) -> Tensor | None:
    """The tensor, or the first one of a tuple."""
    values = values if isinstance(values, tuple) else (values,)
    return next((value for value in values if isinstance(value, Tensor)), None)


def changing_layers(model: nn.Module, gates: Mapping[str, Iterable[str]]) -> set[str]:
    """The layers that change their input although all their gates are 0, of a model that `example_of` has an input for.

    Args:
        model: The model, which comes back as it was.
        gates: Names of the tensors that shall switch each layer off.

    Example:
        Without its last projections a layer of GPT-2 is the identity, and one of BERT still normalises:

        >>> from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
        >>> gpt2 = GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> changing_layers(gpt2, {"h.0": [f"h.0.{b}.c_proj.{t}" for b in ("attn", "mlp") for t in ("weight", "bias")]})
        set()
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> bert = BertModel(BertConfig(vocab_size=9, **sizes))
        >>> gate = "encoder.layer.0.{}output.dense.{}"
        >>> gates = [gate.format(b, t) for b in ("attention.", "") for t in ("weight", "bias")]
        >>> changing_layers(bert, {"encoder.layer.0": gates})
        {'encoder.layer.0'}
    """
    example, seen = example_of(model), set()
    if example is None:
        return set()

    def watch(name: str):
        def compare(module, args, kwargs, output):
            before = first_tensor(args) if args else kwargs.get("hidden_states")
            after = first_tensor(output)
            if before is None or after is None or not torch.equal(before, after):
                seen.add(name)

        return model.get_submodule(name).register_forward_hook(compare, with_kwargs=True)

    handles = [watch(name) for name in gates]
    try:
        with zeroed(model, {tensor for tensors in gates.values() for tensor in tensors}):
            run_quietly(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen
