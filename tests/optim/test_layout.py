"""Layouts in memory: whatever the strides of weight, gradient and state, the steps are those of contiguous tensors."""

import copy

import pytest
import torch
from torch import nn

from hf_rezero.optim.registry import BASES, parse_optimizer


SHAPES = [(4, 3), (5, 2, 3, 3), (7,), (1,)]


def with_gaps(tensor):
    return torch.stack([tensor, torch.full_like(tensor, 9.0)], -1)[..., 0]


def transposed_with_gaps(tensor):
    return with_gaps(tensor.transpose(0, -1).contiguous()).transpose(0, -1)


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.clone()


LAYOUTS = {f.__name__: f for f in (torch.clone, with_gaps, transposed_with_gaps, channels_last)}
NAMES = [*BASES, "gc+lookahead+radam", "gc+lars", "snoo+muon", "lookahead+lamb"]


def build(name, params):
    spec = parse_optimizer(name)
    return spec.wrap(spec.base.make(params, lr=0.03, weight_decay=0.1, **spec.base.fixed))


def weights(layout):
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(layout(torch.randn(s, dtype=torch.float64, generator=random))) for s in SHAPES]


def train(optimizer, params, layout, steps):
    for t in steps:
        random = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = layout(torch.randn(p.shape, dtype=torch.float64, generator=random))
        optimizer.step()


def assert_same(optimizer, params, other, theirs):
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(value, other.state[q][key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_layout_of_weights_and_gradients(name, weight, gradient):
    params, theirs = weights(LAYOUTS[weight]), weights(torch.clone)
    mine, other = build(name, params), build(name, theirs)
    train(mine, params, LAYOUTS[gradient], range(12))
    train(other, theirs, torch.clone, range(12))
    assert_same(mine, params, other, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_weights_whose_layout_changes_under_the_state(name):
    """As by `model.to(memory_format=...)` in the middle, or by a checkpoint of the model before it."""
    params, theirs, loaded = weights(torch.clone), weights(torch.clone), weights(channels_last)
    mine, other, third = build(name, params), build(name, theirs), build(name, loaded)
    train(mine, params, torch.clone, range(6))
    train(other, theirs, torch.clone, range(12))
    third.load_state_dict(copy.deepcopy(mine.state_dict()))
    for p, q in zip(params, loaded, strict=True):
        q.data.copy_(p)
        p.data = channels_last(p.data)
    train(mine, params, channels_last, range(6, 12))
    train(third, loaded, channels_last, range(6, 12))
    assert_same(mine, params, other, theirs)
    assert_same(third, loaded, other, theirs)
