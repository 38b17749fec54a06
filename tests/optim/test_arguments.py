"""Arguments of optimizers that cannot be: one ValueError each, before a step is taken."""

import pytest
import torch
from torch import nn

from hf_rezero import LAMB, LARS, Muon, RAdam, Ranger, RangerLARS, centralize_gradients, lookahead
from hf_rezero.optim.arguments import check_arguments


OURS = (RAdam, Ranger, RangerLARS, LAMB, LARS, Muon)
THEIRS = (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam)


@pytest.mark.parametrize("make", [*OURS, *THEIRS], ids=lambda make: make.__name__)
@pytest.mark.parametrize("value", ["fast", None, True, (0.1, 0.2), {}, float("nan"), float("inf"), -1.0, 10**400, 1j])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_numbers(make, name, value):
    with pytest.raises(ValueError, match=f"got {name}=x"):
        check_arguments(make, {"lr": 0.1} | {name: value}, f"{name}=x")
    check_arguments(make, {"lr": 0.1}, "lr=0.1")


@pytest.mark.parametrize("make", OURS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("value", ["fast", None, (0.1, 0.2), float("nan"), float("inf"), -1.0, 10**400, 1j])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_our_constructors_raise_nothing_else(make, name, value):
    with pytest.raises(ValueError, match=f"got .*{name}="):
        make([nn.Parameter(torch.ones(2, 2))], **{"lr": 0.1} | {name: value})


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (RAdam, {"betas": 0.9}, "expected as many numbers as the default has"),
        (RAdam, {"betas": (0.9,)}, "expected as many numbers"),
        (RAdam, {"betas": (0.9, "0.99")}, "expected as many numbers"),
        (RAdam, {"betas": (0.9, 1.0)}, "with which RAdam cannot work: got lr=.*two betas in"),
        (RAdam, {"eps": 0}, "the steps of RAdam are not finite with it"),
        (Ranger, {"eps": 0.0}, "the steps of Ranger are not finite with it"),
        (torch.optim.AdamW, {"eps": 0.0}, "the steps of AdamW are not finite with it"),
        (RAdam, {"degenerated_to_sgd": "no"}, "expected True or False"),
        (RAdam, {"fused": "yes"}, "expected True or False"),
        (torch.optim.AdamW, {"amsgrad": "maybe"}, "expected True or False"),
        (torch.optim.AdamW, {"foreach": "yes"}, "expected True or False"),
        (Ranger, {"k": 2.5}, "expected a whole number"),
        (Ranger, {"k": True}, "expected a whole number"),
        (Ranger, {"k": 0}, "expected a whole k >= 1"),
        (Ranger, {"alpha": 1.5}, "0 < alpha <= 1"),
        (LARS, {"nesterov": 1}, "expected True or False"),
        (Muon, {"num_iterations": 2.5}, "expected a whole number"),
        (Muon, {"num_iterations": 10**12}, "1 to 100 iterations"),
        (torch.optim.SGD, {"nesterov": True}, "Nesterov momentum requires"),
        (torch.optim.AdamW, {"fused": True, "foreach": True}, "with which AdamW cannot work"),
    ],
)
def test_types_and_ranges(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(make, {"lr": 0.1} | arguments, "it")


@pytest.mark.parametrize(
    "values", [{"k": "5"}, {"alpha": "fast"}, {"momentum": None}, {"evaluate_slow": "yes"}, {"k": 1.0}]
)
def test_lookahead(values):
    with pytest.raises(ValueError, match="got .*expected"):
        lookahead(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1), **values)


def test_centralisation():
    with pytest.raises(ValueError, match="got conv_only='yes': expected True or False"):
        centralize_gradients(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1), conv_only="yes")


def test_a_learning_rate_may_be_a_tensor():
    RAdam([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1))
