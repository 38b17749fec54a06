"""What the table says is tried on the model: what does not go exactly is not offered, and the model stays as it was."""

import copy

import pytest
import torch
from support.pruning_models import OTHERS, STOCK, TEXT, build
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, Olmo2Config, Olmo2ForCausalLM

from hf_rezero.pruning import find_groups
from hf_rezero.structure.architectures import ARCHITECTURES, FeedForward, FusedAttention


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def refuses(model, target):
    with pytest.raises(ValueError, match=f"no rule finds {target} in {type(model).__name__}"):
        find_groups(model, [target])


@pytest.mark.parametrize(("name", "row", "wrong"), [
    ("gpt_neox", "GPT-NeoX", {"fused_attention": FusedAttention("query_key_value", "dense")}),
    ("gpt2", "GPT-2", {"fused_attention": FusedAttention("c_attn", "c_proj", by_head=True)}),
    ("modernbert", "ModernBERT", {"fused_attention": FusedAttention("Wqkv", "Wo", by_head=True)}),
    ("phi3", "Phi-3", {"fused_attention": FusedAttention("qkv_proj", "o_proj")}),
    ("t5", "T5", {"tied_heads": ()}),
])  # fmt: skip
def test_heads_that_a_row_describes_wrongly_are_not_found(name, row, wrong, monkeypatch):
    model, _ = build(name)
    assert find_groups(model, ["heads"])
    monkeypatch.setitem(ARCHITECTURES, row, ARCHITECTURES[row]._replace(**wrong))
    refuses(model, "heads")


def test_neurons_that_a_row_describes_wrongly_are_not_found(monkeypatch):
    """The halves of Phi-3's projection taken for neurons that stand alternately, as one row less would."""
    model, _ = build("llama")
    row = ARCHITECTURES["ReZero, Llama, Mistral, Qwen, Gemma"]
    monkeypatch.setitem(
        ARCHITECTURES,
        "ReZero, Llama, Mistral, Qwen, Gemma",
        row._replace(feed_forwards=(FeedForward(("up_proj",), "down_proj"),)),
    )
    refuses(model, "neurons")


def test_families_that_share_names_and_compute_something_else_are_not_found():
    # the position bias of Bloom counts heads, and the norms of OLMo 2 span all of them
    refuses(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)), "heads")
    refuses(Olmo2ForCausalLM(Olmo2Config(**SIZES, pad_token_id=0)), "heads")
    assert find_groups(Olmo2ForCausalLM(Olmo2Config(**SIZES, pad_token_id=0)), ["neurons"])


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "bart", "opt_post_norm"])
def test_layers_that_normalise_their_sum_say_so(name):
    model, _ = build(name)
    with pytest.raises(ValueError, match=r"normalises the sum x \+ F\(x\), .* \(post-norm\)"):
        find_groups(model, ["layers"])


@pytest.mark.parametrize("name", ["modernbert", "t5"])
def test_a_first_layer_that_others_rest_on_stays(name):
    for group in find_groups(build(name)[0], ["layers"]):
        assert group.num_units and not any(part.endswith(".0") for part in group.parts)


def test_heads_of_t5_go_from_all_layers_together_with_their_position_bias():
    groups = find_groups(build("t5")[0], ["heads"])
    assert [(group.name, group.num_units, len(group.readers)) for group in groups] == [
        ("encoder.block.*.layer.0.SelfAttention", 4, 4),
        ("decoder.block.*.layer.0.SelfAttention", 4, 3),
        ("decoder.block.*.layer.1.EncDecAttention", 4, 3),
    ]
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert table in {cut.tensor for cut in groups[0].cuts}


@pytest.mark.parametrize("name", ["gpt2", *OTHERS, *(n for n in STOCK if n in TEXT)])
def test_a_search_leaves_the_model_as_it_was(name):
    model, _ = build(name, torch.float32)
    model.train()
    model.get_submodule(next(n for n, _ in model.named_modules() if "." in n)).eval()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    modes, numbers = [m.training for m in modules], torch.random.get_rng_state()
    find_groups(model)
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(model.state_dict().values(), before.values(), strict=True))
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.random.get_rng_state(), numbers)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_in_half_precision_is_tried_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).bfloat16()
    assert {group.kind for group in find_groups(model)} == {"heads", "neurons"}
