"""Lookahead and SNOO around any optimizer; and what every optimizer must keep through saves, skips and modes."""

import copy
import io
import pickle

import pytest
import torch
from support.optim_oracles import EVERY, Net, Oracle, adamw, assert_same_state, follow, sgd, train, two_groups
from torch import nn

from hf_rezero import RAdam, Ranger, RangerLARS, centralize_gradients, lookahead


TIGHT, LOOSE = {"rtol": 1e-8, "atol": 1e-10}, {"rtol": 2e-4, "atol": 2e-5}
SGD, ADAM = {"momentum": 0.9}, {"betas": (0.9, 0.98), "eps": 1e-3}
BASES = {
    "sgd": (torch.optim.SGD, sgd, SGD, {}),
    "adamw fused": (torch.optim.AdamW, adamw, ADAM, {"fused": True}),
    "adamw foreach": (torch.optim.AdamW, adamw, ADAM, {"foreach": True}),
}
OUTER = {
    "lookahead": {"k": 5, "alpha": 0.5},
    "lookahead 0.8": {"k": 3, "alpha": 0.8},
    "snoo": {"k": 4, "alpha": 0.7, "outer_momentum": 0.6},
}


def pair(outer, base, dtype=torch.float64, groups=None):
    groups = two_groups(dtype) if groups is None else groups
    cls, rule, options, path = BASES[base]
    h = OUTER[outer]
    optimizer = lookahead(cls(groups, **options, **path), h["k"], h["alpha"], h.get("outer_momentum", 0.0))
    return optimizer, Oracle(groups, rule, **options, **h)


def outer(cls=RAdam, **options):
    """A scalar of fp64 at 0 with gradient 1 under Lookahead around SGD(0.1)."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return p, lookahead(torch.optim.SGD([p], lr=0.1), **options)


def push(p, optimizer, times=1):
    for _ in range(times):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.item()


def saved(state):
    """The state after a way through a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# The equations


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", OUTER)
def test_parameters_and_state_follow_the_equations(name, base, dtype):
    optimizer, oracle = pair(name, base, dtype)
    follow(optimizer, oracle, **(TIGHT if dtype == torch.float64 else LOOSE))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["lookahead", "snoo"])
def test_gradients_that_come_late_or_never(name, base):
    optimizer, oracle = pair(name, base)
    follow(
        optimizer, oracle, absent=lambda t, i: (i in (0, 3) and t < 9) or i == 6 or (i == 2 and t % 3 == 1), **TIGHT
    )
    assert optimizer.param_groups[1]["params"][1] not in optimizer.state, "no state where there was never a gradient"


@pytest.mark.parametrize("name", ["lookahead", "snoo"])
def test_more_numbers_than_one_chunk_holds(name, monkeypatch):
    monkeypatch.setattr("hf_rezero.optim.foreach.CPU_CHUNK", 20)
    optimizer, oracle = pair(name, "sgd")
    follow(optimizer, oracle, steps=13, **TIGHT)


@pytest.mark.parametrize("name", ["lookahead", "snoo"])
def test_a_schedule_changes_the_rate(name):
    optimizer, oracle = pair(name, "adamw fused")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
    follow(optimizer, oracle, after_step=scheduler.step, **TIGHT)


def test_by_hand():
    """The first sync goes half the way back to the initial weights: it is not a no-op."""
    p, optimizer = outer(k=3)
    assert [push(p, optimizer) for _ in range(7)] == pytest.approx([-0.1, -0.2, -0.15, -0.25, -0.35, -0.3, -0.4])


def test_snoo_by_hand():
    """k = 1, s = 0.1 each time: b = 0.1, 0.15, 0.175 and steps alpha (mu b + s) = 0.15, 0.175, 0.1875."""
    p, optimizer = outer(k=1, alpha=1.0, momentum=0.5)
    assert [push(p, optimizer) for _ in range(3)] == pytest.approx([-0.15, -0.325, -0.5125])


@pytest.mark.parametrize("name", OUTER)
def test_a_group_that_is_added_later_has_a_cycle_of_its_own(name):
    cls, rule, options, path = BASES["adamw fused"]
    first, second = two_groups()
    h = OUTER[name]
    optimizer = lookahead(cls([first], **options, **path), h["k"], h["alpha"], h.get("outer_momentum", 0.0))
    oracle = Oracle([first], rule, **options, **h)
    follow(optimizer, oracle, steps=5, **TIGHT)
    optimizer.add_param_group(second)
    oracle.groups += Oracle([second], rule, **options, **h).groups
    follow(optimizer, oracle, steps=12, **TIGHT)
    assert [group["lookahead_step"] for group in optimizer.param_groups] == [17, 12]


@pytest.mark.parametrize("options", [{"k": 3}, {"k": 3, "momentum": 0.5}])
@pytest.mark.parametrize("name", ["lookahead+adafactor", "lookahead+muon"])
def test_optimizers_of_torch_run_inside_unchanged(name, options):
    """k steps of the bare optimizer, then the outer step by hand, and again from there with the state that it had."""
    inner = {"lookahead+adafactor": torch.optim.Adafactor, "lookahead+muon": torch.optim.Muon}[name]
    p = nn.Parameter(torch.randn(4, 3))
    q = nn.Parameter(p.detach().clone())
    wrapped, bare = lookahead(inner([p], lr=0.1), **options), inner([q], lr=0.1)
    slow, b, mu = q.detach().clone(), torch.zeros(4, 3), options.get("momentum", 0.0)
    for t in range(1, 13):
        p.grad = torch.randn(4, 3)
        q.grad = p.grad.clone()
        wrapped.step()
        bare.step()
        if t % 3 == 0:
            b = mu * b + slow - q.detach()
            slow = slow - 0.5 * (mu * b + (slow - q.detach()))
            q.data.copy_(slow)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# State


def test_layout():
    net = Net()
    optimizer = lookahead(torch.optim.AdamW(net.parameters(), lr=0.1), k=3, alpha=0.7, momentum=0.5)
    train(net, optimizer, range(4))
    state = optimizer.state_dict()
    keys = {"k": 3, "alpha": 0.7, "momentum": 0.5, "step": 4, "evaluating": False}
    assert {f"lookahead_{key}": value for key, value in keys.items()}.items() <= state["param_groups"][0].items()
    assert type(state["param_groups"][0]["lookahead_step"]) is int
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "slow", "slow_momentum"}
    never = [name for name, _ in net.named_parameters()].index("never")
    assert never not in state["state"]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_run_that_stops_in_mid_cycle_goes_on_to_the_bit(name, dtype):
    """Also for a parameter whose gradients begin after the stop, and one that never has any."""
    torch.manual_seed(0)
    straight = Net(dtype)
    stopped = copy.deepcopy(straight)
    reference = EVERY[name](list(straight.parameters()))
    train(straight, reference, range(20))
    before = EVERY[name](list(stopped.parameters()))
    train(stopped, before, range(8))
    state, weights = saved(before.state_dict()), saved(stopped.state_dict())

    resumed = Net(dtype)
    resumed.load_state_dict(weights)
    optimizer = EVERY[name](list(resumed.parameters()), lr=0.5)  # the rate comes from the file
    optimizer.load_state_dict(state)
    assert_same_state(optimizer.state_dict(), state)
    train(resumed, optimizer, range(8, 20))
    assert same_weights(resumed, straight)
    assert_same_state(optimizer.state_dict(), reference.state_dict())
    assert not same_weights(straight, stopped)


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith(("lookahead", "snoo", "gc+look"))])
def test_the_cycle_matters_to_a_run_that_goes_on(name):
    """The test above sees lost slow weights."""
    net = Net()
    optimizer = EVERY[name](list(net.parameters()))
    train(net, optimizer, range(8))
    twin = copy.deepcopy(net)
    other = EVERY[name](list(twin.parameters()))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        del entry["slow"]
    other.load_state_dict(state)
    train(net, optimizer, range(8, 20))
    train(twin, other, range(8, 20))
    assert not same_weights(net, twin)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_bf16_parameters_have_fp32_slow_weights_also_after_a_load(momentum):
    """Steps of a quarter of a bf16 spacing add up in the slow weights."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    make = lambda p: lookahead(torch.optim.SGD([p], lr=2**-7), k=1, alpha=0.125, momentum=momentum)  # noqa: E731
    optimizer = make(p)
    push2 = lambda p, o: (setattr(p, "grad", torch.ones_like(p)), o.step())  # noqa: E731
    for _ in range(3):
        push2(p, optimizer)
    entry = optimizer.state[p]
    names = ["slow", "slow_momentum"] if momentum else ["slow"]
    assert all(entry[name].dtype == torch.float32 for name in names)
    assert not torch.equal(entry["slow"], entry["slow"].bfloat16().float())
    q = nn.Parameter(p.detach().clone())
    resumed = make(q)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert all(torch.equal(resumed.state[q][name], entry[name]) for name in names)
    assert all(resumed.state[q][name].dtype == torch.float32 for name in names)
    assert all(resumed.state[q][name] is not entry[name] for name in names)


def test_a_load_does_not_share_slow_weights_with_its_source():
    p, optimizer = outer(k=2)
    push(p, optimizer, 3)
    state = optimizer.state_dict()
    q, other = outer(k=2)
    other.load_state_dict(state)
    kept = optimizer.state[p]["slow"].clone()
    push(q, other, 5)
    assert torch.equal(optimizer.state[p]["slow"], kept)


def test_weights_that_a_load_brings_start_a_new_cycle_after_it():
    """A checkpoint from before any step: the slow weights are those of the first step after the load."""
    p, optimizer = outer(k=2)
    fresh = copy.deepcopy(optimizer.state_dict())
    push(p, optimizer, 1)
    optimizer.load_state_dict(fresh)
    p.data.fill_(10.0)
    assert push(p, optimizer, 2) == pytest.approx(9.9)


def test_a_load_of_another_number_of_parameters_is_refused_by_torch():
    p, optimizer = outer()
    push(p, optimizer)
    other = lookahead(torch.optim.SGD([p, nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict(optimizer.state_dict())


def test_copying_the_object_drops_lookahead_as_documented_and_its_state_dict_does_not():
    net = Net()
    optimizer = lookahead(torch.optim.SGD(net.parameters(), lr=0.1))
    train(net, optimizer, range(3))
    twin, dropped = copy.deepcopy((net, optimizer))
    train(twin, dropped, range(3, 6))
    assert dropped.param_groups[0]["lookahead_step"] == 3
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["lookahead_step"] == 3
    other = lookahead(torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("cls", [Ranger, RangerLARS])
def test_a_copy_of_ranger_still_loads_fp32_slow_weights(cls):
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = cls([p], lr=1e-3)
    for _ in range(8):
        p.grad = torch.ones_like(p)
        optimizer.step()
    copied = copy.deepcopy(optimizer)
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (entry,) = copied.state.values()
    assert entry["slow"].dtype == torch.float32


# Steps that do not happen, and those that are more than one backward pass


def scaled_steps(optimizer, p, overflows, steps=9):
    """Steps under a GradScaler with infinite gradients in those of `overflows`."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for t in range(steps):
        optimizer.zero_grad()
        scaler.scale((p * (p + t)).sum()).backward()
        if t in overflows:
            p.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()


MAKERS = {
    "adamw": lambda params: lookahead(torch.optim.AdamW(params, lr=0.1), k=3),
    "adamw fused": lambda params: lookahead(torch.optim.AdamW(params, lr=0.1, fused=True), k=3),
    "sgd fused": lambda params: lookahead(torch.optim.SGD(params, lr=0.1, fused=True), k=3),
    "snoo, adam fused": lambda params: lookahead(torch.optim.Adam(params, lr=0.1, fused=True), k=3, momentum=0.5),
    "gc, adamw fused": lambda params: centralize_gradients(MAKERS["adamw fused"](params)),
    "ranger": lambda params: Ranger(params, lr=0.1, k=3),
    "ranger_lars": lambda params: RangerLARS(params, lr=0.1, k=3),
}


@pytest.mark.parametrize("overflows", [{0}, {2}, {4, 5}, {0, 2, 8}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_that_a_grad_scaler_skips_do_not_count(name, overflows):
    """Equal to a run that never saw these batches; a fused optimizer is called in them, the others are not."""
    scaled, plain = (nn.Parameter(torch.linspace(1, 2, 4)) for _ in range(2))
    optimizer, reference = MAKERS[name]([scaled]), MAKERS[name]([plain])
    scaled_steps(optimizer, scaled, overflows)
    for t in range(9):
        if t not in overflows:
            reference.zero_grad()
            (plain * (plain + t)).sum().backward()
            reference.step()
    assert optimizer.param_groups[0]["lookahead_step"] == 9 - len(overflows)
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optimizer.state[scaled]["slow"], reference.state[plain]["slow"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_accumulated_gradients_make_one_step(name):
    """Two halves of a loss, one step: in centralisation, Lookahead and trust ratios nothing happens between them."""
    ours, whole = Net(torch.float64), Net(torch.float64)
    whole.load_state_dict(ours.state_dict())
    one, other = EVERY[name](list(ours.parameters())), EVERY[name](list(whole.parameters()))
    for t in range(8):
        one.zero_grad()
        for part in range(2):
            (ours.loss(2 * t + part) / 2).backward()
        one.step()
        other.zero_grad()
        ((whole.loss(2 * t) + whole.loss(2 * t + 1)) / 2).backward()
        other.step()
    for a, b in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name", [name for name in EVERY if not name.endswith("torch_muon")]
)  # which takes matrices only
def test_a_gate_at_zero_opens(name):
    """With the loss (gate - 1)^2, in 60 steps, whatever stands in its group."""
    gate = nn.Parameter(torch.zeros(1))
    beside = nn.Parameter(torch.randn(4, 4) * 0.02)
    optimizer = EVERY[name]([gate, beside], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        ((gate - 1).pow(2).sum() + (beside - 1).pow(2).mean()).backward()
        optimizer.step()
    # Adafactor steps in proportion to a parameter, or to 1e-3: a ratio on a gate is as slow
    assert gate.item() > (1e-3 if name.endswith("adafactor") else 0.1)


@pytest.mark.parametrize("name", EVERY)
def test_closures(name):
    """torch calls the hooks before the closure: slow weights and centralisation must not miss its gradients."""
    closed, plain = Net(), Net()
    plain.load_state_dict(closed.state_dict())
    optimizer = EVERY[name](list(closed.parameters()))
    losses = []
    for t in range(14):

        def closure(t=t):
            closed.zero_grad()
            loss = closed.loss(t)
            loss.backward()
            return loss

        losses.append((optimizer.step(closure) if t % 2 else optimizer.step(closure=closure)).item())
    closed.zero_grad()
    reference = EVERY[name](list(plain.parameters()))
    assert losses == train(plain, reference, range(14))
    assert same_weights(closed, plain)
    assert_same_state(optimizer.state_dict(), reference.state_dict())


def test_lbfgs_with_its_many_evaluations_of_the_closure():
    p = nn.Parameter(torch.full((3,), 4.0))
    optimizer = lookahead(torch.optim.LBFGS([p], max_iter=4), k=2)
    steps = []
    for _ in range(4):

        def closure():
            optimizer.zero_grad()
            loss = (p - 1).pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        steps.append(p.detach()[0].item())
    assert steps[0] == pytest.approx(1, abs=1e-4) and steps[1] == pytest.approx(2.5, abs=1e-4)


# Evaluation on the slow weights


MODES = {
    "lookahead": lambda params: lookahead(torch.optim.AdamW(params, lr=0.05), k=5, evaluate_slow=True),
    "snoo": lambda params: lookahead(torch.optim.SGD(params, lr=0.05), k=5, momentum=0.5, evaluate_slow=True),
    "ranger": lambda params: Ranger(params, lr=0.05, k=5, evaluate_slow=True),
    "ranger_lars": lambda params: RangerLARS(params, lr=0.05, k=5, evaluate_slow=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODES)
def test_eval_puts_the_slow_weights_there_and_train_the_fast_ones_back(name, dtype):
    net = Net(dtype)
    straight = copy.deepcopy(net)
    optimizer, reference = MODES[name](net.parameters()), MODES[name](straight.parameters())
    optimizer.eval()
    optimizer.train()
    train(net, optimizer, range(8))
    train(straight, reference, range(8))
    fast = copy.deepcopy(net)
    for _ in range(2):
        optimizer.eval()
        optimizer.eval()  # the second call does nothing
        slow = [optimizer.state[p]["slow"].to(dtype) for p in net.parameters() if p in optimizer.state]
        assert len(slow) == 4
        there = [p for p in net.parameters() if p in optimizer.state]
        assert all(torch.equal(p, s) for p, s in zip(there, slow, strict=True))
        assert not same_weights(net, fast)
        optimizer.train()
        optimizer.train()
        assert same_weights(net, fast)
    assert_same_state(optimizer.state_dict(), reference.state_dict())
    train(net, optimizer, range(8, 14))
    train(straight, reference, range(8, 14))
    assert same_weights(net, straight)


@pytest.mark.parametrize("name", MODES)
def test_a_step_on_the_slow_weights_is_refused(name):
    net = Net()
    optimizer = MODES[name](net.parameters())
    train(net, optimizer, range(7))
    optimizer.eval()
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        train(net, optimizer, [7])
    assert same_weights(net, before)
    optimizer.train()
    train(net, optimizer, [7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODES)
def test_a_checkpoint_that_is_taken_in_eval_mode_goes_on_to_the_bit(name, dtype):
    straight = Net(dtype)
    stopped = copy.deepcopy(straight)
    train(straight, MODES[name](straight.parameters()), range(20))
    optimizer = MODES[name](stopped.parameters())
    train(stopped, optimizer, range(8))
    optimizer.eval()
    state, weights = saved(optimizer.state_dict()), saved(stopped.state_dict())
    resumed = Net(dtype)
    resumed.load_state_dict(weights)
    optimizer = MODES[name](resumed.parameters())
    optimizer.load_state_dict(state)
    optimizer.train()
    train(resumed, optimizer, range(8, 20))
    assert same_weights(resumed, straight)


def test_modes_only_where_they_are_asked_for():
    p, optimizer = outer()
    assert not hasattr(optimizer, "eval") and not hasattr(Ranger([p]), "train")
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.eval = optimizer.train = lambda: None  # as schedule-free ones have it
    with pytest.raises(ValueError, match="SGD has train"):
        lookahead(optimizer, evaluate_slow=True)


# Refusals


@pytest.mark.parametrize(
    "name, value",
    [("k", 0), ("k", 2.0), ("alpha", 0.0), ("alpha", 1.1), ("momentum", 1.0), ("momentum", -0.1)],
)
def test_hyper_parameters_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}.*expected"):
        outer(**{name: value})


def test_lookahead_is_put_around_only_once():
    p, optimizer = outer()
    with pytest.raises(ValueError, match="SGD has Lookahead already"):
        lookahead(optimizer)
    for cls in (Ranger, RangerLARS):
        with pytest.raises(ValueError, match=f"{cls.__name__} has Lookahead already"):
            lookahead(cls([p]))


def test_the_hooks_run_once_in_each_step():
    """A subclass whose step calls that of its parent runs torch's hooks twice; ours do not."""
    p = nn.Parameter(torch.zeros(2, 2))
    counts = []
    RAdam([p])
    for make in (RAdam, Ranger, RangerLARS):
        optimizer = make([p], lr=0.1)
        optimizer.register_step_post_hook(lambda *_: counts.append(1))
        push_matrix = torch.ones(2, 2)
        p.grad = push_matrix
        optimizer.step()
    assert len(counts) == 3


def test_a_checkpoint_of_the_optimizer_without_lookahead_is_taken_up():
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.ones_like(p)
    plain = torch.optim.AdamW([p], lr=0.1)
    plain.step()
    optimizer = lookahead(torch.optim.AdamW([p], lr=0.1), k=2, alpha=0.25)
    optimizer.load_state_dict(plain.state_dict())
    start = p.detach().clone()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["slow"], start)
    assert optimizer.param_groups[0]["lookahead_step"] == 1


def test_a_group_may_have_its_own_k_and_alpha():
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "lookahead_k": 2, "lookahead_alpha": 0.25}]
    for optimizer in (lookahead(torch.optim.SGD(groups, lr=0.1), k=3), Ranger(groups, k=3)):
        found = [(group["lookahead_k"], group["lookahead_alpha"]) for group in optimizer.param_groups]
        assert found == [(3, 0.5), (2, 0.25)]
