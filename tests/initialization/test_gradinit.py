"""GradInit against Algorithm 1 written out with autograd through the scales, on models it has never seen."""

import copy
import io
import json
import math
import multiprocessing
import random
import warnings
from collections import namedtuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_rezero import Muon, ReZero, ReZeroConfig, ReZeroForCausalLM, param_groups
from hf_rezero.initialization.gradinit import GradInit, GradInitReport, gradinit_, half_overlap
from hf_rezero.initialization.trial import mean_over_processes
from hf_rezero.structure.kept import random_numbers_kept


pytestmark = pytest.mark.filterwarnings("ignore:the gradient norm")


# Models


class Net(nn.Module):
    """Everything at once: a tied matrix, a gate, a norm, zero biases, a zero matrix, dropout, a buffer."""

    def __init__(self, resweight=0.3):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.dropout = nn.Dropout(0.5)
        self.block = ReZero(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), resweight)
        self.norm = nn.LayerNorm(8)
        self.extra = nn.Parameter(torch.zeros(8, 8))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        nn.init.zeros_(self.head.bias)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, ids):
        self.calls += 1
        x = self.block(self.dropout(self.embed(ids)))
        return self.head(self.norm(x + x @ self.extra))


def net_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def net_batches(number, rows=8):
    return [(torch.randint(0, 11, (rows,)), torch.randint(0, 11, (rows,))) for _ in range(number)]


def gpt2(layers=2, **values):
    sizes = {"vocab_size": 34, "n_positions": 16, "n_embd": 32, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, **sizes, **values))


def bert(layers=2, **values):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16}
    config = BertConfig(vocab_size=34, num_hidden_layers=layers, num_labels=4, pad_token_id=0, **sizes, **values)
    return BertForSequenceClassification(config)


def rezero(resweight, layers=2, **values):
    sizes = {"vocab_size": 34, "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    return ReZeroForCausalLM(
        ReZeroConfig(num_hidden_layers=layers, resweight_init=resweight, pad_token_id=0, **sizes, **values)
    )


def vgg(layers=6, norm=False, width=12):
    parts, channels = [], 3
    for i in range(layers):
        parts += [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
        ]
        parts += [nn.MaxPool2d(2)] if i in (1, 4) else []
        channels = width
    return kaiming_(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)))


class Block(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = (nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet(blocks=4, norm=False, width=12):
    trunk = [Block(width, norm) for _ in range(blocks)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return kaiming_(nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *trunk, *head))


def kaiming_(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def text(number, rows=8):
    """Counting by 1 or by 2 from a random start, modulo 32."""
    for _ in range(number):
        ids = (torch.randint(0, 32, (rows, 1)) + torch.randint(1, 3, (rows, 1)) * torch.arange(16)) % 32
        yield {"input_ids": ids, "labels": ids}


def classes(number, rows=16):
    """Sequences in which 4 of 10 tokens come from an eighth of the vocabulary that tells the class."""
    for _ in range(number):
        labels = torch.randint(0, 4, (rows,))
        own = 1 + 8 * labels[:, None] + torch.randint(0, 8, (rows, 12))
        ids = torch.where(torch.rand(rows, 12) < 0.4, own, torch.randint(1, 33, (rows, 12)))
        yield {"input_ids": ids, "labels": labels}


def images(number, rows=24):
    """Four patterns in noise of the same size."""
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    for _ in range(number):
        labels = torch.randint(0, 4, (rows,))
        yield patterns[labels] + torch.randn(rows, 3, 8, 8), labels


def image_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# The oracle


def polar(matrices, steps=None):
    """U V^T of U S V^T, over the singular values that are not zero."""
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    return u * (s > 1e-9 * s[..., :1]).unsqueeze(-2) @ vt


def oracle_step(algorithm, grads, theta, trusted):
    """The trial step A[g] of each tensor and the norm that belongs to it."""
    if algorithm == "sgd":
        return grads, torch.cat([g.flatten() for g in grads.values()]).norm()
    if algorithm == "sgd_normalized":
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        return {n: g / norm for n, g in grads.items()}, norm
    if algorithm == "muon":
        factors = {n: 0.2 * max(grads[n].shape) ** 0.5 for n in ("block.module.0.weight", "block.module.2.weight")}
        steps = {n: factors[n] * polar(g) if n in factors else g.sign() for n, g in grads.items()}
        norms = {n: factors[n] * torch.linalg.matrix_norm(grads[n], "nuc") for n in factors}
        return steps, sum(norms.values()) + sum(g.abs().sum() for n, g in grads.items() if n not in factors)
    steps = {}
    for name, g in grads.items():
        direction = g if algorithm == "lars" else g.sign()
        ratio = theta[name].norm() / direction.norm() * (0.02 if algorithm == "lars" else 1.0)
        is_trusted = algorithm in ("lars", "lamb") and trusted(name)
        steps[name] = ratio * direction if is_trusted else direction
    return steps, sum((steps[n] * g).sum() for n, g in grads.items())


def oracle(model, batches, algorithm, eta, gamma, scale_lr, floor, ceiling):
    """Algorithm 1 by autograd through the scales, the two moment sets as two torch optimizers on the same leaves."""
    model = copy.deepcopy(model).eval()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = [n for n, w in weights.items() if w.any() and not n.endswith("resweight")]
    scales = {n: torch.ones((), dtype=torch.float64, requires_grad=True) for n in chosen}
    optimizers = [torch.optim.Adam(list(scales.values()), lr=scale_lr) for _ in range(2)]
    branches = []
    for (x, y), (x_next, y_next) in pairwise(batches):
        theta = {n: scales[n] * w if n in scales else w.clone().requires_grad_() for n, w in weights.items()}
        loss = F.cross_entropy(functional_call(model, theta, (x,)), y)
        grads = dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))
        step, norm = oracle_step(algorithm, grads, theta, lambda n: n in scales and weights[n].ndim >= 2)
        branches.append(bool(norm > gamma))
        if norm <= gamma:
            x, y = torch.cat([x[1::2], x_next[::2]]), torch.cat([y[1::2], y_next[::2]])
            trial = {n: theta[n] - eta * step[n].detach() for n in theta}
            norm = F.cross_entropy(functional_call(model, trial, (x,)), y)
        slopes = torch.autograd.grad(norm, list(scales.values()), allow_unused=True)
        for scale, slope in zip(scales.values(), slopes, strict=True):
            scale.grad = slope.clamp(-1, 1)
        optimizers[branches[-1]].step()
        for scale in scales.values():
            scale.data.clamp_(floor, ceiling)
    return {n: s.item() for n, s in scales.items()}, branches


# The norm varies by batch around these, so that both branches are taken.
GAMMAS = {"adam": 42.0, "lamb": 37.0, "sgd": 4.2, "sgd_normalized": 4.2, "lars": 14.0, "muon": 24.0}


@pytest.mark.parametrize("second_order", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("algorithm", GAMMAS)
def test_equals_algorithm_1(algorithm, second_order, monkeypatch):
    monkeypatch.setattr("hf_rezero.optim.muon.orthogonalize", polar)
    model, batches = Net().double(), net_batches(25, rows=48 if algorithm == "muon" else 8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {"eta": 0.05, "gamma": GAMMAS[algorithm], "scale_lr": 0.05}
    scales, branches = oracle(model, batches, algorithm, **settings, floor=0.85, ceiling=1.2)
    assert 5 <= sum(branches) <= 19
    options = {"second_order": second_order, "epsilon": 1e-7, "trust_coefficient": 0.02}
    report = gradinit_(
        model, batches, algorithm=algorithm, min_scale=0.85, max_scale=1.2, loss_fn=net_loss, **settings, **options
    )
    assert [entry["constrained"] for entry in report.history] == branches
    assert report.scales == pytest.approx(scales, rel=1e-9 if second_order == "double_backward" else 1e-4)
    assert min(scales.values()) == 0.85 or max(scales.values()) == 1.2  # a limit was met
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * report.scales.get(name, 1.0)), name


def test_gamma_of_the_paper():
    gammas = {a: GradInit(Net(), eta=0.1, algorithm=a, loss_fn=net_loss).gamma for a in (*GAMMAS, "radam")}
    assert gammas.pop("sgd") == pytest.approx(1.0)  # eta * gamma^2 = 0.1
    assert gammas == pytest.approx(dict.fromkeys(gammas, 1.0))
    assert GradInit(Net(), eta=1e-3, loss_fn=net_loss).gamma == pytest.approx(100)
    assert GradInit(Net(), eta=1e-3, algorithm="sgd", loss_fn=net_loss).gamma == pytest.approx(10)


def test_radam_and_ranger_take_the_sign_step():
    model, batches = Net(), net_batches(6)
    reports = [
        gradinit_(copy.deepcopy(model), batches, eta=0.01, algorithm=a, loss_fn=net_loss)
        for a in ("adam", "adamw", "radam", "ranger")
    ]
    assert all(report.scales == reports[0].scales for report in reports)


class Layers(nn.Module):
    """A linear layer and convolutions of all orientations and shapes, and tensors that are none of their weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 2)
        self.inner, self.norm, self.table = Conv1D(5, 49), nn.LayerNorm(5), nn.Embedding(4, 5)
        self.mix, self.gate = nn.Parameter(torch.randn(5, 5)), ReZero(nn.Linear(5, 5), 0.5)
        self.head = nn.Linear(20, 4, bias=False)

    def forward(self, x):
        x = self.inner(self.up(self.conv(x).tanh()).flatten(2).tanh()) + self.table.weight
        return self.head(self.gate(self.norm(x @ self.mix)).flatten(1))


@pytest.mark.parametrize("build", [Layers, Net])
def test_the_trial_step_of_muon_is_its_first_step(build):
    model = no_dropout(build().double())
    batches = [(x.double(), y) for x, y in images(2)] if build is Layers else net_batches(2, rows=24)
    seen = []

    def loss_fn(model, batch):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return F.cross_entropy(model(batch[0]), batch[1])

    init = GradInit(model, eta=0.05, gamma=1e9, algorithm="muon", loss_fn=loss_fn)
    init.step(batches[0], [batches[1]])
    optimizer = Muon(param_groups(model), lr=0.05, momentum=0.0, eps=1e-30)
    loss_fn(model.eval(), batches[0]).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        start, trial = seen[0][name], seen[1][name]
        assert (trial - p).norm() < 0.02 * (p - start).norm(), name  # matrices of one shape share a product in bf16
        if "momentum_buffer" not in optimizer.state[p]:
            torch.testing.assert_close(trial, p.detach())
    assert init.history[0]["trial_loss"] == pytest.approx(loss_fn(model, batches[1]).item(), rel=1e-2)


@pytest.mark.parametrize("case", ["gpt2", "rezero", "vgg"])
def test_the_constraint_gradient_of_muon_is_that_of_the_nuclear_norm(case, monkeypatch):
    """Newton-Schulz for U V^T shortens it, its singular values being about 0.9, and hardly turns it."""
    build, batches, loss_fn = CASES[case]
    model, batch, options = build(), next(batches(1)), {"algorithm": "muon", "second_order": "double_backward"}
    found = constraint_slope(model, batch, loss_fn, **options)
    monkeypatch.setattr("hf_rezero.optim.muon.orthogonalize", polar)
    exact = constraint_slope(model, batch, loss_fn, **options)
    assert F.cosine_similarity(found, exact, 0) > 0.999
    assert 0.8 < found.norm() / exact.norm() < 1.1


# Batches


def test_half_overlap_takes_every_second_example_of_two_batches():
    first, second = torch.arange(7), torch.arange(10, 16)
    Pair = namedtuple("Pair", "x y")
    batch = {"a": first, "pair": Pair(first[:, None], [torch.tensor(3.0), "text"]), "shared": torch.zeros(1, 4)}
    fresh = {"a": second, "pair": Pair(second[:, None], [torch.tensor(4.0), "text"]), "shared": torch.ones(1, 4)}
    (trial,) = half_overlap(batch, fresh)
    assert trial["a"].tolist() == [1, 3, 5, 10, 12, 14]
    assert trial["pair"].x.tolist() == [[1], [3], [5], [10], [12], [14]]
    assert trial["pair"].y == [torch.tensor(3.0), "text"] and torch.equal(trial["shared"], torch.zeros(1, 4))


def test_half_overlap_of_batches_padded_to_different_lengths():
    batch, fresh = ({"ids": torch.arange(4 * n).view(4, n), "n": torch.arange(4)} for n in (3, 5))
    old, new = half_overlap(batch, fresh)
    assert torch.equal(old["ids"], batch["ids"][1::2]) and torch.equal(new["ids"], fresh["ids"][::2])
    assert old["n"].tolist() == [1, 3] and new["n"].tolist() == [0, 2]


def test_the_trial_loss_is_the_mean_over_the_trial_batches():
    whole, parts = (GradInit(Net(), eta=0.01, gamma=1e9, loss_fn=net_loss) for _ in range(2))
    parts.trial.model.load_state_dict(whole.trial.model.state_dict())
    batch, (x, y) = net_batches(2)
    whole.step(batch, [(x, y)])
    parts.step(batch, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert parts.history[0]["trial_loss"] == pytest.approx(whole.history[0]["trial_loss"])
    torch.testing.assert_close(parts.moments["objective"][0], whole.moments["objective"][0], rtol=1e-4, atol=1e-8)


def test_a_loader_is_started_again_and_an_iterator_runs_out():
    batches = net_batches(3)
    report = gradinit_(Net(), batches, eta=0.01, num_steps=7, loss_fn=net_loss)
    assert len(report.history) == 7
    assert len(gradinit_(Net(), batches, eta=0.01, loss_fn=net_loss).history) == 2
    model = Net()
    before = copy.deepcopy(model.state_dict())
    for given, took in ((iter(batches), 2), (batches[:1], 0), ([], 0)):
        with pytest.raises(ValueError, match=f"ran out after {took} of 7 steps"):
            gradinit_(model, given, eta=0.01, num_steps=7, loss_fn=net_loss)
    with pytest.raises(ValueError, match="ran out after 0 of 1 steps"):
        gradinit_(model, batches[:1], eta=0.01, loss_fn=net_loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Nothing is left behind


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "ids": [id(p) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "other rng": (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:]),
    }


def assert_same(before, after, but=()):
    for key in before.keys() - {"state", "grads", "rng"}:
        assert before[key] == after[key], key
    assert torch.equal(before["rng"], after["rng"])
    pairs = list(zip(before["grads"], after["grads"], strict=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    for name, value in before["state"].items():
        if name not in but:
            assert torch.equal(value, after["state"][name]), name


class Everything(nn.Module):
    """BatchNorm, dropout, a frozen tensor, a zero tensor, a residual weight, noise of three kinds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 4)
        )
        self.gate = ReZero(nn.Linear(4, 4))
        self.offset = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.layers[5].eval()  # one module in another mode than the rest
        self.layers[0].weight.grad = torch.randn(6, 3, 3, 3)

    def forward(self, x):
        noise = 0.01 * torch.randn(len(x), 4) * random.random() * np.random.rand()
        return self.gate(self.layers(x)) * self.frozen + self.offset + noise


@pytest.mark.filterwarnings("ignore:frozen")
@pytest.mark.parametrize("second_order", ["finite_difference", "double_backward"])
@pytest.mark.parametrize("gamma", [1e-6, 1e6])
def test_only_scalar_multiples_come_out(gamma, second_order):
    model, batches = Everything(), list(images(4))
    before = snapshot(model)
    report = gradinit_(model, batches, eta=0.1, gamma=gamma, loss_fn=image_loss, second_order=second_order)
    assert_same(before, snapshot(model), but=report.scales)
    assert set(report.scales) == {
        *(f"layers.{i}.{kind}" for i in (0, 5) for kind in ("weight", "bias")),
        *("layers.1.weight", "gate.module.weight", "gate.module.bias"),
    }
    for name, scale in report.scales.items():
        if not name.startswith(("gate", "layers.0.bias")):  # the bias in front of BatchNorm has no effect
            assert scale != 1.0, name
        assert torch.equal(model.state_dict()[name], before["state"][name] * scale)


@pytest.mark.filterwarnings("ignore:frozen")
@pytest.mark.parametrize("call", range(4))
def test_everything_comes_back_after_an_exception(call):
    model, batches, calls = Everything(), list(images(4)), []
    before = snapshot(model)

    def loss_fn(model, batch):
        loss = image_loss(model, batch)
        calls.append(loss)
        if len(calls) > call:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        gradinit_(model, batches, eta=0.1, loss_fn=loss_fn)
    assert_same(before, snapshot(model))


def stop(*args):
    raise KeyboardInterrupt


def backward_stops(model, batch):
    loss = image_loss(model, batch)
    loss.register_hook(stop)
    return loss


def second_backward_stops(model, batch):
    def in_first(grad):
        if grad.requires_grad:
            grad.register_hook(stop)

    loss = image_loss(model, batch)
    loss.register_hook(in_first)
    return loss.square()


STOPS = {
    "backward": {"loss_fn": backward_stops},
    "second backward": {"loss_fn": second_backward_stops, "second_order": "double_backward", "gamma": 1e-6},
    "reduce": {"reduce": stop},
    "callback": {"callback": stop},
    "batches": {"batches": map(stop, [0])},
}


@pytest.mark.filterwarnings("ignore:frozen")
@pytest.mark.parametrize("where", STOPS)
def test_everything_comes_back_wherever_it_was_stopped(where):
    model, options = Everything(), {"batches": list(images(4)), "loss_fn": image_loss, **STOPS[where]}
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        gradinit_(model, options.pop("batches"), eta=0.1, **options)
    assert_same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore:frozen")
def test_the_loss_is_that_of_batch_statistics_without_dropout():
    model, (batch, fresh) = Everything(), images(2)
    init = GradInit(model, eta=0.1, loss_fn=image_loss)
    twin = copy.deepcopy(model).train()
    twin.layers[3].p = 0.0
    with random_numbers_kept():
        expected = image_loss(twin, batch)
    init.step(batch, half_overlap(batch, fresh))
    assert init.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_tied_tensors_stay_tied_and_are_scaled_once():
    model, batches = gpt2(), list(text(4))
    before = model.lm_head.weight.detach().clone()
    report = gradinit_(model, batches, eta=1e-2)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in report.scales and report.scales["transformer.wte.weight"] != 1.0
    assert torch.equal(model.lm_head.weight, before * report.scales["transformer.wte.weight"])


@pytest.mark.parametrize("algorithm", ["adam", "sgd"])
def test_every_trainable_tensor_is_in_the_norm_and_in_the_step(algorithm):
    model, (batch, fresh) = Net(), net_batches(2)
    init = GradInit(model, eta=0.01, gamma=1e9, algorithm=algorithm, loss_fn=net_loss)
    twin = no_dropout(copy.deepcopy(model))
    net_loss(twin, batch).backward()
    order = 1 if algorithm == "adam" else 2
    norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm(order)
    init.step(batch, [fresh])
    assert init.history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert all(p.grad.any() for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.01 * (p.grad.sign() if algorithm == "adam" else p.grad)
    assert init.history[0]["trial_loss"] == pytest.approx(net_loss(twin, fresh).item(), rel=1e-5)


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, 2, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True), 2)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.weighted(self.layers(F.pad(x, (0, 1))).mean(1))


@pytest.mark.parametrize("build", [LSTM, Encoder])
def test_the_scaled_model_is_the_one_that_was_looked_at(build):
    """Modules that keep their weights in a second place, or that have a fast path in eval mode."""
    model, batch = build(), (torch.randn(6, 5, 3), torch.randint(0, 4, (6,)))
    init = GradInit(model, eta=0.01, loss_fn=image_loss)
    init.scales = torch.linspace(0.5, 1.5, len(init.scales), dtype=torch.float64)
    init.scaled = [True] * len(init.scaled)
    init.step(batch, [batch])
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, scale in zip(model.parameters(), torch.linspace(0.5, 1.5, len(before)), strict=True):
            p.mul_(scale)
    folded = image_loss(model.eval(), batch)
    assert init.history[0]["loss"] == pytest.approx(folded.item(), rel=1e-5)
    assert not torch.allclose(folded, image_loss(build().eval(), batch))


# The constraint gradient


def constraint_slope(model, batch, loss_fn, **options):
    """d||g||/dm from the first moment after one step, by tensor."""
    init = GradInit(model, eta=1e-3, gamma=1e-9, scale_clip=1e30, loss_fn=loss_fn, **options)
    init.step(batch, [])
    assert init.history[0]["constrained"]
    return init.moments["constraint"][0]


def agreement(model, batch, loss_fn=None, **options):
    difference = constraint_slope(model, batch, loss_fn, **options)
    exact = constraint_slope(model, batch, loss_fn, **options, second_order="double_backward")
    assert exact.any()
    return F.cosine_similarity(difference, exact, 0).item()


CASES = {
    "gpt2": (lambda: gpt2(4), text, None),
    "bert": (lambda: bert(4), classes, None),
    "rezero": (lambda: rezero(0.5), text, None),
    "rezero at 0": (lambda: rezero(0.0), text, None),
    "vgg": (lambda: vgg(8), images, image_loss),
    "vgg with BatchNorm": (lambda: vgg(8, norm=True), images, image_loss),
}


@pytest.mark.parametrize("algorithm", ["adam", "sgd", "lars", "lamb", "muon"])
@pytest.mark.parametrize("case", CASES)
def test_finite_difference_agrees_with_double_backward(case, algorithm):
    build, batches, loss_fn = CASES[case]
    assert agreement(build(), next(batches(1)), loss_fn, algorithm=algorithm) > 0.999


def test_finite_difference_averages_the_jumps_of_a_relu_resnet():
    """The Hessian product knows nothing of the jumps of the gradient; a larger step averages over more of them."""
    torch.manual_seed(3)
    model, batch = resnet(4, norm=True), next(images(1, rows=64))
    agreements = [agreement(model, batch, image_loss, algorithm="sgd", epsilon=e) for e in (1e-4, 1e-2)]
    assert agreements[1] > max(0.9, agreements[0])


NOISE = {
    "torch": lambda x: F.dropout(x, 0.5, training=True),
    "numpy": lambda x: x * torch.tensor(np.random.rand(*x.shape), dtype=x.dtype),
    "python": lambda x: x * random.random(),
}


@pytest.mark.parametrize("source", NOISE)
def test_noise_is_the_same_in_all_gradients_of_a_step(source):
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(NOISE[source](x))

    model, batch = Noisy(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), (torch.randn(8, 6), torch.randint(0, 4, (8,)))
    assert agreement(model, batch, image_loss) > 0.999


def test_attention_of_the_test_models_needs_the_math_kernel():
    """Otherwise the double backward of CASES would prove nothing about fused attention."""
    model, batch = gpt2(), next(text(1))
    assert model.config._attn_implementation == "sdpa"
    leaves = list(no_dropout(model).parameters())
    grads = torch.autograd.grad(model(**batch).loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(sum(g.abs().sum() for g in grads), leaves)


def test_finite_difference_needs_one_backward_pass_only():
    """Attention held to a kernel that cannot be differentiated twice."""

    def loss_fn(model, batch):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return model(**batch).loss

    model, batch = gpt2(), next(text(1))
    exact = constraint_slope(model, batch, None, second_order="double_backward")
    assert F.cosine_similarity(constraint_slope(model, batch, loss_fn), exact, 0) > 0.999
    with pytest.raises(RuntimeError, match="not implemented") as raised:
        constraint_slope(model, batch, loss_fn, second_order="double_backward")
    assert "finite_difference" in raised.value.__notes__[0]


@pytest.mark.parametrize("gamma", [1e-9, 1e9])
def test_the_second_order_graph_is_built_when_the_constraint_is_active_only(gamma, monkeypatch):
    graphs, grad = [], torch.autograd.grad

    def spy(*args, create_graph=False, **kwargs):
        graphs.append(create_graph)
        return grad(*args, create_graph=create_graph, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    batch, fresh = net_batches(2)
    for second_order in ("finite_difference", "double_backward"):
        graphs.clear()
        GradInit(Net(), eta=0.01, gamma=gamma, second_order=second_order, loss_fn=net_loss).step(batch, [fresh])
        assert any(graphs) == (gamma < 1 and second_order == "double_backward")
        assert len(graphs) == (3 if any(graphs) else 2)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("second_order", ["finite_difference", "double_backward"])
def test_checkpointing_recomputes_with_the_trial_weights(second_order):
    """The forward pass that is recomputed during backward must not see the weights of the model."""
    parts = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU()) for _ in range(2)]
    batches = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(6)]
    reports = [
        gradinit_(model, batches, eta=0.05, gamma=2.0, scale_lr=0.1, loss_fn=image_loss, second_order=second_order)
        for model in (Checkpointed(*copy.deepcopy(parts)), nn.Sequential(*copy.deepcopy(parts)))
    ]
    assert 0 < reports[0].constrained_steps < 5
    assert reports[0].scales == pytest.approx(reports[1].scales, rel=1e-5)


def test_compiled_model():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    batches = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(4)]
    options = {"eta": 0.05, "gamma": 2.0, "scale_lr": 0.1, "loss_fn": image_loss}
    expected = gradinit_(copy.deepcopy(model), batches, **options)
    compiled = torch.compile(model, backend="aot_eager")
    report = gradinit_(compiled, batches, **options)
    assert {name.removeprefix("_orig_mod."): s for name, s in report.scales.items()} == pytest.approx(expected.scales)


def test_autocast_around_the_run_does_not_keep_the_old_weights():
    model, batch = gpt2(), next(text(1))
    exact = constraint_slope(model, batch, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = constraint_slope(model, batch, None, epsilon=1e-2)
    assert F.cosine_similarity(rounded, exact, 0) > 0.99


# ReZero


@pytest.mark.filterwarnings("ignore:frozen")
def test_at_resweight_0_the_two_signals_are_opposite_and_need_the_step_of_resweight():
    """Claim 3: dL/dm_W = -eta d||g||_1/dm_W + O(eta^2) at S~ = S; it vanishes if resweight takes no step."""
    model, batch = rezero(0.0).double(), next(text(1))
    inner = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    inner += [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]

    def slopes(branch, eta, gamma):
        init = GradInit(model, eta=eta, gamma=gamma, scale_clip=1e30, second_order="double_backward")
        init.step(batch, [batch])
        return torch.stack([10 * init.moments[branch][0][list(init.weights).index(name)] for name in inner])

    constraint = slopes("constraint", 1.0, 1e-9)
    assert constraint.abs().min() > 1e-5
    errors = []
    for eta in (1e-4, 1e-5):
        ratios = slopes("objective", eta, 1e9) / (-eta * constraint)
        errors.append((ratios - 1).abs().max().item())
    assert errors[1] < 0.01 and errors[1] < 0.2 * errors[0]
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("resweight"))
    assert not slopes("objective", 1e-3, 1e9).any()


def test_probe_resweight_is_used_and_put_back():
    model, batches = rezero(0.0), list(text(3))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name.endswith("resweight"):
                p.fill_(0.2)
    report = gradinit_(model, batches, eta=0.01, probe_resweight=0.2)
    assert report.scales == gradinit_(twin, batches, eta=0.01).scales
    resweights = {name: p for name, p in model.named_parameters() if name.endswith("resweight")}
    assert len(resweights) == 2 and not any(p.any() for p in resweights.values())
    assert not set(resweights) & set(report.scales)
    assert report.scales != gradinit_(rezero(0.0), batches, eta=0.01).scales


# It helps


def train(model, batches, algorithm, eta, loss_fn, last=5):
    adam, sgd = torch.optim.Adam, lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)
    optimizer = (adam if algorithm == "adam" else sgd)(model.parameters(), lr=eta)
    losses = []
    for batch in batches:
        loss = loss_fn(model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-last:]) / last


def model_loss(model, batch):
    return model(**batch).loss


def too_large(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.ndim >= 2 else 1)
    return model


TASKS = {
    "gpt2": (lambda: gpt2(4), text, "adam", 1e-3, 1000.0),
    "bert": (lambda: bert(6, initializer_range=0.1), classes, "adam", 1e-3, 1000.0),
    "vgg": (lambda: too_large(vgg(8)), images, "sgd_normalized", 0.1, None),
    "vgg with BatchNorm": (lambda: vgg(12, norm=True), images, "sgd_normalized", 0.1, 3.0),
    "resnet": (lambda: resnet(5), images, "sgd_normalized", 0.05, None),
    "resnet with BatchNorm": (lambda: resnet(8, norm=True), images, "sgd_normalized", 0.1, 3.0),
}


def loss_after_one_step(model, batches, algorithm, eta, loss_fn):
    """Mean over pairs of batches of L(S~; theta - eta A[g]) with S~ independent of S."""
    losses = []
    for batch, fresh in pairwise(batches):
        init = GradInit(model, eta=eta, gamma=1e30, algorithm=algorithm, loss_fn=loss_fn)
        init.step(batch, [fresh])
        losses.append(init.history[0]["trial_loss"])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("task", TASKS)
def test_the_first_step_helps_more(task):
    build, batches, algorithm, eta, gamma = TASKS[task]
    loss_fn = image_loss if batches is images else model_loss
    model, test = no_dropout(build()), list(batches(9))
    before = loss_after_one_step(model, test, algorithm, eta, loss_fn)
    gradinit_(model, batches(25), eta=eta, gamma=gamma, algorithm=algorithm, scale_lr=0.03, loss_fn=loss_fn)
    after = loss_after_one_step(model, test, algorithm, eta, loss_fn)
    assert after < before - 0.02


@pytest.mark.parametrize("task", ["gpt2", "bert", "vgg", "resnet"])
def test_training_gets_further_in_the_same_steps(task):
    build, batches, algorithm, eta, gamma = TASKS[task]
    loss_fn = image_loss if batches is images else model_loss
    model = no_dropout(build())
    tuned = copy.deepcopy(model)
    gradinit_(tuned, batches(25), eta=eta, gamma=gamma, algorithm=algorithm, scale_lr=0.03, loss_fn=loss_fn)
    results = []
    for candidate in (model, tuned):
        torch.manual_seed(9)
        results.append(train(candidate, batches(40), algorithm, eta, loss_fn))
    assert not results[1] > results[0] - 0.05 and results[1] < math.inf


# Resuming, processes


def test_resume_is_exact_to_the_bit():
    model, batches = Net(), net_batches(13)
    options = {"eta": 0.05, "gamma": 42.0, "scale_lr": 0.05, "loss_fn": net_loss}
    straight = GradInit(copy.deepcopy(model), **options)
    stopped = GradInit(copy.deepcopy(model), **options)
    for i, (batch, fresh) in enumerate(pairwise(batches)):
        if i == 6:
            file = io.BytesIO()
            torch.save(stopped.state_dict(), file)
            file.seek(0)
            stopped = GradInit(copy.deepcopy(model), **options)
            stopped.load_state_dict(torch.load(file, weights_only=True))
        for init in (straight, stopped):
            init.step(batch, half_overlap(batch, fresh))
    reports = [init.fold_() for init in (straight, stopped)]
    assert reports[0].scales == reports[1].scales and reports[0].history == reports[1].history
    assert 0 < reports[0].constrained_steps < 12
    pairs = zip(straight.trial.model.parameters(), stopped.trial.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_state_is_not_changed_by_later_steps_and_fits_its_model_only():
    init, (batch, fresh) = GradInit(Net(), eta=0.01, loss_fn=net_loss), net_batches(2)
    init.step(batch, [fresh])
    state = init.state_dict()
    kept = copy.deepcopy(state)
    init.step(batch, [fresh])
    assert torch.equal(state["scales"], kept["scales"]) and len(state["history"]) == 1
    with pytest.raises(ValueError, match=r"another model; .*block.module.0.bias"):
        GradInit(nn.Linear(2, 2), eta=0.01, loss_fn=net_loss).load_state_dict(state)


def test_folding_twice_is_refused():
    init = GradInit(Net(), eta=0.01, loss_fn=net_loss)
    init.fold_()
    with pytest.raises(RuntimeError, match="in the weights already"):
        init.fold_()
    with pytest.raises(RuntimeError, match="in the weights already"):
        init.step(*net_batches(2))


PARALLEL = {"eta": 0.05, "gamma": 42.0, "scale_lr": 0.05, "num_steps": 8, "loss_fn": net_loss}


def _process(rank, path, queue, model, halves, second_order):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    report = gradinit_(model, halves[rank], second_order=second_order, reduce=mean_over_processes, **PARALLEL)
    queue.put((rank, report.scales, report.history))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("second_order", ["finite_difference", "double_backward"])
def test_two_processes_find_identical_scales_those_of_the_joint_batch(second_order, tmp_path):
    model, batches = Net(), net_batches(9, rows=16)
    # Halves of the halves, so that the joint S~ is made of the same examples.
    rows = [torch.tensor([*range(0, 4), *range(8, 12)]), torch.tensor([*range(4, 8), *range(12, 16)])]
    halves = [[(x[r], y[r]) for x, y in batches] for r in rows]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (tmp_path / "store", queue, model, halves, second_order)
    processes = [context.Process(target=_process, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    results = {rank: result for rank, *result in (queue.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join(60)
    assert results[0] == results[1]
    alone = [gradinit_(copy.deepcopy(model), half, **PARALLEL) for half in halves]
    assert alone[0].scales != alone[1].scales
    joint = gradinit_(model, batches, second_order=second_order, **PARALLEL)
    assert 0 < joint.constrained_steps < 8
    assert results[0][0] == pytest.approx(joint.scales, rel=1e-3)


# The report


def test_report(tmp_path):
    report = gradinit_(Net(), net_batches(9), eta=0.05, gamma=42.0, scale_lr=0.05, loss_fn=net_loss)
    assert 0 < report.constrained_steps == sum(e["grad_norm"] > 42.0 for e in report.history) < 8
    assert all((e["trial_loss"] is None) == e["constrained"] for e in report.history)
    assert report.seconds > 0
    lines = str(report).splitlines()
    assert "8 steps" in lines[0] and f"active in {report.constrained_steps}" in lines[0]
    assert {line.split()[0]: float(line.split()[1]) for line in lines[3:]} == pytest.approx(report.scales, abs=1e-4)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["scales"] == report.scales and saved["history"] == report.history and saved["gamma"] == 42.0
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]


def test_a_report_names_its_tensors_and_is_short():
    scales = {f"layers.{i}.weight": 1.0 + 0.01 * i for i in range(50)}
    history = [{"loss": 2.0, "grad_norm": 3.0, "constrained": False, "trial_loss": 1.0}]
    report = GradInitReport(scales, history, "adam", 1e-3, 100.0, 1.0)
    for text in (str(report), report._repr_html_()):
        assert "layers.49.weight" in text and "layers.38.weight" in text and "layers.37.weight" not in text
        assert "and 38 more factors, nearer to 1, in .scales" in text
    assert repr(report) == str(report) and report._repr_html_().count("<tr>") == 13
    names = [tick.get_text() for tick in report.plot().axes[2].get_yticklabels()]
    assert names == [str(i) for i in range(0, 50, 2)]  # what tells them apart, as many as fit


def test_the_progress_bar_is_silent_unless_it_is_wanted(capsys):
    options = {"eta": 0.05, "gamma": 42.0, "loss_fn": net_loss, "num_steps": 3}
    gradinit_(Net(), net_batches(4), **options)
    assert capsys.readouterr().err == ""  # no terminal here
    gradinit_(Net(), net_batches(4), **options, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "GradInit: 100%" in shown and "3/3" in shown and "loss=" in shown


def test_callback_sees_every_step():
    seen = []
    gradinit_(Net(), net_batches(4), eta=0.01, loss_fn=net_loss, callback=lambda init: seen.append(len(init.history)))
    assert seen == [1, 2, 3]


# Bad input


def test_no_loss():
    batches = net_batches(3)
    with pytest.raises(ValueError, match="a batch of type tuple has no loss by itself: pass loss_fn"):
        gradinit_(Net(), batches, eta=0.01)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel returned no loss .*\['input_ids'\].* labels"):
        gradinit_(gpt2(), [{"input_ids": batch["input_ids"]} for batch in text(2)], eta=0.01)
    for loss_fn in (lambda m, b: m(b[0]), lambda m, b: 3.0, lambda m, b: net_loss(m, b).detach()):
        with pytest.raises(ValueError, match="must be a scalar tensor with a gradient, got"):
            gradinit_(Net(), batches, eta=0.01, loss_fn=loss_fn)


def test_nan_at_the_start_names_what_is_nan():
    with pytest.raises(ValueError, match="GradInit step 0: loss is nan, gradient norm is nan"):
        gradinit_(Net(), net_batches(3), eta=0.01, loss_fn=lambda m, b: net_loss(m, b) * float("nan"))


def test_nan_in_the_trial_step_names_the_tensor_and_leaves_the_model():
    model, calls = Net(), []
    before = copy.deepcopy(model.state_dict())

    def loss_fn(model, batch):
        calls.append(batch)
        return net_loss(model, batch) * (float("inf") if len(calls) == 4 else 1.0)

    with pytest.raises(ValueError, match="GradInit step 1: scale gradient of embed.weight is"):
        gradinit_(model, net_batches(5), eta=0.01, loss_fn=loss_fn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unused_and_frozen_parameters_are_named():
    model = Net()
    model.unused = nn.Parameter(torch.ones(3))
    model.norm.bias.requires_grad_(False)
    with pytest.warns(UserWarning) as caught:
        report = gradinit_(model, net_batches(4), eta=0.01, loss_fn=net_loss)
    messages = [str(warning.message) for warning in caught]
    assert sum("does not depend on these parameters: unused" in m for m in messages) == 1
    assert sum("frozen parameters are used as they are and not scaled: norm.bias" in m for m in messages) == 1
    assert report.scales["unused"] == 1.0 and "norm.bias" not in report.scales
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.to(torch.bfloat16), r"extra is torch.bfloat16: .* model.float\(\)"),
        (lambda m: m.to("meta"), "extra has no values yet"),
        (lambda m: m.requires_grad_(False), "Net has no trainable parameter; frozen are: extra, embed.weight"),
        (
            lambda m: m.register_parameter(
                "codes", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
            ),
            "codes is torch.int8: an integer or quantised weight",
        ),
        (lambda m: [p.data.zero_() for p in m.parameters()], "nothing to scale"),
        (lambda m: m.add_module("lazy", nn.LazyLinear(3)), "lazy.weight has no values yet"),
    ],
)
def test_parameters_that_cannot_be_scaled(change, message):
    model = Net()
    change(model)
    with pytest.raises(ValueError, match=message):
        gradinit_(model, net_batches(3), eta=0.01, loss_fn=net_loss)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eta": 0}, "eta must be a positive number, got 0"),
        ({"gamma": -1.0}, "gamma must be a positive number"),
        ({"scale_lr": float("nan")}, "scale_lr must be a positive number"),
        ({"algorithm": "newton"}, r"algorithm must be one of .*'lamb'.*, got 'newton'"),
        ({"second_order": "exact"}, "second_order must be"),
        ({"min_scale": 2.0}, "min_scale <= 1 <= max_scale must hold, got 2.0 and 10.0"),
    ],
)
def test_arguments_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        gradinit_(Net(), net_batches(3), loss_fn=net_loss, **{"eta": 0.01, **values})


def test_a_batch_of_one_cannot_be_halved():
    with pytest.raises(ValueError, match="at least 2 examples .* got 1"):
        gradinit_(Net(), net_batches(3, rows=1), eta=0.01, loss_fn=net_loss)


@pytest.mark.parametrize(
    ("gamma", "message"),
    [(1e9, "at most .*, never reached gamma=1e.09 in 3 steps"), (1e-9, "at least .*, was above gamma=1e-09 in all 3")],
)
def test_a_gamma_that_never_or_always_binds(gamma, message):
    with pytest.warns(UserWarning, match=message) as caught:
        gradinit_(Net(), net_batches(4), eta=0.01, gamma=gamma, loss_fn=net_loss)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradinit_(Net(), net_batches(9), eta=0.05, gamma=42.0, scale_lr=0.05, loss_fn=net_loss)
