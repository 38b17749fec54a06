"""Weights by rows or columns: the same model, faster one token at a time."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support.pruning_models import stir
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_rezero import ReZeroForCausalLM, layout_
from hf_rezero.rewrite import layout


TOKENS = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=["ReZero", "GPT-2", "Llama"])
def model(request, make_config):
    """Models with `nn.Linear` and with `Conv1D`, the head of GPT-2 tied."""
    build = {
        "ReZero": lambda: ReZeroForCausalLM(make_config()),
        "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **TOKENS)),
        "Llama": lambda: LlamaForCausalLM(
            LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, **TOKENS)
        ),
    }[request.param]
    torch.manual_seed(0)
    return stir(build()).eval()


def orders(model):
    """The order of each W (out, in)."""
    return {name: layout._order(layout._matrix(m)) for name, m in model.named_modules() if layout.is_linear(m)}


def given(times, monkeypatch):
    """As if each product took this long; the clock of the tests' machine decides nothing."""
    monkeypatch.setattr(layout, "_microseconds", lambda modules, *_: times(*layout._matrix(modules[0]).shape))


@pytest.mark.parametrize("order", ["fastest", "rows", "columns"])
def test_values_gradients_and_checkpoints_stay_what_they_are(model, ids, tmp_path, order):
    before, state = model(ids).logits, {name: t.clone() for name, t in model.state_dict().items()}
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    layout_(model, order, rounds=2)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, gradients, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(state[name], t) for name, t in again.state_dict().items())
    torch.testing.assert_close(again(ids).logits, before, rtol=0, atol=0)


def test_each_shape_has_its_faster_order(model, monkeypatch):
    given(lambda out, into: {"rows": 2.0, "columns": 1.0 if out > into else 3.0}, monkeypatch)
    tied = isinstance(model, GPT2LMHeadModel)
    report = layout_(model)
    for name, module in model.named_modules():
        if layout.is_linear(module) and name not in report.skipped:
            out, into = layout._matrix(module).shape
            assert orders(model)[name] == ("columns" if out > into else "rows")
    assert report.skipped == ({"lm_head": "shared"} if tied else {})
    expected = sum(s.num_weights * s.microseconds[s.after] for s in report.shapes)
    expected /= sum(s.num_weights * s.microseconds[s.before] for s in report.shapes)
    assert report.ratio == expected < 1 and "columns" in str(report)


def test_what_is_no_faster_stays(model, monkeypatch):
    given(lambda *_: {"rows": 1.0, "columns": 1.0}, monkeypatch)
    before, addresses = orders(model), [p.data_ptr() for p in model.parameters()]
    assert layout_(model).ratio == 1
    assert orders(model) == before and [p.data_ptr() for p in model.parameters()] == addresses


def test_rows_undo_columns(model):
    layout_(model, "columns")
    assert {order for name, order in orders(model).items() if name != "lm_head"} == {"columns"}
    report = layout_(model, "rows")
    assert {order for name, order in orders(model).items() if name != "lm_head"} == {"rows"} and report.ratio is None


def test_timing_leaves_no_trace():
    linear = nn.Linear(16, 64)
    weight = linear.weight.data_ptr()
    times = layout._microseconds([linear], "rows", 1, 2)
    assert set(times) == {"rows", "columns"} and min(times.values()) > 0
    assert linear.weight.data_ptr() == weight and linear.weight.is_contiguous()


def test_what_must_not_be_moved_is_named(monkeypatch):
    given(lambda *_: {"rows": 2.0, "columns": 1.0}, monkeypatch)
    net = nn.ModuleDict({name: nn.Linear(8, 16) for name in ("plain", "a", "b", "hooked", "offloaded", "normed")})
    net["b"].weight = net["a"].weight
    net["hooked"].register_forward_hook(lambda *_: None)
    add_hook_to_module(net["offloaded"], ModelHook())
    weight_norm(net["normed"])
    net["meta"] = nn.Linear(8, 16, device="meta")
    net["view"] = nn.Linear(8, 16)
    net["view"].weight.data = torch.zeros(16, 20)[:, :8]
    net["integer"] = nn.Linear(8, 16)
    net["integer"].weight = nn.Parameter(torch.ones(16, 8, dtype=torch.int8), requires_grad=False)
    report = layout_(net)
    assert orders({"plain": net["plain"]}["plain"]) == {"": "columns"}
    assert report.skipped == {
        "a": "shared",
        "b": "shared",
        "hooked": "hooked",
        "offloaded": "hooked",
        "normed": "parametrised",
        "meta": "a Tensor of torch.float32 on meta",
        "view": "a view of a larger tensor",
        "integer": "a Tensor of torch.int8 on cpu",
    }
    assert "left alone: hooked is hooked" in str(report)


@pytest.mark.parametrize("values", [{"order": "diagonal"}, {"tokens": 0}, {"rounds": 0}])
def test_bad_arguments_are_refused(values):
    with pytest.raises(ValueError, match=f"got order=.*{next(iter(values.values()))}"):
        layout_(nn.Linear(2, 2), **values)
