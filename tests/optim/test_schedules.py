"""Schedules of straight lines, and residual weights that no schedule moves."""

import pytest
import torch
from support.training import make_trainer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_rezero import ReZeroForCausalLM
from hf_rezero.optim.schedules import PiecewiseLinear, keep_constant


# the superconvergence run of the authors of ReZero, learning rates over 1.2
SUPERCONVERGENCE = {
    "points": [[0, 0.032 / 1.2], [0.1, 1], [0.9, 0.032 / 1.2], [1, 0.001 / 1.2]],
    "momentum": [[0, 0.95], [0.1, 0.85], [0.9, 0.95]],
}


def weights(count=1):
    return [torch.zeros(2, requires_grad=True) for _ in range(count)]


def run(optimizer, scheduler, steps):
    """What the first group has at each step."""
    seen = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"] if "momentum" in group else group["betas"][0]))
        optimizer.step()
        scheduler.step()
    return seen


def test_rise_and_fall_are_those_of_the_one_cycle_policy_of_torch():
    ours, theirs = (torch.optim.SGD(weights(), lr=0.4, momentum=0.9) for _ in range(2))
    reference = OneCycleLR(
        theirs, 0.4, total_steps=41, pct_start=10 / 40, anneal_strategy="linear", div_factor=25, final_div_factor=1e4
    )
    # torch ends at its last step, and rises until pct_start of all steps, less one
    points = [(0, 1 / 25), (9.25 / 40, 1), (1, 1 / 25e4)]
    ours_seen = run(ours, PiecewiseLinear(ours, 40, points, [(0, 0.95), (9.25 / 40, 0.85), (1, 0.95)]), 41)
    for (lr, momentum), (expected, cycled) in zip(ours_seen, run(theirs, reference, 41), strict=True):
        assert lr == pytest.approx(expected) and momentum == pytest.approx(cycled)


def test_superconvergence_passes_through_its_points():
    sgd = torch.optim.SGD(weights(), lr=1.2, momentum=0.9)
    seen = run(sgd, PiecewiseLinear(sgd, 100, **SUPERCONVERGENCE), 101)
    for step, (lr, momentum) in {
        0: (0.032, 0.95),
        10: (1.2, 0.85),
        50: (0.616, 0.9),
        90: (0.032, 0.95),
        95: (0.0165, 0.95),
        100: (0.001, 0.95),
    }.items():
        assert seen[step] == pytest.approx((lr, momentum)), step


def test_momentum_of_adam_is_its_first_beta():
    adam = torch.optim.Adam(weights(), betas=(0.9, 0.99))
    seen = run(adam, PiecewiseLinear(adam, 2, [[0, 1]], [[0, 0.95], [1, 0.85]]), 3)
    assert [momentum for _, momentum in seen] == pytest.approx([0.95, 0.9, 0.85])
    assert adam.param_groups[0]["betas"] == (0.85, 0.99)


def test_constant_groups_keep_learning_rate_and_momentum():
    weight, resweight = weights(2)
    groups = [{"params": [weight]}, {"params": [resweight], "lr": 0.1, "momentum": 0.5}]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    scheduler = PiecewiseLinear(sgd, 10, **SUPERCONVERGENCE)
    keep_constant(scheduler, [1])
    for _ in range(5):
        assert (sgd.param_groups[1]["lr"], scheduler.get_last_lr()[1]) == (0.1, 0.1)
        sgd.step()
        scheduler.step()
        assert sgd.param_groups[1]["momentum"] == 0.5
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.513, abs=1e-3)
    assert sgd.param_groups[0]["momentum"] == pytest.approx(0.9)


def test_an_interrupted_schedule_goes_on():
    def start():
        sgd = torch.optim.SGD(weights(), lr=1.2, momentum=0.9)
        return sgd, PiecewiseLinear(sgd, 20, **SUPERCONVERGENCE)

    whole = run(*start(), 20)
    sgd, scheduler = start()
    run(sgd, scheduler, 7)
    again, resumed = start()
    again.load_state_dict(sgd.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert run(again, resumed, 13) == whole[7:]


@pytest.mark.parametrize("points", [[], [[0, 1], [0, 2]], [[0.5, 1], [0.1, 2]], [[1, 2, 3]], 0.5, [["a", 1]]])
def test_points_that_are_none_are_refused(points):
    with pytest.raises(ValueError, match="expected pairs"):
        PiecewiseLinear(torch.optim.SGD(weights(), lr=1.0), 10, points)


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(ValueError, match="momentum points for Adagrad, which has no momentum"):
        PiecewiseLinear(torch.optim.Adagrad(weights()), 10, [[0, 1]], [[0, 0.9]])
    with pytest.raises(ValueError, match="with ReduceLROnPlateau, which moves all groups together"):
        keep_constant(ReduceLROnPlateau(torch.optim.SGD(weights(), lr=1.0)), [0])


class Record(TrainerCallback):
    """Learning rates of the groups, and the momentum of the first, at each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        groups = optimizer.param_groups
        self.seen.append((groups[0]["lr"], groups[-1]["lr"], groups[0].get("momentum")))


def train(model, arguments, resume=None, **values):
    record = Record()
    args = arguments(resweight_learning_rate=0.1, resweight_constant_lr=True, **values)
    trainer = make_trainer(model, args, callbacks=[record])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, record.seen


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "warmup_stable_decay"])
def test_trainer_leaves_residual_weights_alone_under_every_schedule(make_config, arguments, kind):
    kwargs = {"num_decay_steps": 2} if kind == "warmup_stable_decay" else {}
    model = ReZeroForCausalLM(make_config())
    _, seen = train(model, arguments, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=2)
    rates = [lr for lr, *_ in seen]
    assert [lr for _, lr, _ in seen] == [0.1] * 4
    assert rates == ([0.01] * 4 if kind == "constant" else [0.0, 0.005, 0.01, rates[3]])


def test_trainer_runs_superconvergence_and_resumes_it_exactly(make_config, arguments):
    state = ReZeroForCausalLM(make_config()).state_dict()
    values = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_kwargs": SUPERCONVERGENCE, "max_steps": 10}
    values |= {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.05, "weight_decay": 2e-4}

    def start(resume=None):
        model = ReZeroForCausalLM(make_config())
        model.load_state_dict(state)
        return train(model, arguments, resume, **values)

    whole, seen = start()
    assert [lr for lr, *_ in seen[:2]] == pytest.approx([0.05 * 0.032 / 1.2, 0.05])
    assert [m for *_, m in seen[:2]] == pytest.approx([0.95, 0.85])
    assert {lr for _, lr, _ in seen} == {0.1}
    resumed, rest = start(f"{whole.args.output_dir}/checkpoint-5")
    assert rest == seen[5:]
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_trainer_refuses_constant_rates_of_missing_residual_weights(arguments):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="groups hold no residual weight of GPT2LMHeadModel: use `param_groups`"):
        make_trainer(model, arguments(resweight_constant_lr=True)).train()


@pytest.mark.parametrize("damage", [{"base_lrs": [float("nan")]}, {"last_epoch": float("nan")}, {"last_epoch": -2}])
def test_a_damaged_state_is_refused(damage):
    scheduler = PiecewiseLinear(torch.optim.SGD(weights(), lr=0.4), 4, [(0, 0), (1, 1)])
    with pytest.raises(ValueError, match="expected finite numbers"):
        scheduler.load_state_dict(scheduler.state_dict() | damage)
