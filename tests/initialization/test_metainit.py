"""MetaInit against the gradient quotient with the full Hessian and the published loop, both written out here."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from hf_rezero import ReZero, ReZeroConfig, ReZeroForCausalLM
from hf_rezero.initialization.metainit import gradient_quotient, metainit_, random_batches


def image_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def take(number, *size):
    batches = random_batches(size, 3)
    return [next(batches) for _ in range(number)]


def test_gradient_quotient_by_the_full_hessian():
    model, (batch,) = mlp().double(), take(1, 8, 5)
    batch = (batch[0].double(), batch[1])
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)

    def loss_of(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (batch[0],)), batch[1])

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    g, hessian = torch.func.grad(loss_of)(flat), torch.autograd.functional.hessian(loss_of, flat)
    expected = sum(abs((g[i] - hessian[i] @ g) / (g[i] + (1e-5 if g[i] >= 0 else -1e-5)) - 1) for i in range(len(g)))
    actual = gradient_quotient(image_loss(model, batch), list(model.parameters()))
    assert actual.item() == pytest.approx(expected.item() / len(g), rel=1e-9)


def published_loop(model, batches, lr, momentum):
    """The loop of the paper's appendix: it writes into the model, one norm after the other."""
    params = [p for p in model.parameters() if p.ndim >= 2]
    memory = [0.0] * len(params)
    for batch in batches:
        quotient = gradient_quotient(image_loss(model, batch), list(model.parameters()))
        grads = torch.autograd.grad(quotient, params)
        for j, (p, grad) in enumerate(zip(params, grads, strict=True)):
            norm = p.data.norm().item()
            memory[j] = momentum * memory[j] - lr * torch.sign((p.data * grad).sum() / norm).item()
            p.data.mul_((norm + memory[j]) / norm)
    return model


def test_equals_the_published_loop():
    model = mlp().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [(x.double(), y) for x, y in take(12, 8, 5)]
    expected = published_loop(copy.deepcopy(model), batches, lr=0.02, momentum=0.9)
    report = metainit_(model, batches, scale_lr=0.02, num_steps=12, loss_fn=image_loss)
    assert set(report.scales) == {"0.weight", "3.weight", "5.weight"}
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=0)
        assert torch.equal(p, before[name] * report.scales.get(name, 1.0))
        assert (name in report.scales) == (not torch.equal(p, before[name]))


def test_the_quotient_falls_on_networks_that_are_far_from_linear():
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(12, 12), nn.Tanh())), nn.Linear(12, 3))
    for p in model.parameters():
        p.data.mul_(6 if p.ndim >= 2 else 1)
    report = metainit_(model, random_batches((16, 12), 3), scale_lr=0.3, num_steps=40, loss_fn=image_loss)
    start, end = (sum(e["gradient_quotient"] for e in part) for part in (report.history[:5], report.history[-5:]))
    assert end < 0.5 * start


def test_the_floor_holds():
    report = metainit_(mlp(), random_batches((8, 5), 3), scale_lr=50.0, num_steps=5, min_scale=0.2, loss_fn=image_loss)
    assert min(report.scales.values()) >= 0.2


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.head = nn.Linear(216, 3).eval()
        self.gate = ReZero(nn.Linear(3, 3), 0.5)

    def forward(self, x):
        return self.gate(self.head(self.dropout(self.norm(self.conv(x)).tanh().flatten(1))))


def random_states():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2:],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_else_is_touched(fails):
    model, batches, calls = Everything(), take(3, 8, 3, 8, 8), []
    before, modes, rng = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        random_states(),
    )

    def loss_fn(model, batch):
        calls.append(batch)
        if fails and len(calls) == 3:
            raise KeyboardInterrupt
        return image_loss(model, batch) * (1 + random.random() + np.random.rand() + torch.rand(()))

    if fails:
        with pytest.raises(KeyboardInterrupt):
            metainit_(model, batches, num_steps=3, loss_fn=loss_fn)
    else:
        report = metainit_(model, batches, num_steps=3, loss_fn=loss_fn)
        assert set(report.scales) == {"conv.weight", "head.weight", "gate.module.weight"}
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == (set() if fails else set(report.scales))
    assert [m.training for m in model.modules()] == modes and random_states() == rng
    assert all(p.grad is None for p in model.parameters())


def test_attention_can_be_differentiated_three_times():
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, 20, (4, 8))
    report = metainit_(model, [{"input_ids": ids, "labels": ids}] * 2, num_steps=2)
    assert "transformer.wte.weight" in report.scales and "lm_head.weight" not in report.scales


def test_resweight_0_is_refused_with_the_reason():
    config = ReZeroConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = ReZeroForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"residual weights of 0 \(model.layers.0.*resweight is one of 2\): .*epsilon"
    ):
        metainit_(model, [], num_steps=1)
    # The reason is true: the quotient is then inversely proportional to epsilon.
    ids = torch.randint(0, 20, (4, 8))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model.double()(input_ids=ids, labels=ids).loss
        weights = [p for n, p in model.named_parameters() if "layers.0.mlp" in n or n.endswith("resweight")]
        small, large = (gradient_quotient(loss, weights, epsilon).item() for epsilon in (1e-8, 1e-6))
    assert small / large == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(
    ("batches", "loss_fn", "message"),
    [
        (3, image_loss, "ran out after 3 of 5 steps; random_batches never ends"),
        (5, None, "a batch of type tuple has no loss by itself"),
        (5, lambda m, b: image_loss(m, b) * float("nan"), "MetaInit step 0: loss nan"),
    ],
)
def test_bad_input(batches, loss_fn, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        metainit_(model, take(batches, 8, 5), num_steps=5, loss_fn=loss_fn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reduce_decides_for_all_processes():
    """A mean that is far from the figure of this process turns every step round."""
    batches = take(3, 8, 5)
    model = mlp()
    plain = metainit_(copy.deepcopy(model), batches, num_steps=1, loss_fn=image_loss)
    turned = metainit_(model, batches, num_steps=1, loss_fn=image_loss, reduce=lambda ts: [-t for t in ts])
    assert all(turned.scales[n] - 1 == pytest.approx(1 - plain.scales[n]) for n in plain.scales)


def test_report(tmp_path):
    seen = []
    report = metainit_(
        mlp(), random_batches((8, 5), 3), num_steps=2, loss_fn=image_loss, callback=lambda h: seen.append(len(h))
    )
    assert seen == [1, 2] and "2 steps" in str(report) and "3.weight" in str(report)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["scales"] == report.scales
    quotients = report.plot(tmp_path / "report.png").axes[1].lines[0].get_ydata()
    assert list(quotients) == [entry["gradient_quotient"] for entry in report.history]
    assert (tmp_path / "report.png").exists() and "<td>3.weight</td>" in report._repr_html_()
    inputs, labels = next(random_batches((8, 3, 4, 4), 5))
    assert inputs.shape == (8, 3, 4, 4) and labels.shape == (8,) and labels.max() < 5
