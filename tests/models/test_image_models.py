"""The image models against the equations in plain torch, and the properties that must hold for every config."""

import json
import subprocess
import sys

import pytest
import torch
from support.pruning_models import REZERO_IMAGE, rezero_mlp, rezero_resnet, stir
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification

from hf_rezero import (
    LARS,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
    gradinit_,
    grow_,
    param_groups,
)
from hf_rezero.pruning import find_groups, magnitude, prune_, recalibrate_batchnorm_, select


PLAIN = {"resweight_init": 1, "resweight_trainable": False}
RESNETS = {
    "rezero": {},
    "plain": {"activation_position": "sum", **PLAIN},
    "zero gamma": {"activation_position": "sum", "zero_init_residual": True, **PLAIN},
    "rezero, sum": {"activation_position": "sum"},
    "pre": {"activation_position": "pre", **PLAIN},
    "rezero, pre": {"activation_position": "pre", "shortcut_type": "projection"},
    "no norm": {"norm_type": "none"},
    "projection": {"shortcut_type": "projection"},
    "bottleneck": {"layer_type": "bottleneck", "hidden_sizes": [16, 32]},
    "bottleneck, pre": {"layer_type": "bottleneck", "hidden_sizes": [16, 32], "activation_position": "pre"},
    "imagenet": {"stem": "imagenet"},
}
MLPS = {
    "rezero": {},
    "deep": {"skip_connection": False, **PLAIN},
    "deep + norm": {"skip_connection": False, "norm_position": "post", **PLAIN},
    "residual": {"initializer_variance": 0.25, **PLAIN},
    "pre": {"norm_position": "pre", **PLAIN},
    "post": {"norm_position": "post", **PLAIN},
    "branch": {"norm_position": "branch", **PLAIN},
    "gelu": {"hidden_act": "gelu"},
}


def batch_norm(w, name, x):
    """Statistics of the batch; the identity where the net has no norm of this name."""
    if f"{name}.weight" not in w:
        return x
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    weight, bias = (w[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def convolve(w, name, x, stride=1):
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)


def residual_block(w, name, x, config, stride):
    """One block, written out for each rule."""
    y, act = x, torch.relu
    number = 2 if config.layer_type == "basic" else 3
    for i in range(1, number + 1):
        step = stride if i == number - 1 else 1  # the first convolution of 3 x 3
        if config.activation_position == "pre":
            y = convolve(w, f"{name}.conv{i}", act(batch_norm(w, f"{name}.bn{i}", y)), step)
        else:
            y = batch_norm(w, f"{name}.bn{i}", convolve(w, f"{name}.conv{i}", y, step))
            y = act(y) if i < number else y
    if f"{name}.shortcut.0.weight" in w:
        x = batch_norm(w, f"{name}.shortcut.1", convolve(w, f"{name}.shortcut.0", x, stride))
    elif y.shape != x.shape:
        wide = y.new_zeros(len(x), y.shape[1], *x[:, :, ::stride, ::stride].shape[2:])
        first = (y.shape[1] - x.shape[1]) // 2
        wide[:, first : first + x.shape[1]] = x[:, :, ::stride, ::stride]
        x = wide
    resweight = w[f"{name}.resweight"]
    if config.activation_position == "branch":
        return x + resweight * act(y)
    return act(x + resweight * y) if config.activation_position == "sum" else x + resweight * y


def resnet_logits(w, config, x):
    imagenet = config.stem == "imagenet"
    x = torch.relu(batch_norm(w, "resnet.bn1", convolve(w, "resnet.conv1", x, 2 if imagenet else 1)))
    x = F.max_pool2d(x, 3, 2, padding=1) if imagenet else x
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            x = residual_block(w, f"resnet.stages.{stage}.{block}", x, config, 2 if stage and not block else 1)
    if config.activation_position == "pre":
        x = torch.relu(batch_norm(w, "resnet.norm", x))
    return x.mean((2, 3)) @ w["classifier.weight"].T + w["classifier.bias"]


def mlp_logits(w, config, images):
    act = torch.nn.functional.gelu if config.hidden_act == "gelu" else torch.relu
    x = images.flatten(1) @ w["model.embed.weight"].T + w["model.embed.bias"]
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"

        def norm(y, name=name):
            return F.layer_norm(y, y.shape[-1:], w[f"{name}.norm.weight"], w[f"{name}.norm.bias"])

        y = norm(x) if config.norm_position == "pre" else x
        y = act(y @ w[f"{name}.linear.weight"].T + w[f"{name}.linear.bias"])
        y = norm(y) if config.norm_position == "branch" else y
        x = w[f"{name}.resweight"] * y + (x if config.skip_connection else 0)
        x = norm(x) if config.norm_position == "post" else x
    return x @ w["classifier.weight"].T + w["classifier.bias"]


CASES = [("rezero_resnet", values) for values in RESNETS.values()] + [("rezero_mlp", v) for v in MLPS.values()]
NAMES = [f"resnet: {name}" for name in RESNETS] + [f"mlp: {name}" for name in MLPS]


@pytest.mark.parametrize(("kind", "values"), CASES, ids=NAMES)
def test_logits_loss_and_gradients_are_those_of_the_equations(kind, values):
    model = stir(REZERO_IMAGE[kind](**values).double()).train()
    images, labels = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 3, 1, 1])
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = (resnet_logits if kind == "rezero_resnet" else mlp_logits)(w, model.config, images)
    output = model(pixel_values=images, labels=labels)
    torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-9)
    loss = F.cross_entropy(expected, labels)
    torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=1e-9)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    output.loss.backward()
    for (name, parameter), gradient in zip(
        trained.items(), torch.autograd.grad(loss, [w[name] for name in trained]), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("depths", [[3, 3, 3], [9, 9, 9], [18, 18, 18], [200, 200, 200]])
def test_the_nets_of_he_et_al_have_their_numbers_of_parameters(depths):
    """Table 6 of He et al. 2015: 0.27, 0.85, 1.7 and 19.4 million."""
    with torch.device("meta"):
        model = ReZeroResNetForImageClassification(ReZeroResNetConfig(depths=depths, num_labels=10))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("resweight"))
    n = depths[0]  # by hand: 3 x 3 convolutions, gamma and beta of each, and the classifier
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    assert count == convolutions + 2 * (16 + 2 * n * (16 + 32 + 64)) + 650
    assert round(count / 1e6, 1) == {3: 0.3, 9: 0.9, 18: 1.7, 200: 19.4}[n]
    assert model.config.num_hidden_layers == 3 * n == sum(name.endswith("resweight") for name in model.state_dict())


@pytest.mark.parametrize(
    ("values", "millions"),
    [
        ({"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "shortcut_type": "projection"}, 11.69),
        (
            {
                "layer_type": "bottleneck",
                "hidden_sizes": [256, 512, 1024, 2048],
                "depths": [3, 4, 6, 3],
                "shortcut_type": "projection",
            },
            25.557,
        ),
    ],
)
def test_the_nets_of_imagenet_have_the_size_that_torchvision_publishes(values, millions):
    with torch.device("meta"):
        config = ReZeroResNetConfig(stem="imagenet", embedding_size=64, num_labels=1000, **values)
        model = ReZeroResNetForImageClassification(config)
    count = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("resweight"))
    assert count / 1e6 == pytest.approx(millions, abs=0.001)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_at_initialisation_a_block_returns_its_input_to_the_bit(mode):
    for model, blocks in (
        (net := rezero_resnet(), [b for stage in net.resnet.stages for b in stage][:3]),
        (net := rezero_mlp(), list(net.model.layers)),
    ):
        getattr(model, mode)()
        x = torch.randn(2, 8, 8, 8) if hasattr(model, "resnet") else torch.randn(2, 12)
        assert all(torch.equal(block(x), x) for block in blocks)
        model(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
        inner = {name: p.grad for name, p in blocks[0].named_parameters()}
        assert inner.pop("resweight").any() and not any(gradient.any() for gradient in inner.values())


@pytest.mark.parametrize("kind", REZERO_IMAGE)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradients_nor_statistics(kind, reentrant, compiled):
    def run(checkpointing):
        torch.manual_seed(0)
        model = stir(REZERO_IMAGE[kind]().double()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch._dynamo.reset()  # each model is a new one to the compiler, which soon gives up on recompiling
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            loss = forward(torch.ones(2, 3, 8, 8).double() * torch.arange(8), labels=torch.tensor([0, 1])).loss
            loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


def test_a_step_keeps_only_the_inputs_of_the_segments():
    """Saved tensors of 100 layers: 10 inputs of segments, not 100 layers."""
    config = ReZeroMLPConfig(num_hidden_layers=100, hidden_size=64, image_size=8)
    saved = {}
    for checkpointing in (False, True):
        model = ReZeroMLPForImageClassification(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        parameters, sizes = {p.data_ptr() for p in model.parameters()}, []
        pack = lambda t, seen=parameters, sizes=sizes: sizes.append(t.numel() * (t.data_ptr() not in seen)) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(16, 3, 8, 8))
        saved[checkpointing] = sum(sizes)
    assert saved[True] < 0.15 * saved[False]


@pytest.mark.parametrize("kind", REZERO_IMAGE)
def test_compiled_and_bfloat16_models_agree(kind):
    model, images = stir(REZERO_IMAGE[kind]()), torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    expected = model(images).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, expected)
    low = model.to(torch.bfloat16)(images.bfloat16()).logits
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.05)


def test_residual_weights_stay_in_float32(tmp_path):
    rezero_resnet().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name.endswith("resweight"): p.dtype for name, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert torch.isfinite(model(torch.randn(1, 3, 8, 8).bfloat16()).logits).all()


SCRIPT = """
import sys, torch
sys.modules["hf_rezero"] = None  # importing it now raises ImportError
from transformers import AutoModel, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
images = torch.load(sys.argv[1] + "/images.pt")
with torch.no_grad():
    torch.save(model(images).logits, sys.argv[1] + "/logits.pt")
assert AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)(images).pooler_output.ndim == 2
model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""


@pytest.mark.parametrize("kind", ["rezero_resnet", "rezero_mlp"])
def test_a_pruned_and_grown_net_loads_in_a_fresh_process_without_the_library(kind, tmp_path):
    model = stir(REZERO_IMAGE[kind]())
    if kind == "rezero_resnet":
        groups = find_groups(model, ["channels"])
        prune_(model, groups, select(model, groups, magnitude(model, groups), 0.4))
    grow_(model, after=[1], stack="resnet.stages.0" if kind == "rezero_resnet" else None)
    images = torch.randn(2, 3, 8, 8)
    model.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(images).logits)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path)(images).pooler_output, model.base_model(images).pooler_output
    )


def test_growing_leaves_the_function_of_every_net_unchanged():
    images = torch.randn(2, 3, 8, 8)
    for kind, stack in (
        ("rezero_resnet", "resnet.stages.1"),
        ("rezero_bottleneck", "resnet.stages.0"),
        ("rezero_mlp", None),
    ):
        model = stir(REZERO_IMAGE[kind]())
        before = model(images).logits
        grow_(model, 2, stack=stack) if kind != "rezero_resnet" else grow_(model, after=[1, 1], stack=stack)
        assert torch.equal(model(images).logits, before)
        assert kind == "rezero_mlp" or sum(model.config.depths) == 7


def test_frozen_residual_weights_do_not_grow_dead_layers():
    with pytest.raises(ValueError, match="are frozen.*resweight_trainable"):
        grow_(rezero_resnet(**PLAIN, activation_position="sum"), after=[1], stack="resnet.stages.0")


@pytest.mark.parametrize("kind", ["rezero_resnet", "rezero_mlp"])
def test_gradinit_scales_the_nets_and_leaves_their_residual_weights(kind):
    torch.manual_seed(0)
    model = REZERO_IMAGE[kind](resweight_init=0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,))
    batches = [{"pixel_values": images[i : i + 16], "labels": labels[i : i + 16]} for i in range(0, 64, 16)]
    report = gradinit_(model, batches, eta=0.1, algorithm="sgd", num_steps=12)
    assert len(set(report.scales.values())) > 3
    for name, parameter in model.named_parameters():
        ratio = parameter.detach()[before[name] != 0] / before[name][before[name] != 0]
        assert not len(ratio) or (ratio - ratio[0]).abs().max() < 1e-5, name
        assert not name.endswith("resweight") or torch.equal(parameter, before[name])
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


def test_a_pruned_resnet_learns_on_with_new_statistics():
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))
    model = rezero_resnet()
    optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=1.0)
    for _ in range(5):
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    groups = find_groups(model, ["channels"])
    prune_(model, groups, select(model, groups, magnitude(model, groups), 0.5), optimizer=optimizer)
    recalibrate_batchnorm_(model, [images])
    losses = []
    for _ in range(8):
        loss = model.train()(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and model.config.inner_sizes == [[[4]] * 3, [[8]] * 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReZeroResNetConfig(stem="svhn"), "stem='svhn' is unknown: use one of cifar, imagenet"),
        (lambda: ReZeroResNetConfig(depths=[3, 3]), "give each stage"),
        (lambda: ReZeroResNetConfig(depths=[3, 0, 3]), "at least 1"),
        (lambda: ReZeroResNetConfig(zero_init_residual=True), "two zeros in a row"),
        (lambda: ReZeroResNetConfig(inner_sizes=[[[4]]]), "inner_sizes"),
        (lambda: ReZeroResNetConfig(config_version=9), "upgrade hf_rezero"),
        (lambda: rezero_resnet(hidden_sizes=[16, 8]), "use 'projection'"),
        (lambda: rezero_resnet()(torch.randn(2, 8, 8, 3)), "channels first"),
        (lambda: ReZeroMLPConfig(norm_position="before"), "norm_position='before' is unknown"),
        (lambda: ReZeroMLPConfig(num_hidden_layers=0), "got num_hidden_layers=0: expected 1 to"),
        (lambda: ReZeroMLPConfig(config_version=9), "upgrade hf_rezero"),
        (lambda: rezero_mlp()(torch.randn(2, 3, 9, 9)), "resize the images or set image_size"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
