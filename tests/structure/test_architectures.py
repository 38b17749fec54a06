"""What the table says of stock models, against the modules that they have."""

import pytest
from support.pruning_models import STOCK, TEXT, build
from torch import nn

from hf_rezero.rewrite.rezero import ends_with
from hf_rezero.structure.modules import child
from hf_rezero.structure.residual import row_of, stacks, writers_of


NAMES = [*(name for name in TEXT if "rezero" not in name), "vit", "whisper"]
HEADS = ("cls.predictions", "lm_head", "vocab_layer_norm", "head")  # what predicts from the residual stream


def is_any_norm(module):
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))


def residual_layers(model):
    """The name of each stack that the table knows, and its layers."""
    return [(name, stack) for name, stack in stacks(model) if row_of(stack[-1]) is not None]


@pytest.mark.parametrize("name", NAMES)
def test_the_row_of_a_layer_names_each_of_its_norms(name):
    found = residual_layers(build(name)[0])
    assert len(found) == (2 if name in ("t5", "t5_gated", "bart", "whisper") else 1)
    for layer in (layer for _, stack in found for layer in stack):
        _, row = row_of(layer)
        named = {child(layer, part) for part in (*row.branch_norms, *row.stream_norms, *row.qk_norms)} - {None}
        assert {m for m in named if is_any_norm(m)} == {module for module in layer.modules() if is_any_norm(module)}
        assert row.writers == writers_of(layer)


@pytest.mark.parametrize("name", NAMES)
def test_the_row_of_a_model_names_its_other_norms_but_for_those_of_a_head(name):
    model = build(name)[0]
    found = residual_layers(model)
    rows = [row_of(stack[-1])[0] for _, stack in found]
    endings = tuple(ending for row in rows for ending in (*row.final_norms, *row.embedding_norms))
    inside = tuple(prefix for prefix, _ in found)
    others = {n for n, module in model.named_modules() if is_any_norm(module) and not n.startswith(inside)}
    assert {n for n in others if not ends_with(n, endings)} == {n for n in others if n.startswith(HEADS)}


@pytest.mark.parametrize("name", NAMES)
def test_every_table_and_tensor_that_makes_the_stream_has_a_row(name):
    model = build(name)[0]
    found = residual_layers(model)
    inside = tuple(prefix for prefix, _ in found)
    rows = [row_of(stack[-1])[0] for _, stack in found]
    endings = tuple(ending for row in rows for ending in (*row.embeddings, *row.positions))
    kinds = (nn.Embedding, nn.Conv2d)
    tables = [n for n, module in model.named_modules() if isinstance(module, kinds) and not n.startswith(inside)]
    tensors = [n for n, _ in model.named_parameters() if n.rpartition(".")[2] in ("cls_token", "position_embeddings")]
    assert tables + tensors and not [n for n in tables + tensors if not ends_with(n, endings)]


def test_a_layer_without_a_branch_still_tells_its_writers():
    layer = build("llama")[0].model.layers[0]
    layer.self_attn = None
    assert writers_of(layer) == ("mlp.down_proj",) and row_of(layer) is None
    assert {row for row in STOCK if writers_of(nn.Linear(2, 2))} == set()
