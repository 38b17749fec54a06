"""LoRA of PEFT: trains, saves, loads and merges; and where a zero residual weight would keep it from learning."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.stock_models import STOCK, inputs, stir
from transformers import AutoModelForCausalLM

from hf_rezero import ReZeroForCausalLM, ReZeroForSequenceClassification, fold_resweight_, rezero_
from hf_rezero.diagnostics.resweights import FROZEN, blocked_branches


peft = pytest.importorskip("peft", reason="pip install peft")
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def lora(model, **values):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": MATRICES, **values}))


def train(model, ids, steps=8):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lora_trains_saves_loads_and_merges(make_config, ids, tmp_path):
    base = ReZeroForCausalLM(make_config(initializer_range=1.0))
    base.save_pretrained(tmp_path / "base")
    before = base(ids).logits
    model = lora(base, task_type="CAUSAL_LM")
    torch.testing.assert_close(model(ids).logits, before)
    losses = train(model, ids)
    assert losses[-1] < 0.9 * losses[0] and blocked_branches(model) == {}
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(again(ids).logits, before)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    expected = model(ids).logits
    torch.testing.assert_close(again(ids).logits, expected)
    assert torch.equal(
        again.generate(input_ids=ids, max_new_tokens=4), model.generate(input_ids=ids, max_new_tokens=4)
    )
    merged = again.merge_and_unload()
    assert type(merged) is ReZeroForCausalLM
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_residual_weights_of_our_models_multiply_the_adapters_before_and_after_merging(make_config, ids):
    model = lora(ReZeroForCausalLM(make_config(resweight_init=0.3)), init_lora_weights=False).eval()
    expected = model(ids).logits
    with pytest.raises(ValueError, match="merge them or unload them first"):
        fold_resweight_(model)
    torch.testing.assert_close(model(ids).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fold_resweight_(merged)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_loads_through_transformers(make_config, ids, tmp_path):
    base = ReZeroForCausalLM(make_config(initializer_range=1.0)).eval()
    base.save_pretrained(tmp_path / "base")
    model = lora(base)
    train(model, ids, 2)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)


def test_a_classifier_trains_its_head_with_the_adapter(make_config, ids):
    model = lora(ReZeroForSequenceClassification(make_config(num_labels=2)), task_type="SEQ_CLS")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained) and not any("resweight" in name for name in trained)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()


def test_frozen_zeros_block_every_adapter_and_are_reported(make_config, ids):
    model = lora(ReZeroForCausalLM(make_config(resweight_init=0.0)))
    prefix = "base_model.model.model.layers"
    assert blocked_branches(model) == {f"{prefix}.{i}.residuals.layer.resweight": FROZEN for i in range(3)}
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_modules_to_save_lets_the_residual_weights_learn_and_keeps_them(make_config, ids, tmp_path):
    base = ReZeroForCausalLM(make_config(resweight_init=0.0))
    model = lora(base, modules_to_save=["residuals.layer"])
    losses = train(model, ids)
    assert losses[-1] < losses[0] and blocked_branches(model) == {}
    model.eval().save_pretrained(tmp_path)
    saved = {name: t for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if "resweight" in name}
    assert len(saved) == 3 and all(t.any() for t in saved.values())
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.any() for p in adapters)


# gates in the projections of a model of transformers: PEFT adds B A x to w (W x + b), and B A to W

GATED = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def gated_with_adapters(name, **values):
    """A rewritten model with adapters that have learned something, around gated and other projections."""
    model = STOCK[name]()
    rezero_(model, resweight_init=0.5)
    values |= {"target_modules": GATED[name], "fan_in_fan_out": name == "gpt2"}
    return lora(stir(model), init_lora_weights=False, **values).eval()


def logits_of(model, name):
    return model(**inputs(name)).logits


def assert_equal_function(model, name, expected):
    assert (logits_of(model, name) - expected).abs().max() < 1e-5 * expected.abs().max()


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safely": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter() or model,
    "copied": lambda model: copy.deepcopy(model).merge_and_unload(),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("name", GATED)
def test_merging_into_a_gated_projection_is_refused_until_it_is_folded(name, merge):
    model = gated_with_adapters(name)
    expected = logits_of(model, name)
    with pytest.raises(ValueError, match=r"call fold_resweight_\(model\) first"):
        MERGES[merge](model)
    assert_equal_function(model, name, expected)
    fold_resweight_(model)
    assert_equal_function(model, name, expected)
    merged = MERGES[merge](model)
    assert_equal_function(merged, name, expected)


def test_a_model_is_unloaded_with_its_gates():
    model = gated_with_adapters("llama")
    with model.disable_adapter():
        expected = logits_of(model, "llama")
    assert torch.equal(logits_of(model.unload(), "llama"), expected)


def test_adapters_beside_the_gates_are_merged():
    model = STOCK["llama"]()
    rezero_(model, resweight_init=0.5)
    model = lora(stir(model), target_modules=["q_proj", "up_proj"], init_lora_weights=False).eval()
    expected = logits_of(model, "llama")
    assert_equal_function(model.merge_and_unload(), "llama", expected)


def test_adapters_that_rescale_the_weight_must_be_added_after_folding():
    model = gated_with_adapters("llama", use_dora=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"o_proj .* fold the model before you add the adapters"):
        fold_resweight_(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="fold_resweight_"):
        model.merge_and_unload()


def test_adapters_of_a_gated_model_fit_the_folded_one(tmp_path):
    model = gated_with_adapters("llama")
    expected = logits_of(model, "llama")
    model.save_pretrained(tmp_path)
    folded = fold_resweight_(model.unload())
    again = peft.PeftModel.from_pretrained(folded, tmp_path).eval()
    assert_equal_function(again, "llama", expected)
    assert_equal_function(again.merge_and_unload(), "llama", expected)
