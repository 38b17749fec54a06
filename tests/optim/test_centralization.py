"""Gradient centralisation: which gradients, along which axis, when."""

import pytest
import torch
from support.optim_oracles import Net, Oracle, centralized, follow, sgd, train, two_groups
from torch import nn

from hf_rezero import (
    LAMB,
    LARS,
    RAdam,
    Ranger,
    RangerLARS,
    ReZeroConfig,
    ReZeroForCausalLM,
    centralize_gradients,
    lookahead,
    param_groups,
)


TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def gc_sgd(params, lr=1.0, **options):
    return centralize_gradients(torch.optim.SGD(params, lr=lr), **options)


def step_on(optimizer, p, grad):
    """The negative step on this gradient at lr 1: what is left of it."""
    before = p.detach().clone()
    p.grad = grad.clone()
    optimizer.step()
    return before - p.detach()


# The equation


@pytest.mark.parametrize("conv_only", [False, True])
def test_parameters_and_state_follow_the_equation(conv_only):
    """In two groups with the outputs in dimension 0 and 1, over SGD with momentum and decay."""
    groups, options = two_groups(), {"momentum": 0.9}
    optimizer = centralize_gradients(torch.optim.SGD(groups, **options), conv_only=conv_only)
    follow(optimizer, Oracle(groups, sgd, centralize=True, conv_only=conv_only, **options), **TIGHT)


@pytest.mark.parametrize("output_dim", [0, 1, None])
@pytest.mark.parametrize("shape", [(4, 3), (5, 2, 3), (4, 3, 2, 2), (2, 3, 2, 2, 2)])
def test_the_mean_of_each_output_is_taken_away(shape, output_dim):
    p, g = nn.Parameter(torch.randn(shape, dtype=torch.float64)), torch.randn(shape, dtype=torch.float64)
    left = step_on(gc_sgd([{"params": [p], "output_dim": output_dim}]), p, g)
    torch.testing.assert_close(left, g if output_dim is None else centralized(g, output_dim))
    if output_dim is not None:
        torch.testing.assert_close(
            left.transpose(0, output_dim).flatten(1).sum(1), torch.zeros(shape[output_dim]).double()
        )


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_gates_biases_and_gains_are_left_alone(shape):
    p, g = nn.Parameter(torch.randn(shape, dtype=torch.float64)), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(step_on(gc_sgd([p]), p, g), g)


def test_groups_without_output_dim_count_the_outputs_first():
    p, g = nn.Parameter(torch.zeros(4, 3)), torch.randn(4, 3)
    torch.testing.assert_close(step_on(gc_sgd([p]), p, g), centralized(g, 0))


def test_only_convolutions():
    linear, conv, conv1d = (nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (4, 3, 2, 2), (4, 3, 2)))
    optimizer = gc_sgd([linear, conv, conv1d], conv_only=True)
    for p, touched in ((linear, False), (conv, True), (conv1d, True)):
        g = torch.randn_like(p)
        torch.testing.assert_close(step_on(optimizer, p, g), centralized(g) if touched else g)
        p.grad = None


def test_before_the_moments_not_after():
    """Adam's step is not linear: a centralised update would be another."""
    p, q = (nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(2))
    optimizer, reference = centralize_gradients(RAdam([p])), RAdam([q])
    for _ in range(8):
        g = torch.rand(2, 3, dtype=torch.float64)
        p.grad, q.grad = g.clone(), centralized(g)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(p, q)
    assert p.detach().sum(1).abs().min() > 1e-6


# Which weights: by the type of their module


class Conv1D(nn.Module):
    """The one of transformers: weight (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 3), nn.Conv2d(2, 3, 3)
        self.transposed, self.gpt2 = nn.ConvTranspose2d(2, 3, 3), Conv1D()
        self.embedding, self.norm = nn.Embedding(7, 4), nn.LayerNorm((4, 4))
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embedding.weight
        self.free = nn.Parameter(torch.randn(3, 3))
        self.resweight = nn.Parameter(torch.zeros(1))


OUTPUT_DIMS = {"linear.weight": 0, "conv.weight": 0, "transposed.weight": 1, "gpt2.weight": 1}


@pytest.mark.parametrize("resweight_learning_rate", [None, 0.5])
def test_output_dims_of_param_groups(resweight_learning_rate):
    model = Zoo()
    groups = param_groups(model, weight_decay=0.1, resweight_learning_rate=resweight_learning_rate)
    found = {p: group["output_dim"] for group in groups for p in group["params"]}
    assert {name: found[p] for name, p in model.named_parameters()} == {
        name: OUTPUT_DIMS.get(name) for name, _ in model.named_parameters()
    }
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert (group["weight_decay"] > 0) == all(p.ndim >= 2 for p in group["params"])


@pytest.mark.parametrize("make", [gc_sgd, lambda groups: Ranger(groups, lr=1.0)], ids=["gc+sgd", "ranger"])
def test_layers_are_centralised_and_embeddings_norms_and_gates_are_not(make):
    model = Zoo().double()
    optimizer = make(param_groups(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()  # the first step of RAdam, too, is one along the gradient
    for name, p in model.named_parameters():
        g = centralized(grads[name], OUTPUT_DIMS[name]) if name in OUTPUT_DIMS else grads[name]
        torch.testing.assert_close(before[name] - p.detach(), g, rtol=1e-6, atol=1e-9)


def test_conv1d_of_transformers_and_the_layers_of_a_real_model():
    from transformers.pytorch_utils import Conv1D as Real

    layer = Real(5, 3)
    assert layer.weight.shape == (3, 5)
    assert param_groups(layer)[0]["output_dim"] == 1
    model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    found = {p: group["output_dim"] for group in param_groups(model) for p in group["params"]}
    for name, p in model.named_parameters():
        assert found[p] == (0 if name.endswith("proj.weight") else None if "embed" in name or p.ndim < 2 else found[p])


# When


def test_after_clipping():
    """Clipping sees the whole norm; the other order would leave another length."""
    p, g = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)), torch.rand(2, 3, dtype=torch.float64) + 5
    for optimizer in (gc_sgd([p]), Ranger([p], lr=1.0)):
        before = p.detach().clone()
        p.grad = g.clone()
        nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), centralized(g / g.norm()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", ["gc first", "lookahead first"])
@pytest.mark.parametrize("keyword", [False, True])
def test_the_gradients_of_a_closure_are_centralised_too(keyword, order):
    p = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for put in (centralize_gradients, lookahead)[:: 1 if order == "gc first" else -1]:
        optimizer = put(optimizer)
    g = torch.rand(2, 3, dtype=torch.float64)
    p.grad = torch.full_like(p, 77.0)  # of the step before: stale

    def closure():
        p.grad = g.clone()
        return torch.tensor(3.0)

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss.item() == 3.0
    torch.testing.assert_close(-p.detach(), centralized(g))


def test_under_a_grad_scaler():
    """Fused optimizers get scaled gradients, others not; the mean is linear."""
    for fused in (False, True):
        p = nn.Parameter(torch.ones(2, 3))
        optimizer = centralize_gradients(torch.optim.SGD([p], lr=0.1, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        weights = torch.rand(2, 3)
        scaler.scale((p * weights).sum()).backward()
        scaler.step(optimizer)
        torch.testing.assert_close((1 - p.detach()) / 0.1, centralized(weights), rtol=1e-5, atol=1e-5)


def test_the_option_is_saved_with_the_groups_and_given_to_later_ones():
    net = Net()
    optimizer = gc_sgd([net.head.weight], conv_only=True)
    optimizer.add_param_group({"params": [net.body.weight]})
    assert [group["gc_conv_only"] for group in optimizer.param_groups] == [True, True]
    other = gc_sgd([net.head.weight])
    other.add_param_group({"params": [net.body.weight]})
    other.load_state_dict(optimizer.state_dict())
    g = torch.randn(6, 6)
    torch.testing.assert_close(step_on(other, net.body.weight, g), g)


def test_a_group_that_is_added_later_is_centralised():
    p, q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 3))
    optimizer = gc_sgd([p])
    optimizer.add_param_group({"params": [q], "output_dim": 1})
    g = torch.randn(4, 3)
    torch.testing.assert_close(step_on(optimizer, q, g), centralized(g, 1))


def test_over_an_optimizer_of_torch_the_state_is_its_own():
    net, bare = Net(), Net()
    optimizer, reference = gc_sgd(net.parameters(), lr=0.1), torch.optim.SGD(bare.parameters(), lr=0.1)
    train(net, optimizer, range(2))
    train(bare, reference, range(2))
    assert optimizer.state_dict()["state"] == reference.state_dict()["state"]


# Refusals


def test_centralisation_is_put_around_only_once():
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="SGD centralises its gradients already"):
        centralize_gradients(gc_sgd([p]))
    for cls in (Ranger, RangerLARS):
        with pytest.raises(ValueError, match=f"{cls.__name__} centralises its gradients already"):
            centralize_gradients(cls([p]))
    p.grad = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    optimizer = centralize_gradients(Ranger([p], centralize=False, lr=1.0))
    optimizer.step()
    torch.testing.assert_close(p.detach(), 1 - torch.tensor([[-0.5, 0.5], [-1.0, 1.0]]))


FLAT = {"_is_flat_param": True, "_fsdp_flattened": True, "ds_id": 3}
WHOLE = {
    "Ranger": lambda params: Ranger(params),
    "RangerLARS": lambda params: RangerLARS(params),
    "LARS": lambda params: LARS(params, lr=0.1),
    "LAMB": lambda params: LAMB(params),
    "gradient centralisation": gc_sgd,
}


@pytest.mark.parametrize("attribute", FLAT)
@pytest.mark.parametrize("technique", WHOLE)
def test_flat_shards_are_refused(technique, attribute):
    p, flat = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(17))
    setattr(flat, attribute, FLAT[attribute])
    with pytest.raises(ValueError, match=rf"^{technique} needs whole weight matrices.*\(17,\).*FSDP2.*radam"):
        WHOLE[technique]([{"params": [p]}, {"params": [flat]}])
    if technique != "gradient centralisation":
        optimizer = WHOLE[technique]([p])
        with pytest.raises(ValueError, match="needs whole weight matrices"):
            optimizer.add_param_group({"params": [flat]})


@pytest.mark.parametrize("attribute", FLAT)
def test_what_acts_by_element_takes_flat_shards(attribute):
    flat = nn.Parameter(torch.ones(17))
    setattr(flat, attribute, FLAT[attribute])
    for optimizer in (RAdam([flat]), lookahead(torch.optim.AdamW([flat]), k=1)):
        flat.grad = torch.ones(17)
        optimizer.step()
    assert (flat < 1).all()
