"""Masks: the hard-concrete distribution, the L1 layer, how they act on a model, how they are pulled to zero."""

import copy
import math

import pytest
import torch
from support.pruning_models import WITH_UNITS, build, rezero, set_masks, stir
from torch import nn

from hf_rezero.pruning import L0MaskLayer, L1MaskLayer, attach_masks, finalize_masks, find_groups, remove_pruned_
from hf_rezero.pruning.activations import output_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


@pytest.mark.parametrize(
    ("beta", "log_alpha", "zero", "one"),
    [
        (2 / 3, 0.0, 0.1682, 0.1682),
        (2 / 3, 2.5, 0.0163, 0.7112),
        (0.33, 2.5, 0.0359, 0.8467),
        (1.0, 2.944, 0.0048, 0.6332),
    ],
)
def test_hard_concrete_samples_have_the_published_distribution(beta, log_alpha, zero, one):
    torch.manual_seed(0)
    layer = L0MaskLayer(400_000, beta=beta, log_alpha=log_alpha)
    z = layer()
    assert float((z == 0).float().mean()) == pytest.approx(zero, abs=2e-3)
    assert float((z == 1).float().mean()) == pytest.approx(one, abs=3e-3)
    assert float(layer.openness()[0].detach()) == pytest.approx(1 - zero, abs=1e-4)


def test_sampled_gates_follow_the_equation():
    layer = L0MaskLayer(5, beta=0.5, log_alpha=0.3)
    torch.manual_seed(7)
    z = layer()
    torch.manual_seed(7)
    u = torch.empty(5).uniform_(1e-6, 1 - 1e-6).double()
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + 0.3) / 0.5)
    torch.testing.assert_close(z.double(), (1.2 * s - 0.1).clamp(0, 1), atol=1e-6, rtol=1e-6)


def test_the_slope_of_the_penalty_is_the_published_one():
    def slope(**options):
        layer = L0MaskLayer(1, **options)
        return float(torch.autograd.grad(layer.penalties().sum(), layer.log_alpha)[0])

    assert slope(beta=2 / 3) == pytest.approx(0.0161, abs=1e-4)
    assert slope(beta=0.05) == pytest.approx(0.0633, abs=1e-4)
    assert slope(beta=2 / 3, penalty="hard_sigmoid") == pytest.approx(1 / 8)


def test_estimators():
    layer = L0MaskLayer(4)
    with torch.no_grad():
        layer.log_alpha.copy_(torch.tensor([-2.5, -1.0, 1.0, 2.5]))
    paper = (1.2 * torch.sigmoid(layer.log_alpha.detach()) - 0.1).clamp(0, 1)
    torch.testing.assert_close(layer.estimate(), paper)
    assert layer.estimate()[0] == 0 and layer.estimate()[3] == 1
    layer.estimator = "threshold"
    assert layer.estimate().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("penalty", "limit"), [("sigmoid", math.log(100)), ("hard_sigmoid", 4.0)])
def test_locations_stay_where_the_penalty_has_a_gradient(penalty, limit):
    layer = L0MaskLayer(2, penalty=penalty)
    with torch.no_grad():
        layer.log_alpha.copy_(torch.tensor([-90.0, 90.0]))
    layer.settle()
    torch.testing.assert_close(layer.log_alpha.detach(), torch.tensor([-limit, limit]))


def test_gate_arithmetic_stays_in_fp32_for_a_bf16_model():
    model = stir(rezero()).bfloat16()
    masks = attach_masks(model.train(), find_groups(model), "l0")
    model(torch.arange(8)[None])
    assert masks.layer.log_alpha.dtype == torch.float32
    assert {z.dtype for z in masks.current().values()} == {torch.float32}
    assert all(bool(z.isfinite().all()) for z in masks.current().values())


def test_small_l1_masks_are_caught_and_never_come_back():
    layer = L1MaskLayer(3, capture=0.02)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    with torch.no_grad():
        layer.mask.copy_(torch.tensor([0.019, -0.019, 0.5]))
    for _ in range(5):
        layer.settle()
        layer.catch(torch.zeros(3, dtype=torch.bool))
        assert layer.captured.tolist() == [True, True, False]
        assert layer.mask[:2].tolist() == [0.0, 0.0]
        (-layer().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.mask[2] > 0.5


@pytest.mark.parametrize("kind", ["l1", "l0"])
@pytest.mark.parametrize("name", WITH_UNITS)
def test_an_attached_model_evaluates_as_before_to_the_bit(name, kind):
    model, batch = build(name)
    before, keys = output_of(model, batch), set(model.state_dict())
    masks = attach_masks(model, find_groups(model), kind)
    assert torch.equal(output_of(model, batch), before)
    masks.detach_()
    assert set(model.state_dict()) == keys and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["rezero_gqa", "gpt2", "bert", "seed_net", "resnet"])
def test_masking_weights_is_masking_activations(name):
    """The oracle: hooks that multiply the input of each reader."""
    model, batch = build(name)
    oracle = copy.deepcopy(model)
    groups = find_groups(model)
    masks = attach_masks(model, groups)
    set_masks(masks)

    def multiply(z, size):
        def hook(module, args):
            factors = z.repeat_interleave(size).to(args[0].dtype)
            shape = (-1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
            return (args[0] * factors.view(shape),)

        return hook

    for name, z in masks.current().items():
        for reader in next(group for group in groups if group.name == name).readers:
            module = oracle.get_submodule(reader.tensor.removesuffix(".weight"))
            module.register_forward_pre_hook(multiply(z.detach(), reader.size))
    torch.testing.assert_close(output_of(model, batch), output_of(oracle, batch), atol=1e-12, rtol=1e-12)


def test_layer_masks_multiply_the_residual_weights():
    model, batch = build("rezero")
    oracle = copy.deepcopy(model)
    masks = attach_masks(model, find_groups(model, ["layers"]))
    set_masks(masks)
    with torch.no_grad():
        for layer, z in zip(oracle.model.layers, masks.layer.mask, strict=True):
            layer.residuals["layer"].resweight.mul_(z)
    assert torch.equal(output_of(model, batch), output_of(oracle, batch))
    assert not torch.equal(output_of(model, batch), output_of(build("rezero")[0], batch))


def test_mask_gradients_equal_those_of_masked_activations():
    model = net().double()
    plain = copy.deepcopy(model)
    x = torch.randn(5, 6).double()
    masks = attach_masks(model, find_groups(model, ["neurons"]))
    set_masks(masks)
    model(x).square().mean().backward()
    first, second = (z.detach().double().requires_grad_() for z in masks.split(masks.layer.mask).values())
    plain[4](torch.tanh(plain[2](plain[0](x).relu() * first)) * second).square().mean().backward()
    torch.testing.assert_close(
        masks.layer.mask.grad.double(), torch.cat([first.grad, second.grad]), atol=1e-6, rtol=1e-5
    )


def test_per_example_gates_differ_by_example_and_equal_the_equation():
    model = net()
    masks = attach_masks(model.train(), find_groups(model), "l0", log_alpha=0.0, per_example=True)
    x = torch.randn(1, 6).expand(4, 6)
    output = model(x)
    z = masks.current()
    assert z["0"].shape == (4, 16) and not torch.equal(output[0], output[1])
    h = torch.tanh(nn.functional.linear(model[0](x).relu() * z["0"], model[2].weight, model[2].bias)) * z["2"]
    torch.testing.assert_close(output, nn.functional.linear(h, model[4].weight, model[4].bias))


@pytest.mark.parametrize("per_example", [False, True])
def test_gradient_checkpointing_sees_the_same_gates(per_example):
    def gradients(checkpointing):
        model = stir(rezero()).train()
        masks = attach_masks(model, find_groups(model), "l0", log_alpha=0.0, per_example=per_example)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        ids = torch.arange(24).view(2, 12)
        model(ids, labels=ids).loss.backward()
        return masks.layer.log_alpha.grad, model.model.layers[1].mlp.up_proj.weight.grad

    torch.manual_seed(0)
    plain = gradients(False)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(True), plain)


def test_the_penalty_is_the_weighted_sum():
    model = net()
    groups = find_groups(model)
    masks = attach_masks(model, groups, "l1", lambda_=0.5, branch_lambda={"2": 3.0}, module_costs="params")
    set_masks(masks)
    costs = torch.tensor([6 + 1 + 12.0] * 16 + [16 + 1 + 3.0] * 12)
    factors = torch.tensor([1.0] * 16 + [3.0] * 12)
    expected = 0.5 * (costs / costs.mean() * factors * masks.layer.mask.detach().abs()).sum()
    torch.testing.assert_close(masks.penalty().detach(), expected)


def test_warmup_raises_the_penalty():
    model = net()
    masks = attach_masks(model, find_groups(model), "l1", lambda_=1.0, warmup_steps=4)
    seen = []
    for _ in range(6):
        seen.append(masks.penalty().item() / 28)
        masks.after_step()
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def train(model, masks, steps=400, lr=0.02, mask_lr=0.02, weight_decay=0.0):
    own = {id(p) for p in masks.parameters()}
    weights = [p for p in model.parameters() if id(p) not in own]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": weight_decay}, {"params": list(masks.parameters()), "lr": mask_lr}],
        lr=lr,
        weight_decay=0.0,
    )
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    for _ in range(steps):
        x = torch.randn(64, 6)
        loss = (model(x) - teacher(x).detach()).square().mean() + masks.penalty()
        loss.backward()
        masks.before_step()
        optimizer.step()
        masks.after_step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["l1", "l0"])
def test_sparsity_grows_with_lambda(kind):
    kept = []
    for lambda_ in (0.0, 1e-3, 1e-1):
        model = net()
        masks = attach_masks(model.train(), find_groups(model), kind, lambda_=lambda_)
        train(model, masks, mask_lr=0.02 if kind == "l1" else 0.1)
        kept.append(sum(len(indices) for indices in finalize_masks(masks)[0].values()))
    assert kept[0] > kept[1] > kept[2] and kept[2] >= 2


@pytest.mark.parametrize("kind", ["l1", "l0"])
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_a_target_is_met(kind, target):
    model = net()
    masks = attach_masks(model.train(), find_groups(model), kind, target_sparsity=target, warmup_steps=100)
    train(model, masks, mask_lr=0.02 if kind == "l1" else 0.1)
    kept, _ = finalize_masks(masks)
    left = {name: len(indices) for name, indices in kept.items()}
    total = 6 * 16 + 16 + 16 * 12 + 12 + 12 * 3
    now = 6 * left["0"] + left["0"] + left["0"] * left["2"] + left["2"] + left["2"] * 3
    assert target - 1e-6 <= 1 - now / total <= target + 0.08


def test_l1_without_pull_on_the_weights_shrinks_masks_and_grows_weights():
    """Why weight decay, or the sphere, must stand beside an L1 mask."""

    def after_training(**options):
        model = net()
        masks = attach_masks(model.train(), find_groups(model), "l1", lambda_=1e-2, capture=0.0, **options)
        train(model, masks, steps=300, mask_lr=0.01)
        return float(masks.layer.mask.detach().abs().mean()), model[4].weight.detach().norm(dim=0)

    start = net()[4].weight.detach().norm(dim=0)
    mask, norms = after_training()
    assert mask < 0.1 and norms.mean() > 2 * start.mean()
    torch.testing.assert_close(after_training(sphere=True)[1], start)


def test_two_phases_take_turns():
    model = net()
    masks = attach_masks(model, find_groups(model), "l1", alternate_steps=2)
    turns = []
    for _ in range(6):
        (model(torch.ones(1, 6)).sum() + masks.penalty()).backward()
        masks.before_step()
        turns.append((model[0].weight.grad is not None, masks.layer.mask.grad is not None))
        masks.after_step()
        model.zero_grad()
    assert turns == [(True, False)] * 2 + [(False, True)] * 2 + [(True, False)] * 2


def test_residual_weights_are_held_while_masks_train():
    model = stir(rezero())
    masks = attach_masks(model, find_groups(model))
    ids = torch.arange(12)[None]
    model(ids, labels=ids).loss.backward()
    masks.before_step()
    held = [p.grad is None for name, p in model.named_parameters() if name.endswith("resweight")]
    assert held and all(held) and masks.layer.mask.grad is not None


def test_state_comes_back():
    model = net()
    masks = attach_masks(model.train(), find_groups(model), "l1", target_sparsity=0.5, warmup_steps=10)
    train(model, masks, steps=60)
    again = net()
    loaded = attach_masks(again, find_groups(again), "l1", target_sparsity=0.5, warmup_steps=10)
    again.load_state_dict(model.state_dict())
    assert torch.equal(loaded.layer.captured, masks.layer.captured)
    torch.testing.assert_close(loaded.penalty(), masks.penalty())


def test_a_copy_has_masks_of_its_own():
    model = net()
    masks = attach_masks(model, find_groups(model))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.pruning_masks.layer.mask.zero_()
    x = torch.ones(1, 6)
    assert torch.equal(copied(x)[0], copied[4].bias) and not torch.equal(model(x), copied(x))
    assert copied.pruning_masks.model is copied and masks.model is model


def test_min_keep_units_are_never_caught():
    model = net()
    masks = attach_masks(model, find_groups(model), "l1", min_keep=2)
    with torch.no_grad():
        masks.layer.mask.fill_(0.001)
    masks.after_step()
    kept, _ = finalize_masks(masks)
    assert [len(indices) for indices in kept.values()] == [2, 2]


def attach(model=None, groups=None, **options):
    model = model or net()
    return attach_masks(model, find_groups(model) if groups is None else groups, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attach(kind="l2"), "expected 'l1' or 'l0'"),
        (lambda: attach(groups=[]), "no groups"),
        (lambda: attach(target_sparsity=1.5), "between 0 and 1"),
        (lambda: attach(kind="l0", sphere=True), "sphere=True"),
        (lambda: attach(rezero()), "residual weights are still 0"),
        (lambda: attach_masks((m := net()), find_groups(m) * 2), "got two groups of the same name"),
        (lambda: [attach(m := net()), attach(m)], "has masks already"),
        (lambda: find_groups(net(), ["everything"]), "expected some of heads"),
        (lambda: find_groups(nn.LayerNorm(3)), "no rule finds"),
        (lambda: finalize_masks(attach(target_sparsity=0.99, min_keep=10)), "at most"),
        (lambda: finalize_masks(attach(min_keep=17)), "min_keep=17"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_are_their_own_again_after_a_failed_forward_pass():
    model = net()
    weight = model[2].weight
    masks = attach_masks(model, find_groups(model))
    set_masks(masks)
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 7))
    model[1].register_forward_hook(lambda *_: torch.ones(1, 5))  # the masked module itself fails
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 6))
    assert model[2].weight is weight and isinstance(model[2].weight, nn.Parameter)


@pytest.mark.parametrize(("kind", "options"), [
    ("l1", {"lambda_": 0.1}), ("l1", {"target_sparsity": 0.3, "alternate_steps": 3}), ("l0", {"target_sparsity": 0.3}),
    ("l1", {"lambda_": 0.1, "sphere": True}),
])  # fmt: skip
def test_training_goes_on_after_the_masks_are_decided(kind, options):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = attach_masks(net, find_groups(net), kind, **options)
    with torch.no_grad():
        for parameter in masks.layer.parameters():
            parameter[:3] = -9.0 if kind == "l0" else 0.0
    finalize_masks(masks)
    optimizer, x = torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(6, 4)
    for _ in range(4):
        before, expected = net[0].weight.detach().clone(), net(x).square().mean()
        loss = expected + masks.penalty()
        assert loss == expected, "nothing pulls decided masks"
        optimizer.zero_grad()
        loss.backward()
        masks.before_step()
        optimizer.step()
        masks.after_step()
        assert not torch.equal(net[0].weight, before)
        assert torch.equal(masks.openness()["0"], torch.tensor([0.0] * 3 + [1.0] * 5))
    assert masks.polarisation() == 0 and 0 < float(masks.expected_sparsity()) < 1
    assert remove_pruned_(net, masks).method == kind and net[0].out_features == 5
