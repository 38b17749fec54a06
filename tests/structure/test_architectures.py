"""What the table says of stock models, against the modules that they have."""

import pytest
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_rezero.rewrite.rezero import ends_with
from hf_rezero.structure.modules import child
from hf_rezero.structure.residual import row_of, stacks


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=1, n_head=2)),
    "bert": (BertForMaskedLM, BertConfig(**SIZES)),
    "vit": (ViTForImageClassification, ViTConfig(**SIZES, image_size=8, patch_size=4)),
}


def is_any_norm(module):
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


@pytest.mark.parametrize("name", MODELS)
def test_the_row_of_a_layer_names_each_of_its_norms(name):
    model_class, config = MODELS[name]
    ((_, stack),) = stacks(model_class(config), at_least=1)
    _, row = row_of(stack[0])
    named = {child(stack[0], part) for part in (*row.branch_norms, *row.stream_norms, *row.qk_norms)} - {None}
    assert named == {module for module in stack[0].modules() if is_any_norm(module)}


@pytest.mark.parametrize("name", MODELS)
def test_the_row_of_a_model_names_its_other_norms_but_for_those_of_a_head(name):
    model_class, config = MODELS[name]
    model = model_class(config)
    ((prefix, stack),) = stacks(model, at_least=1)
    row, _ = row_of(stack[0])
    endings = (*row.final_norms, *row.embedding_norms)
    others = {n for n, module in model.named_modules() if is_any_norm(module) and not n.startswith(prefix)}
    assert {n for n in others if not ends_with(n, endings)} == {n for n in others if n.startswith("cls.predictions")}


@pytest.mark.parametrize("name", MODELS)
def test_every_table_and_tensor_that_makes_the_stream_has_a_row(name):
    model_class, config = MODELS[name]
    model = model_class(config)
    row, _ = row_of(next(stack for _, stack in stacks(model, at_least=1))[0])
    tables = [n for n, module in model.named_modules() if isinstance(module, (nn.Embedding, nn.Conv2d))]
    tensors = [n for n, _ in model.named_parameters() if n.rpartition(".")[2] in ("cls_token", "position_embeddings")]
    assert all(n.endswith((*row.embeddings, *row.positions)) for n in tables + tensors)
    assert tables + tensors
