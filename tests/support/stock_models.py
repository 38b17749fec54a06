"""Small models of transformers, an input for each, and residual weights and norms at which nothing is equal."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
TOKENS = {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**SIZES, **TOKENS, "max_position_embeddings": 64}


def llama(**config):
    return LlamaForCausalLM(LlamaConfig(**TEXT, **config))


def mistral(**config):
    return MistralForCausalLM(MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=8, **config))


def qwen3(**config):
    """With norms of queries and keys, and a tied head."""
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **config))


def gpt2(**config):
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **TOKENS, **config))


def bert(**config):
    return BertForMaskedLM(BertConfig(**TEXT, **config))


def vit(**config):
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3, **config))


STOCK = {f.__name__: f for f in (llama, mistral, qwen3, gpt2, bert, vit)}
DECODERS = ("llama", "mistral", "qwen3", "gpt2")


def inputs(name):
    """Keyword arguments of a forward pass."""
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 264, (2, 12), generator=generator)}


def with_labels(name):
    batch = inputs(name)
    return batch | {"labels": torch.tensor([0, 2]) if name == "vit" else batch["input_ids"]}


@torch.no_grad()
def stir(model):
    """No resweight at its start, no bias at 0, no norm at (0, 1): values at which everything is equal."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        if name.endswith("resweight"):
            parameter.add_(0.5)
    return model.eval()
