"""Branches behind a zero residual weight that nothing will ever move, and those that only look so."""

import warnings

import pytest
import torch
from torch import nn

from hf_rezero import ReZero, ReZeroForCausalLM, RZTXEncoderLayer
from hf_rezero.diagnostics.resweights import FROZEN, ZERO_BRANCH, blocked_branches, warn_of_blocked_branches


def backward(model, x=None):
    model(torch.randn(3, 4) if x is None else x).square().sum().backward()
    return model


def zeroed(branch, part="module.2"):
    branch.get_submodule(part).weight.data.zero_()
    branch.get_submodule(part).bias.data.zero_()
    return branch


def net():
    return ReZero(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))


def steps(model, number=20):
    """Train, and tell which parameters have moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(number):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_what_is_reported_never_moves_and_what_is_not_does():
    blocked, frozen, healthy = zeroed(net()), net(), net()
    frozen.resweight.requires_grad_(False)
    assert blocked_branches(backward(blocked)) == {"resweight": ZERO_BRANCH}
    assert blocked_branches(frozen) == {"resweight": FROZEN}
    assert blocked_branches(backward(healthy)) == {}
    assert steps(blocked) == steps(frozen) == set()
    assert len(steps(healthy)) == 5


def test_one_zero_alone_is_no_obstacle():
    away = zeroed(net())
    away.resweight.data.fill_(0.1)
    biased = zeroed(net())
    biased.module[2].bias.data.fill_(1.0)
    for model in (away, biased):
        assert blocked_branches(backward(model)) == {}
        assert "module.0.weight" in steps(model)


def test_a_zero_head_and_a_frozen_model_are_no_blocked_branches(make_config, ids):
    model = ReZeroForCausalLM(make_config(resweight_init=0.0))
    model.lm_head.weight.data.zero_()
    model(ids, labels=ids).loss.backward()
    assert all(not p.grad.any() for name, p in model.named_parameters() if "resweight" in name)
    assert blocked_branches(model) == {}
    assert blocked_branches(model.requires_grad_(False)) == {}


@pytest.mark.parametrize("sharing", ["layer", "sublayer"])
def test_a_sublayer_is_judged_by_its_own_weight(make_config, ids, sharing):
    model = ReZeroForCausalLM(make_config(resweight_init=0.0, resweight_sharing=sharing))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    model(ids, labels=ids).loss.backward()
    names = [f"model.layers.{i}.residuals.mlp.resweight" for i in range(3)]
    assert list(blocked_branches(model)) == (names if sharing == "sublayer" else [])
    model = ReZeroForCausalLM(make_config(resweight_init=0.0, resweight_sharing=sharing)).requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_()
    name = "layer" if sharing == "layer" else "self_attn"
    assert blocked_branches(model) == {f"model.layers.1.residuals.{name}.resweight": FROZEN}


def test_official_layers_are_judged_too():
    layer = RZTXEncoderLayer(4, 2, 8, batch_first=True)
    layer.linear2.weight.data.zero_()
    layer.linear2.bias.data.zero_()
    assert blocked_branches(backward(layer, torch.randn(2, 3, 4))) == {}  # its attention moves the shared weight
    zeroed(layer, "self_attn.out_proj")
    layer.zero_grad()
    assert blocked_branches(backward(layer, torch.randn(2, 3, 4))) == {"resweight": ZERO_BRANCH}


def test_the_warning_names_the_branch_and_the_ways_out():
    with pytest.warns(
        UserWarning, match="1 residual branches will never learn: resweight is 0 and .*`modules_to_save`"
    ):
        warn_of_blocked_branches(backward(zeroed(net())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_blocked_branches(backward(net()))
