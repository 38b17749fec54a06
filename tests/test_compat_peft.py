"""LoRA of PEFT: trains, saves, loads and merges; and where a zero residual weight would keep it from learning."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_rezero import ReZeroForCausalLM, ReZeroForSequenceClassification
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
