"""Beside torch, pytorch_optimizer and timm: equal where they are right, and what they do where they are not.

A test of the second kind fails when the peer mends its ways: then delete it, and the remark in the documentation.
"""

import copy
import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from support.optim_oracles import Net, adamw, centralized, train, two_groups
from torch import nn

from hf_rezero import LAMB, LARS, RAdam, Ranger, lookahead


@pytest.fixture(scope="module")
def po():
    return pytest.importorskip("pytorch_optimizer", reason="a peer, in the extra `test`")


@pytest.fixture(scope="module")
def timm():
    """Three optimizers of timm, whose package as a whole does not import without torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    found, before = ModuleType("timm"), dict(sys.modules)
    for name in ("timm", "timm.optim"):
        package = ModuleType(name)
        package.__path__ = [f"{folder}{name[4:].replace('.', '/')}" for folder in spec.submodule_search_locations]
        sys.modules[name] = package
    try:
        for name in ("Lars", "Lamb", "Lookahead"):
            setattr(found, name, getattr(importlib.import_module(f"timm.optim.{name.lower()}"), name))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
        sys.modules.update(before)
    return found


def both(make_ours, make_peer, steps=24, rtol=1e-9, atol=1e-10, dtype=torch.float64):
    """Take the steps on the same random gradients with both and compare the parameters after each."""
    ours, peers = two_groups(dtype), two_groups(dtype)
    one, other = make_ours(ours), make_peer(peers)
    random = torch.Generator().manual_seed(1)
    for t in range(steps):
        for group, peer in zip(ours, peers, strict=True):
            for p, q in zip(group["params"], peer["params"], strict=True):
                p.grad = torch.randn(p.shape, dtype=torch.float64, generator=random).to(dtype)
                q.grad = p.grad.clone()
        one.step()
        other.step()
        for group, peer in zip(ours, peers, strict=True):
            for p, q in zip(group["params"], peer["params"], strict=True):
                torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m: f"step {t + 1}: {m}")  # noqa: B023


def without_dims(groups):
    """Groups for peers that count the outputs always in dimension 0."""
    for group in groups:
        group["output_dim"] = 0
    return groups


# Equal to torch


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("foreach", [False, True])
def test_radam_of_torch(dtype, fused, foreach):
    options = {"betas": (0.9, 0.98), "eps": 1e-6}
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    both(
        lambda groups: RAdam(groups, fused=fused, **options),
        lambda groups: torch.optim.RAdam(groups, decoupled_weight_decay=True, foreach=foreach, **options),
        dtype=dtype,
        **tolerance,
    )


def test_the_state_of_torch_radam_loads():
    net = Net()
    theirs = torch.optim.RAdam(net.parameters(), lr=0.01, decoupled_weight_decay=True)
    train(net, theirs, range(9))
    twin = copy.deepcopy(net)
    ours = RAdam(twin.parameters(), lr=0.01)
    state = copy.deepcopy(theirs.state_dict())
    state["param_groups"] = [ours.state_dict()["param_groups"][0]]
    ours.load_state_dict(state)
    train(net, theirs, range(9, 20))
    train(twin, ours, range(9, 20))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lars_without_a_ratio_is_the_sgd_of_torch():
    """Vectors have none."""
    for nesterov in (False, True):
        p, q = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
        ours = LARS([p], lr=0.1, momentum=0.8, nesterov=nesterov)
        theirs = torch.optim.SGD([q], lr=0.1, momentum=0.8, nesterov=nesterov)
        for _ in range(8):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            ours.step()
            theirs.step()
            torch.testing.assert_close(p, q)


# Equal to pytorch_optimizer


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_radam_of_po(po, skips, foreach):
    options = {"betas": (0.9, 0.98), "eps": 1e-6, "degenerated_to_sgd": not skips}
    both(
        lambda groups: RAdam(groups, **options), lambda groups: po.RAdam(groups, foreach=foreach, **options), rtol=1e-8
    )


@pytest.mark.parametrize("foreach", [False, True])
def test_ranger_of_po_where_it_is_right(po, foreach):
    both(
        lambda groups: Ranger(without_dims(groups), k=5, alpha=0.7),
        lambda groups: po.Ranger(groups, k=5, alpha=0.7, degenerated_to_sgd=True, foreach=foreach),
        rtol=1e-8,
    )


def test_lookahead_of_po(po):
    both(
        lambda groups: lookahead(torch.optim.SGD(groups, momentum=0.9), k=4, alpha=0.8),
        lambda groups: po.Lookahead(torch.optim.SGD(groups, momentum=0.9), k=4, alpha=0.8),
    )


@pytest.mark.parametrize("foreach", [False, True])
def test_lars_of_po(po, foreach):
    """It multiplies by lr outside the momentum: equal as long as the rate is constant. Both leave vectors alone."""
    options = {"momentum": 0.9, "trust_coefficient": 0.02}
    both(lambda groups: LARS(groups, lr=0.1, **options), lambda groups: po.LARS(groups, foreach=foreach, **options))


# Equal to timm


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_lars_and_larc_of_timm(timm, clip, nesterov, foreach):
    """Of groups of matrices with decay."""

    def matrices(groups):
        return [{**group, "params": group["params"][:2], "weight_decay": 0.1} for group in groups]

    both(
        lambda groups: LARS(
            matrices(groups), lr=0.1, momentum=0.9, trust_coefficient=0.02, nesterov=nesterov, clip=clip
        ),
        lambda groups: timm.Lars(
            matrices(groups),
            momentum=0.9,
            trust_coeff=0.02,
            nesterov=nesterov,
            trust_clip=clip,
            eps=0.0,
            foreach=foreach,
        ),
        steps=12,
    )


@pytest.mark.parametrize("foreach", [False, True])
def test_lamb_of_timm_without_its_gradient_clipping(timm, foreach):
    """It adapts every group that has decay, vectors included, so only matrices are compared."""
    matrices = lambda groups: [{**group, "params": group["params"][:2]} for group in groups[:1]]  # noqa: E731
    options = {"betas": (0.9, 0.98), "eps": 1e-6}
    both(
        lambda groups: LAMB(matrices(groups), **options),
        lambda groups: timm.Lamb(matrices(groups), max_grad_norm=None, foreach=foreach, **options),
        steps=12,
        rtol=1e-8,
    )


# Defects of torch


def test_fused_adamw_of_torch_mixes_up_elements_of_other_strides():
    """Its kernel for the CPU walks weight and gradient in the order of their storage; ours lays the gradient out anew."""
    weight = torch.randn(3, 4, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
    g = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    h = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0, "step": 1}
    expected = adamw(weight.clone(), g, {"step": 1}, h)
    found = {}
    for fused in (False, True):
        p = nn.Parameter(weight.clone())
        p.grad = g.clone()
        torch.optim.AdamW([p], lr=0.1, eps=1e-3, weight_decay=0.0, fused=fused).step()
        found[fused] = p.detach()
    torch.testing.assert_close(found[False], expected)
    assert not torch.allclose(found[True], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_sgd_of_torch_loses_the_momentum_of_half_precision(dtype):
    """Its kernel for the CPU fills the buffer with what the memory held before. LARS takes another path there."""
    wrong = []
    for cls, options in ((torch.optim.SGD, {"momentum": 0.9, "fused": True}), (LARS, {"trust_coefficient": 1.0})):
        errors = []
        for _ in range(20):
            p = nn.Parameter(torch.zeros(64, dtype=dtype))
            optimizer = cls([p], lr=1.0, **options)
            for _ in range(2):
                p.grad = torch.ones_like(p)
                optimizer.step()
            errors.append((optimizer.state[p]["momentum_buffer"].float() - 1.9).nan_to_num(1e9).abs().max().item())
        wrong.append(max(errors))
    assert wrong[0] > 0.1 and wrong[1] < 0.02, wrong


def test_hooks_of_torch_come_before_the_closure():
    """A centralisation that is a plain hook works on the gradients of the step before."""
    p, seen = nn.Parameter(torch.zeros(2)), []
    optimizer = torch.optim.SGD([p], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(p.grad))
    optimizer.step(lambda: setattr(p, "grad", torch.ones(2)))
    assert seen == [None]


def test_loading_of_torch_casts_state_to_the_type_of_the_parameter():
    """The reason for the load hooks of Lookahead."""
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=1.0)
    optimizer.state[p]["slow"] = torch.ones(2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[p]["slow"].dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RAdam, torch.optim.Adafactor])
def test_optimizers_of_torch_take_a_filled_state_for_their_own(cls):
    """The reason why Lookahead puts the slow weights into the state after the first step, not before."""
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    optimizer = cls([p])
    optimizer.state[p]["slow"] = torch.ones(2, 2)
    with pytest.raises(KeyError):
        optimizer.step()
    assert len(lookahead(cls([p])).state) == 0


def test_radam_of_torch_decays_through_the_gradient_unless_asked():
    p = nn.Parameter(torch.full((2,), 2.0))
    p.grad = torch.zeros(2)
    optimizer = torch.optim.RAdam([p], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].abs().min() > 0
    ours = RAdam([p], lr=0.1, weight_decay=0.5)
    ours.step()
    assert ours.state[p]["exp_avg"].abs().max() == 0


# Defects of pytorch_optimizer


def losses_of(make, steps=8):
    p = nn.Parameter(torch.linspace(-2, 3, 12).view(3, 4) ** 2)
    optimizer, losses = make([p]), []
    for _ in range(steps):
        losses.append(p.pow(2).sum().item())
        optimizer.zero_grad()
        p.pow(2).sum().backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("foreach", [False, True])
def test_ranger_of_po_goes_uphill_in_its_first_five_steps(po, foreach):
    """With its default degenerated_to_sgd=False its step size is -lr there, and it is taken."""
    theirs = losses_of(lambda params: po.Ranger(params, lr=0.01, foreach=foreach))
    assert theirs[0] < theirs[1] < theirs[2] < theirs[3] < theirs[4] < theirs[5]
    for waits in (True, False):
        ours = losses_of(lambda params, waits=waits: Ranger(params, lr=0.01, degenerated_to_sgd=not waits))
        assert all(after <= before for before, after in zip(ours[:6], ours[1:6], strict=False)), ours


@pytest.mark.parametrize("foreach", [False, True])
def test_lars_of_po_overwrites_the_gradients(po, foreach):
    for make, is_kept in ((lambda p: po.LARS(p, lr=0.1, foreach=foreach), False), (lambda p: LARS(p, lr=0.1), True)):
        p = nn.Parameter(torch.ones(3, 3))
        p.grad = torch.full((3, 3), 2.0)
        make([p]).step()
        assert torch.equal(p.grad, torch.full((3, 3), 2.0)) == is_kept


def test_lookahead_of_po_has_a_state_of_a_layout_of_its_own(po):
    """No `state` and `param_groups`, so tools that read an optimizer's state, as torch's checkpoints do, fail."""
    p = nn.Parameter(torch.ones(2))
    theirs = po.Lookahead(torch.optim.SGD([p], lr=0.1)).state_dict()
    assert set(theirs) == {"lookahead_state", "base_optimizer"}
    assert set(lookahead(torch.optim.SGD([p], lr=0.1)).state_dict()) == {"state", "param_groups"}


def test_lookahead_of_po_keeps_slow_weights_in_bf16_where_they_stand_still(po):
    """Steps of 1/256 below 1, of which a tenth is less than half a spacing of bf16."""
    moved = {}
    for name, make in (
        ("theirs", lambda o: po.Lookahead(o, k=1, alpha=0.1)),
        ("ours", lambda o: lookahead(o, 1, 0.1)),
    ):
        p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = make(torch.optim.SGD([p], lr=2**-8))
        for _ in range(40):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = 1 - p.item()
    assert moved["theirs"] == 0 and moved["ours"] > 0.005


def test_centralisation_of_po_does_not_know_where_the_outputs_are(po):
    """Conv1D of transformers has the weight (in, out), and an embedding is no matrix of outputs."""
    g = torch.randn(4, 3)
    left = {}
    for name, make in (
        ("theirs", lambda p: po.Ranger([{"params": [p], "output_dim": 1}], lr=1.0, degenerated_to_sgd=True)),
        ("ours", lambda p: Ranger([{"params": [p], "output_dim": 1}], lr=1.0)),
    ):
        p = nn.Parameter(torch.zeros(4, 3))
        p.grad = g.clone()
        make(p).step()
        left[name] = -p.detach()
    torch.testing.assert_close(left["theirs"], centralized(g, 0))
    torch.testing.assert_close(left["ours"], centralized(g, 1))


# Defects of timm


def test_the_first_sync_of_lookahead_of_timm_is_a_no_op(timm):
    """Its slow weights start as the fast ones of that step."""
    ends = []
    for make in (lambda o: timm.Lookahead(o, k=3, alpha=0.5), lambda o: lookahead(o, k=3, alpha=0.5)):
        p = nn.Parameter(torch.zeros(1))
        optimizer = make(torch.optim.SGD([p], lr=0.1))
        for _ in range(3):
            p.grad = torch.ones(1)
            optimizer.step()
        ends.append(p.item())
    assert ends == pytest.approx([-0.3, -0.15])


def test_lars_of_timm_without_decay_is_sgd(timm):
    steps = []
    for make in (lambda p: timm.Lars(p, lr=0.1), lambda p: LARS(p, lr=0.1)):
        p = nn.Parameter(torch.ones(2, 2))
        p.grad = torch.full((2, 2), 3.0)
        make([p]).step()
        steps.append(1 - p[0, 0].item())
    assert steps == pytest.approx([0.1 * 3.0, 0.1 * 0.001], rel=1e-3)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_gates_in_a_group_with_decay_hardly_open_under_timm(timm, name):
    """In proportion to their own norm they grow from the size of the first step; ours go with lr."""
    makers = {
        "lars": (lambda p: timm.Lars(p, lr=0.1, weight_decay=0.1), lambda p: LARS(p, 0.1, 0.0, 0.1)),
        "lamb": (lambda p: timm.Lamb(p, lr=0.01, weight_decay=0.1), lambda p: LAMB(p, lr=0.01, weight_decay=0.1)),
    }
    ends = []
    for make in makers[name]:
        gate = nn.Parameter(torch.zeros(1))
        optimizer = make([gate])
        for _ in range(50):
            gate.grad = torch.full((1,), -1.0)
            optimizer.step()
        ends.append(gate.item())
    assert 0 < ends[0] < ends[1] / 10


def test_lamb_of_timm_clips_gradients_unasked(timm):
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    clipped, plain = timm.Lamb([p], weight_decay=0.1), timm.Lamb([q], weight_decay=0.1, max_grad_norm=None)
    ours_p = nn.Parameter(torch.ones(2, 2))
    ours = LAMB([ours_p], weight_decay=0.1)
    for parameter in (p, q, ours_p):
        parameter.grad = torch.full((2, 2), 100.0)
    for optimizer in (clipped, plain, ours):
        optimizer.step()
    assert clipped.state[p]["exp_avg"][0, 0].item() == pytest.approx(0.1 * 0.5)
    assert plain.state[q]["exp_avg"][0, 0].item() == ours.state[ours_p]["exp_avg"][0, 0].item() == pytest.approx(10.0)
