"""Muon against torch's own, against its polynomial by singular values, and AdamW for what is no weight of a layer."""

import copy

import pytest
import torch
from support.optim_oracles import Oracle, adamw, follow
from torch import nn

from hf_rezero import Muon, ReZeroConfig, ReZeroForCausalLM, param_groups
from hf_rezero.optim.muon import COEFFICIENTS, orthogonalize


def by_singular_values(matrix, steps):
    """U p(p(... S / |S|)) V^T in fp64 with p(s) = a s + b s^3 + c s^5 (Jordan et al. 2024)."""
    a, b, c = COEFFICIENTS
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def step_on(optimizer, grads):
    """One step on these gradients; by how much each parameter went."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)]


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4), (1, 5), (16, 64)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalize_is_the_polynomial_of_the_singular_values(shape, steps):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for got, matrix in zip(orthogonalize(matrices, steps), matrices, strict=True):
        expected = by_singular_values(matrix, steps)
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() < 0.03 * expected.norm()


def test_zero_matrices_stay_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("momentum, weight_decay", [(0.95, 0.0), (0.9, 0.3), (0.0, 0.1)])
def test_equal_to_torch_on_matrices(momentum, weight_decay):
    """But for the order of the sums in bf16 products: matrices of one shape go through one product here."""
    random = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, generator=random)) for s in [(8, 16), (8, 16), (16, 8), (4, 4)]]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.02, "momentum": momentum, "weight_decay": weight_decay}
    one = Muon([{"params": ours, "output_dim": 0}], **options)
    other = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(6):
        grads = [torch.randn(p.shape, generator=random) for p in ours]
        for got, expected in zip(step_on(one, grads), step_on(other, grads), strict=True):
            assert (got - expected).norm() < 0.02 * expected.norm()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def test_steps_are_as_long_as_those_of_adamw():
    """0.2 lr by root mean square, whatever the shape and the gradient."""
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(s)) for s in [(32, 32), (128, 32), (32, 128)]]
    for step in step_on(Muon(params, lr=0.1), [torch.randn(p.shape, generator=random) * 1e-4 for p in params]):
        assert step.pow(2).mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.2)


def test_filters_are_matrices_from_their_inputs_and_the_orientation_does_not_matter():
    g = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))

    def went(shape, grad, output_dim):
        return step_on(Muon([{"params": [nn.Parameter(torch.zeros(shape))], "output_dim": output_dim}]), [grad])[0]

    conv, matrix = went((5, 2, 3, 3), g, 0), went((5, 18), g.flatten(1), 0)
    torch.testing.assert_close(conv.flatten(1), matrix)
    torch.testing.assert_close(went((18, 5), g.flatten(1).t(), 1), matrix.t())
    torch.testing.assert_close(went((2, 5, 3, 3), g.transpose(0, 1), 1).transpose(0, 1), conv)


def test_vectors_and_what_is_no_layer_take_adamw():
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in [(7, 3), (3,), (1,)]]
    groups = [{"params": params[:1], "output_dim": None, "weight_decay": 0.1}, {"params": params[1:], "output_dim": 0}]
    options = {"betas": (0.8, 0.9), "eps": 1e-6}
    oracle = Oracle(groups, adamw, **options, weight_decay=0.0)
    follow(Muon(groups, lr=0.03, **options), oracle, absent=lambda t, i: i == 1 and t % 3 == 0)


def test_the_groups_of_a_model_say_what_is_a_layer():
    model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    optimizer = Muon(param_groups(model))
    ids = torch.arange(12).reshape(2, 6)
    for _ in range(2):  # layers have no gradient before the residual weights have opened
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    orthogonal = {n for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert orthogonal == {n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}


@pytest.mark.parametrize(
    "values", [{"momentum": 1.0}, {"momentum": -0.1}, {"num_iterations": 0}, {"lr": -1.0}, {"betas": (0.9, 1.0)}]
)
def test_bad_values(values):
    with pytest.raises(ValueError, match=": expected"):
        Muon([nn.Parameter(torch.ones(2, 2))], **values)
