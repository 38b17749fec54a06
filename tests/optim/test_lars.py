"""LARS, LARC and LAMB against their equations."""

import copy

import pytest
import torch
from support.optim_oracles import Net, Oracle, adam_update, assert_same_state, follow, lamb, lars, train, two_groups
from torch import nn

from hf_rezero import LAMB, LARS, RangerLARS
from hf_rezero.optim.foreach import norms


SGD = {"lr": 0.1, "momentum": 0.9, "trust_coefficient": 0.02, "nesterov": False, "clip": False}
CASES = {
    "lars": (LARS, lars, SGD),
    "lars without momentum": (LARS, lars, SGD | {"momentum": 0.0}),
    "lars nesterov": (LARS, lars, SGD | {"nesterov": True}),
    "larc": (LARS, lars, SGD | {"clip": True}),
    "larc nesterov": (LARS, lars, SGD | {"clip": True, "nesterov": True}),
    "lamb": (LAMB, lamb, {"betas": (0.9, 0.98), "eps": 1e-3}),
}
TIGHT, LOOSE = {"rtol": 1e-8, "atol": 1e-10}, {"rtol": 2e-4, "atol": 2e-5}


def pair(case, dtype=torch.float64, groups=None, **extra):
    cls, rule, options = CASES[case]
    groups = two_groups(dtype) if groups is None else groups
    return cls(groups, **options, **extra), Oracle(groups, rule, **options)


# The equations


TOLERANCES = {
    torch.float64: {"steps": 24, "rtol": 1e-8, "atol": 1e-10},
    torch.float32: {"steps": 24, "rtol": 2e-4, "atol": 2e-5},
    torch.bfloat16: {"steps": 8, "rtol": 5e-2, "atol": 5e-2},  # of the fused SGD of torch for the CPU, noise comes out
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_and_state_follow_the_equations(case, dtype):
    optimizer, oracle = pair(case, dtype)
    follow(optimizer, oracle, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_lamb_without_the_fused_kernel(dtype):
    optimizer, oracle = pair("lamb", dtype, fused=False)
    follow(optimizer, oracle, **(TIGHT if dtype == torch.float64 else LOOSE))


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_come_late_or_never(case):
    optimizer, oracle = pair(case)
    follow(
        optimizer, oracle, absent=lambda t, i: (i in (0, 3) and t < 9) or i == 6 or (i == 2 and t % 3 == 1), **TIGHT
    )
    assert optimizer.param_groups[1]["params"][1] not in optimizer.state


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_changes_the_rate_also_to_zero(case):
    """A warmup starts at 0, where LARC divides by it; a rate inside the momentum outlives its fall."""
    optimizer, oracle = pair(case)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10 if t <= 10 else 0.9**t)
    for h in oracle.groups:
        h["lr"] = 0.0
    p = optimizer.param_groups[0]["params"][0]
    before = p.detach().clone()
    for group in optimizer.param_groups:
        for q in group["params"]:
            q.grad = torch.ones_like(q)
    grads = [[q.grad for q in group["params"]] for group in optimizer.param_groups]
    optimizer.step()
    if "clip" in oracle.groups[0] and oracle.groups[0]["clip"]:
        for h in oracle.groups:
            h["lr"] = 1e-300  # the limit
    oracle.step(grads)
    assert torch.equal(p, before)
    scheduler.step()
    follow(optimizer, oracle, after_step=scheduler.step, **TIGHT)


@pytest.mark.parametrize("case", ["lars", "larc nesterov", "lamb"])
def test_channels_last_weights_with_contiguous_gradients(case):
    groups = two_groups()
    for group in groups:
        group["params"][1].data = group["params"][1].data.to(memory_format=torch.channels_last)
    optimizer, oracle = pair(case, groups=groups)
    follow(optimizer, oracle, steps=8, **TIGHT)
    assert groups[0]["params"][1].grad.is_contiguous() and not groups[0]["params"][1].is_contiguous()


@pytest.mark.parametrize("case", ["lars", "larc nesterov", "lamb"])
def test_more_numbers_than_one_chunk_holds(case, monkeypatch):
    monkeypatch.setattr("hf_rezero.optim.foreach.CPU_CHUNK", 20)
    optimizer, oracle = pair(case)
    follow(optimizer, oracle, steps=8, **TIGHT)


@pytest.mark.parametrize("case", ["lars", "larc", "lamb"])
def test_a_group_that_is_added_later(case):
    cls, rule, options = CASES[case]
    first, second = two_groups()
    optimizer, oracle = cls([first], **options), Oracle([first], rule, **options)
    follow(optimizer, oracle, steps=4, **TIGHT)
    optimizer.add_param_group(second)
    oracle.groups += Oracle([second], rule, **options).groups
    follow(optimizer, oracle, steps=8, **TIGHT)


# The trust ratio


@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_a_step_of_lars_is_as_long_as_eta_says_whatever_the_gradient(wd):
    """Without decay exactly lr eta |w|."""
    for scale in (1e-6, 1.0, 1e6):
        p = nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
        before, optimizer = p.detach().clone(), LARS([p], lr=0.5, weight_decay=wd, trust_coefficient=0.1)
        p.grad = torch.randn_like(p) * scale
        optimizer.step()
        length = (p.detach() - before).norm() / before.norm()
        if wd == 0:
            assert length.item() == pytest.approx(0.05, rel=1e-9)
        else:
            expected = 0.05 * (p.grad + wd * before).norm() / (p.grad.norm() + wd * before.norm())
            assert length.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_a_step_of_lamb_is_lr_times_the_weights_long(wd):
    """The ratio divides by the update; the one that Ralamb publishes, by the norm of the new weights."""
    p = nn.Parameter(torch.randn(7, 5, dtype=torch.float64) * 0.02)
    optimizer = LAMB([p], lr=0.03, weight_decay=wd)
    for _ in range(5):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert ((p.detach() - before).norm() / before.norm()).item() == pytest.approx(0.03, rel=1e-9)


def test_larc_moves_no_layer_faster_than_lr():
    """A ratio below lr scales as LARS does; above it, the step is that of SGD."""
    for gradient, clipped in ((1e-3, True), (1e3, False)):
        p = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64))
        optimizer = LARS([p], lr=0.1, momentum=0.0, trust_coefficient=0.02, clip=True)
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        expected = 0.1 * gradient if clipped else 0.02 * 3
        torch.testing.assert_close(3 - p.detach(), torch.full_like(p, expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_zero_weights_and_zero_gradients_stay_finite(case):
    zero, still = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(3, 2))
    cls, _, options = CASES[case]
    for wd in (0.0, 0.1):
        optimizer = cls([zero, still], **(options | {"lr": 0.1, "weight_decay": wd}))
        for _ in range(3):
            zero.grad, still.grad = torch.ones(3, 2), torch.zeros(3, 2)
            optimizer.step()
        assert zero.isfinite().all() and still.isfinite().all()
        assert (zero < 0).all(), "a ratio of 0 would keep it at zero for ever"
        assert torch.equal(still, torch.ones(3, 2)) if wd == 0 else (still < 1).all()


@pytest.mark.parametrize("cls", [LARS, LAMB, RangerLARS])
def test_resweights_are_never_scaled_or_decayed_whatever_their_group(cls):
    """A gate with a constant gradient goes with lr, not with its own size; the matrix beside it is decayed."""
    options = {"trust_coefficient": 0.001, "momentum": 0.0} if cls is LARS else {"betas": (0.9, 0.9)}
    ends = {}
    for decay in (0.0, 0.5):
        gate, bias, w = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((2,), 100.0)), nn.Parameter(torch.eye(3))
        optimizer = cls([gate, bias, w], lr=0.1, weight_decay=decay, **options)
        for _ in range(40):
            gate.grad, bias.grad, w.grad = -torch.ones(1), torch.zeros(2), torch.zeros(3, 3)
            optimizer.step()
        ends[decay] = gate.item()
        assert torch.equal(bias.detach(), torch.full((2,), 100.0)), "decayed"
        assert (w[0, 0].item() < 0.99) == (decay > 0)
    assert ends[0.0] == ends[0.5]
    if cls is RangerLARS:
        assert 0.5 < ends[0.0] < 4, "40 steps of lr r_t, halved by Lookahead"
    else:
        assert ends[0.0] == pytest.approx(4.0, rel=1e-4)


@pytest.mark.parametrize("fused", [None, False])
def test_lamb_steps_as_adam_for_vectors(fused):
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    expected, s = p.detach().clone(), {"step": 0}
    optimizer = LAMB([p], lr=0.1, weight_decay=0.3, fused=fused)
    h = {"betas": (0.9, 0.999), "eps": 1e-6}
    for t in range(1, 10):
        p.grad = torch.tensor([0.3 * t, -1.0, 2.0], dtype=torch.float64)
        s["step"] = t
        expected = expected - 0.1 * adam_update(p.grad, s, h)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_left_as_they_are(case, channels_last):
    groups = two_groups(torch.float32)
    if channels_last:
        groups[0]["params"][1].data = groups[0]["params"][1].data.to(memory_format=torch.channels_last)
    optimizer, _ = pair(case, groups=groups)
    for _ in range(3):
        kept = []
        for group in groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
                kept.append((p, p.grad, p.grad.clone()))
        optimizer.step()
        assert all(p.grad is grad and torch.equal(grad, copied) for p, grad, copied in kept)


# Precision, copies, errors


def test_norms_of_half_precision_are_taken_in_fp32():
    """257 ones have the norm 16.03, in bf16 16; that of large numbers is no number of fp16."""
    many, large = norms([torch.ones(257, dtype=torch.bfloat16)]), norms([torch.full((100,), 3e4, dtype=torch.float16)])
    assert many.dtype == large.dtype == torch.float32
    assert many.item() == pytest.approx(257**0.5, rel=1e-6) and large.item() == pytest.approx(3e5, rel=1e-3)
    assert norms([torch.ones(3, dtype=torch.float64)]).dtype == torch.float64


@pytest.mark.parametrize("case", CASES)
def test_a_copied_optimizer_and_a_loaded_one_go_on(case):
    cls, _, options = CASES[case]
    net = Net()
    optimizer = cls(net.parameters(), **(options | {"lr": 0.01, "weight_decay": 0.1}))
    train(net, optimizer, range(8))
    twin, copied = copy.deepcopy((net, optimizer))
    loaded_net = copy.deepcopy(net)
    loaded = cls(loaded_net.parameters(), lr=0.5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((net, optimizer), (twin, copied), (loaded_net, loaded)):
        train(model, opt, range(8, 20))
    for model, opt in ((twin, copied), (loaded_net, loaded)):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model.parameters(), strict=True))
        assert_same_state(opt.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(
    "name, value",
    [("lr", -0.1), ("momentum", 1.0), ("momentum", -0.5), ("weight_decay", -1.0), ("trust_coefficient", 0)],
)
def test_hyper_parameters_of_lars_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}.*expected"):
        LARS([nn.Parameter(torch.ones(1))], **({"lr": 0.1} | {name: value}))


@pytest.mark.parametrize("name, value", [("lr", -0.1), ("betas", (0.9, 1.5)), ("eps", -1.0), ("weight_decay", -1.0)])
def test_hyper_parameters_of_lamb_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name}=\(?{str(value).strip('()')}.*expected"):
        LAMB([nn.Parameter(torch.ones(1))], **{name: value})


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_sparse_gradients_are_refused(cls):
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(5, 3\).*sparse.*SparseAdam"):
        cls(embedding.parameters(), lr=0.1).step()


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_the_closure_is_called_once_and_its_loss_returned(cls):
    closed, plain = Net(), Net()
    plain.load_state_dict(closed.state_dict())
    optimizer, calls = cls(closed.parameters(), lr=0.01), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = closed.loss(len(calls))
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == train(plain, cls(plain.parameters(), lr=0.01), range(1, 6)) and len(calls) == 5
    assert all(torch.equal(a, b) for a, b in zip(closed.parameters(), plain.parameters(), strict=True))
