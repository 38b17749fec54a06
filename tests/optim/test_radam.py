"""RAdam, Ranger and RangerLARS against their equations."""

import copy
import io

import pytest
import torch
from support.optim_oracles import SHAPES, Net, Oracle, assert_same_state, follow, radam, ranger_lars, train, two_groups
from torch import nn

from hf_rezero import RAdam, Ranger, RangerLARS, centralize_gradients, lookahead
from hf_rezero.optim.radam import rectification


ADAM = {"betas": (0.9, 0.98), "eps": 1e-3}
RANGER = {"betas": (0.95, 0.99), "eps": 1e-5, "k": 6, "alpha": 0.5, "centralize": True}
CASES = {
    "radam": (RAdam, radam, ADAM),
    "radam that waits": (RAdam, radam, ADAM | {"degenerated_to_sgd": False}),
    "ranger": (Ranger, radam, RANGER),
    "ranger without centralisation": (Ranger, radam, RANGER | {"centralize": False, "k": 4, "alpha": 0.8}),
    "ranger that waits": (Ranger, radam, RANGER | {"degenerated_to_sgd": False}),
    "ranger_lars": (RangerLARS, ranger_lars, RANGER),
}
TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def pair(case, dtype=torch.float64, groups=None, **extra):
    cls, rule, options = CASES[case]
    groups = two_groups(dtype) if groups is None else groups
    return cls(groups, **options, **extra), Oracle(groups, rule, **options)


# The equations


TOLERANCES = {
    torch.float64: {"steps": 24, "rtol": 1e-8, "atol": 1e-10},
    torch.float32: {"steps": 24, "rtol": 2e-4, "atol": 2e-5},
    torch.bfloat16: {"steps": 8, "rtol": 5e-2, "atol": 5e-2},
}


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_and_state_follow_the_equations(case, dtype, fused):
    optimizer, oracle = pair(case, dtype, fused=fused)
    follow(optimizer, oracle, **TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_come_late_or_never(case):
    """Each parameter counts its own steps; its slow weights start when it starts."""
    optimizer, oracle = pair(case)
    follow(
        optimizer, oracle, absent=lambda t, i: (i in (0, 3) and t < 9) or i == 6 or (i == 2 and t % 3 == 1), **TIGHT
    )
    assert optimizer.param_groups[1]["params"][1] not in optimizer.state, "no state where there was never a gradient"


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_changes_the_rate(case):
    optimizer, oracle = pair(case)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t if t != 7 else 0.0)
    follow(optimizer, oracle, after_step=scheduler.step, **TIGHT)
    assert optimizer.param_groups[0]["lr"] < 0.03 / 10


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("case", ["radam", "ranger", "ranger_lars"])
def test_channels_last_weights_with_contiguous_gradients(case, fused):
    groups = two_groups()
    for group in groups:
        weight = group["params"][1]
        weight.data = weight.data.to(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    optimizer, oracle = pair(case, groups=groups, fused=fused)
    follow(optimizer, oracle, steps=8, **TIGHT)
    assert groups[0]["params"][1].grad.is_contiguous()


@pytest.mark.parametrize("case", ["radam", "ranger", "ranger_lars"])
def test_more_numbers_than_one_chunk_holds(case, monkeypatch):
    monkeypatch.setattr("hf_rezero.optim.foreach.CPU_CHUNK", 20)
    optimizer, oracle = pair(case)
    follow(optimizer, oracle, steps=8, **TIGHT)


def test_rectification_is_that_of_the_paper():
    assert [rectification(t, 0.999) for t in range(1, 6)] == [0.0] * 5
    assert rectification(6, 0.999) == pytest.approx(0.0258, abs=1e-4)
    assert rectification(100_000, 0.999) == pytest.approx(1, abs=1e-6)
    assert rectification(1000, 0.5) == 0.0, "rho stays below 5"


@pytest.mark.parametrize("gradient", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("fused", [None, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_steps_are_steps_along_the_gradient(gradient, fused, dtype):
    """Size lr |g|, whatever the size of g."""
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = RAdam([p], lr=0.25, fused=fused)
    for t in range(1, 6):
        p.grad = torch.tensor([gradient, -gradient, 0.0], dtype=dtype)
        optimizer.step()
        expected = torch.tensor([-0.25 * t * gradient, 0.25 * t * gradient, 0.0])
        torch.testing.assert_close(p.detach().float(), expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)


@pytest.mark.parametrize("cls", [RAdam, Ranger, RangerLARS])
def test_counters_are_whole_numbers_that_no_load_casts(cls):
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = cls([p])
    for t in range(1, 400):
        p.grad = torch.ones_like(p)
        optimizer.step()
        if t == 300:  # bf16 counts to 256
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[p]["step"] == 399 and type(optimizer.state[p]["step"]) is int
    if cls is not RAdam:
        assert optimizer.param_groups[0]["lookahead_step"] == 399


# Ranger is RAdam, centralisation and Lookahead


def composed(params, *, k=6, alpha=0.5, base=RAdam, **options):
    return lookahead(centralize_gradients(base(params, **options)), k, alpha)


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "foreach"])
def test_ranger_is_the_composition_to_the_key_and_the_bit(fused):
    options = {"lr": 0.01, "betas": (0.95, 0.999), "eps": 1e-5, "weight_decay": 0.1, "fused": fused}
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    one, parts = Ranger(nets[0].parameters(), **options), composed(nets[1].parameters(), **options)
    for t in range(20):
        train(nets[0], one, [t])
        train(nets[1], parts, [t])
        assert_same_state(one.state_dict(), parts.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_ranger_is_the_composition_over_the_radam_of_torch():
    options = {"lr": 0.01, "betas": (0.95, 0.999), "eps": 1e-5, "weight_decay": 0.1}
    nets = [Net(torch.float64), Net(torch.float64)]
    nets[1].load_state_dict(nets[0].state_dict())
    one = Ranger(nets[0].parameters(), **options)
    parts = composed(nets[1].parameters(), base=torch.optim.RAdam, decoupled_weight_decay=True, **options)
    for t in range(25):
        train(nets[0], one, [t])
        train(nets[1], parts, [t])
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("direction", ["into the composition", "into Ranger"])
def test_a_run_goes_on_in_the_other_form(direction):
    options = {"lr": 0.01, "betas": (0.95, 0.999), "eps": 1e-5}
    makers = [lambda p: Ranger(p, **options), lambda p: composed(p, **options)]
    first, second = makers if direction == "into the composition" else makers[::-1]
    straight, moved = Net(), Net()
    moved.load_state_dict(straight.state_dict())
    optimizer = first(straight.parameters())
    train(straight, optimizer, range(20))
    optimizer = first(moved.parameters())
    train(moved, optimizer, range(8))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = second(moved.parameters())
    optimizer.load_state_dict(saved)
    train(moved, optimizer, range(8, 20))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), moved.parameters(), strict=True))


def test_the_first_sync_is_not_a_no_op():
    """With gradient 1 and the momentum of the first steps constant at 1: fast -6 lr, then half of it."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = Ranger([p], lr=0.1, k=3, alpha=0.5)
    for expected in (-0.1, -0.2, -0.15, -0.25):
        p.grad = torch.ones(1)
        optimizer.step()
        assert p.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cls", [RAdam, Ranger])
def test_the_loss_falls_in_each_of_the_first_steps(cls):
    """Except that Lookahead steps back in the sixth, but not up to where it started."""
    p = nn.Parameter(torch.linspace(-2, 3, 12).view(3, 4) ** 2)
    optimizer = cls([p], lr=0.01)
    losses = [p.pow(2).sum().item()]
    for _ in range(8):
        optimizer.zero_grad()
        p.pow(2).sum().backward()
        optimizer.step()
        losses.append(p.pow(2).sum().item())
    falls = [after < before for before, after in zip(losses, losses[1:], strict=False)]
    assert falls == [True] * 5 + [cls is RAdam] + [True] * 2, losses
    assert max(losses[6:]) < losses[2]


def test_centralisation_can_be_left_out():
    nets = {}
    for centralize in (True, False):
        torch.manual_seed(0)
        nets[centralize] = Net()
        train(nets[centralize], Ranger(nets[centralize].parameters(), lr=0.01, centralize=centralize), range(8))
    assert not torch.equal(nets[True].head.weight, nets[False].head.weight)
    torch.manual_seed(0)
    plain = Net()
    train(plain, lookahead(RAdam(plain.parameters(), lr=0.01, betas=(0.95, 0.999), eps=1e-5), k=6), range(8))
    assert torch.equal(nets[False].head.weight, plain.head.weight)


def test_ranger_keeps_the_mean_of_each_output_unit():
    net = Net()
    means = net.head.weight.detach().mean(1)
    train(net, Ranger(net.parameters(), lr=0.01), range(3))
    torch.testing.assert_close(net.head.weight.detach().mean(1), means)


# RangerLARS


def test_the_rectification_stands_outside_the_trust_ratio():
    """The step is lr r_t |p| long: nothing for five steps, then a warmup; a ratio over all of it would be lr |p|."""
    p = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
    optimizer = RangerLARS([p], lr=0.1, k=1000, weight_decay=0.3)
    for t in range(1, 40):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        optimizer.step()
        length = (p.detach() - before).norm() / before.norm()
        assert length.item() == pytest.approx(0.1 * rectification(t, 0.999), rel=1e-9, abs=1e-12)
    assert rectification(39, 0.999) < 0.2


def test_vectors_and_gates_of_ranger_lars_are_neither_scaled_nor_decayed():
    """They take the steps of RAdam without decay, after the first five."""
    moved = {}
    for decay in (0.0, 0.5):
        p, gate = nn.Parameter(torch.full((3,), 5.0)), nn.Parameter(torch.zeros(1))
        optimizer = RangerLARS([p, gate], lr=0.1, k=1000, weight_decay=decay)
        for _ in range(9):
            p.grad, gate.grad = torch.ones(3), torch.ones(1)
            optimizer.step()
        moved[decay] = torch.cat((p.detach() - 5, gate.detach()))
    expected = -0.1 * sum(rectification(t, 0.999) for t in range(1, 10))
    torch.testing.assert_close(moved[0.0], torch.full((4,), expected), rtol=1e-4, atol=1e-6)
    assert torch.equal(moved[0.0], moved[0.5])


# Precision


@pytest.mark.parametrize("cls", [Ranger, RangerLARS])
def test_bf16_parameters_have_fp32_slow_weights_also_after_a_load(cls):
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = cls([p], lr=1e-4, k=2, centralize=False)

    def steps(optimizer, p, count):
        for _ in range(count):
            p.grad = torch.ones_like(p)
            optimizer.step()

    steps(optimizer, p, 7)
    slow = optimizer.state[p]["slow"]
    assert slow.dtype == torch.float32 and optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(p.detach(), p.detach().to(slow.dtype).to(p.dtype))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    q = nn.Parameter(p.detach().clone())
    resumed = cls([q], lr=1e-4, k=2, centralize=False)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.state[q]["slow"].dtype == torch.float32
    assert torch.equal(resumed.state[q]["slow"], slow) and resumed.state[q]["slow"] is not slow
    steps(optimizer, p, 7)
    steps(resumed, q, 7)
    assert torch.equal(p, q)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


def test_bf16_weights_move_by_less_than_one_of_their_steps():
    """Each cycle moves the fast weight by one bf16 step and half of it stays: a bf16 average would stand still."""
    step = 2**-8  # of bf16 just below 1
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Ranger([p], lr=step, k=1, alpha=0.25)
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["slow"].item() < 1 - step / 4
    assert optimizer.state[p]["slow"].item() != p.item()


def test_mixed_precisions_in_one_group():
    params = [nn.Parameter(torch.ones(3, 2, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = Ranger(params, lr=0.01, k=2)
    for _ in range(4):
        for p in params:
            p.grad = torch.arange(6).view(3, 2).to(p.dtype)
        optimizer.step()
    for p in params[1:]:
        torch.testing.assert_close(p.detach().float(), params[0].detach(), rtol=1e-2, atol=1e-2)
    assert [optimizer.state[p]["slow"].dtype for p in params] == [torch.float32, torch.float32, torch.float64]


# Groups, copies, errors


@pytest.mark.parametrize("case", ["radam", "ranger", "ranger_lars"])
def test_a_group_that_is_added_later_starts_from_its_own_weights(case):
    cls, rule, options = CASES[case]
    first, second = two_groups()
    optimizer, oracle = cls([first], **options), Oracle([first], rule, **options)
    follow(optimizer, oracle, steps=4, **TIGHT)
    optimizer.add_param_group(second)
    oracle.groups += Oracle([second], rule, **options).groups
    follow(optimizer, oracle, steps=14, **TIGHT)


@pytest.mark.parametrize("cls", [RAdam, Ranger, RangerLARS])
def test_a_copied_optimizer_goes_on_by_itself(cls):
    net = Net()
    optimizer = cls(net.parameters(), lr=0.01)
    train(net, optimizer, range(8))
    twin, copied = copy.deepcopy((net, optimizer))
    assert copied.param_groups[0]["params"][0] is next(twin.parameters())
    train(net, optimizer, range(8, 20))
    train(twin, copied, range(8, 20))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("cls", [RAdam, Ranger, RangerLARS])
@pytest.mark.parametrize("name, value", [("lr", -1.0), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("eps", -1e-8)])
def test_hyper_parameters_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=rf"{name}=.*{str(value)[-4:-1]}"):
        cls([nn.Parameter(torch.ones(1))], **{name: value})
    with pytest.raises(ValueError, match="weight_decay=-0.5"):
        cls([nn.Parameter(torch.ones(1))], weight_decay=-0.5)
    with pytest.raises(ValueError, match="lr=nan"):
        cls([nn.Parameter(torch.ones(1))], lr=float("nan"))


@pytest.mark.parametrize("cls", [Ranger, RangerLARS])
@pytest.mark.parametrize("name, value", [("k", 0), ("k", 2.5), ("alpha", 0.0), ("alpha", 1.5)])
def test_outer_hyper_parameters_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        cls([nn.Parameter(torch.ones(1))], **{name: value})


@pytest.mark.parametrize("cls", [RAdam, Ranger, RangerLARS])
def test_sparse_gradients_and_complex_parameters_are_refused(cls):
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(5, 3\).*sparse.*SparseAdam"):
        cls(embedding.parameters(), lr=0.1).step()
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex64"):
        cls([p], lr=0.1).step()


@pytest.mark.parametrize("cls", [RAdam, Ranger, RangerLARS])
def test_the_closure_is_called_with_gradients_enabled_and_its_loss_returned(cls):
    closed, plain = Net(), Net()
    plain.load_state_dict(closed.state_dict())
    optimizer = cls(closed.parameters(), lr=0.01)
    for t in range(8):

        def closure(t=t):
            optimizer.zero_grad()
            loss = closed.loss(t)
            loss.backward()
            return loss

        expected = closed.loss(t).item()
        assert optimizer.step(closure).item() == expected
    train(plain, cls(plain.parameters(), lr=0.01), range(8))
    assert all(torch.equal(a, b) for a, b in zip(closed.parameters(), plain.parameters(), strict=True))


def test_shapes_of_the_oracle_hold_what_the_rules_tell_apart():
    assert {len(shape) for shape in SHAPES} == {1, 2, 4} and (1,) in SHAPES


@pytest.mark.parametrize("fused", [None, False])
def test_the_first_steps_move_weights_of_every_precision(fused):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        p = nn.Parameter(torch.ones(4, dtype=dtype))
        p.grad = torch.full_like(p, 0.5)
        RAdam([p], lr=0.25, fused=fused).step()
        assert p.tolist() == pytest.approx([0.875] * 4, rel=1e-12), dtype
