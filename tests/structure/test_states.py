"""What is loaded is of the kind that it takes the place of, and holds numbers: every way in, every kind of damage."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rezero import (
    LAMB,
    LARS,
    Muon,
    RAdam,
    Ranger,
    RangerLARS,
    ReZero,
    ReZeroConfig,
    ReZeroForCausalLM,
    RZTXDecoderLayer,
    RZTXEncoderLayer,
    lookahead,
)
from hf_rezero.commands.running import ModelArguments, load_any_model, load_as_saved
from hf_rezero.initialization.gradinit import GradInit, half_overlap
from hf_rezero.pruning import attach_masks, find_groups, load_pruned, prune_, save_pruned
from hf_rezero.rewrite import rztx_to_rezero
from hf_rezero.structure.states import fault_of


DAMAGES = {
    "int": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "complex": lambda t: t.to(torch.complex64),
    "nan": lambda t: torch.full_like(t, torch.nan),
    "inf": lambda t: torch.full_like(t, torch.inf),
}
OPTIMIZERS = {
    "radam": RAdam,
    "ranger": Ranger,
    "lars": LARS,
    "lamb": LAMB,
    "ranger_lars": RangerLARS,
    "muon": Muon,
    "lookahead": lambda params, lr: lookahead(torch.optim.AdamW(params, lr), k=2),
    "snoo": lambda params, lr: lookahead(torch.optim.SGD(params, lr), k=1, momentum=0.5),
}


def _stepped(name):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](net.parameters(), lr=0.1)
    for _ in range(2):
        net(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def _of_ours(name, key):
    return key in ("slow", "slow_momentum") or name not in ("lookahead", "snoo")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_tensor_of_an_optimizer(name, damage):
    net, optimizer = _stepped(name)
    whole = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    names = [
        key for key, value in whole["state"][0].items() if isinstance(value, torch.Tensor) and _of_ours(name, key)
    ]
    assert names
    for key in names:
        state = copy.deepcopy(whole)
        state["state"][0][key] = DAMAGES[damage](state["state"][0][key])
        with pytest.raises(ValueError, match=f"{key} of parameter 0 (is of torch|holds . of . values)"):
            optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict()["state"], before)
    optimizer.load_state_dict(whole)


@pytest.mark.parametrize(
    "group, entry, message",
    [
        ({"lr": float("nan")}, {}, "lr of a group is nan"),
        (
            {},
            {"exp_avg": torch.ones(5)},
            r"exp_avg of parameter 0 has the shape \(5,\), and the parameter has \(2, 3\)",
        ),
        ({}, {"step": -3}, "step of parameter 0 is -3"),
        ({}, {"step": torch.tensor(torch.nan)}, "step of parameter 0 is nan"),
    ],
)
def test_numbers_and_shapes_of_an_optimizer(group, entry, message):
    _, optimizer = _stepped("radam")
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(group)
    state["state"][0].update(entry)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


def test_the_state_of_torchs_radam_is_still_taken_over():
    net = nn.Linear(3, 2)
    theirs = torch.optim.RAdam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    theirs.step()
    ours = RAdam(net.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[net.weight]["exp_avg"], theirs.state[net.weight]["exp_avg"])


MODULES = {
    "wrapper": (lambda: ReZero(nn.Linear(4, 4)), "resweight"),
    "inside": (lambda: nn.Sequential(ReZero(nn.Linear(4, 4))), "0.module.weight"),
    "encoder": (lambda: RZTXEncoderLayer(8, 2, 16), "self_attn.in_proj_weight"),
    "decoder": (lambda: nn.TransformerDecoder(RZTXDecoderLayer(8, 2, 16), 2), "layers.1.linear1.bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", MODULES)
def test_every_module_of_ours(kind, damage):
    make, name = MODULES[kind]
    module = make()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module.load_state_dict(state)
    copied = copy.deepcopy(module)  # the copy asks too
    for each in (module, copied):
        with pytest.raises(ValueError, match=f"{name} (is of torch|holds)"):
            each.load_state_dict(state | {name: DAMAGES[damage](state[name])})
        torch.testing.assert_close(each.state_dict(), state)


def test_what_may_be_infinite_or_whole_stays_allowed():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2, 2), -torch.inf))
            self.register_buffer("ids", torch.arange(2))

    block = ReZero(Masked())
    block.load_state_dict(block.state_dict())
    assert fault_of(torch.ones(1, dtype=torch.bfloat16), torch.ones(1)) is None
    assert fault_of(torch.ones(1, device="meta"), torch.ones(1)) is None
    assert fault_of(torch.tensor([1]), torch.tensor([True])) == "is of torch.int64, expected booleans as torch.bool"


@pytest.mark.parametrize("damage", DAMAGES)
def test_gradinit(damage):
    net = nn.Linear(3, 2)
    init = GradInit(net, eta=0.1, loss_fn=lambda model, x: model(x).square().mean())
    init.step(torch.ones(4, 3), half_overlap(torch.ones(4, 3), torch.zeros(4, 3)))
    state = init.state_dict()
    with pytest.raises(ValueError, match="the state cannot be loaded: scales (is of|holds)"):
        init.load_state_dict(state | {"scales": DAMAGES[damage](state["scales"])})
    moments = {branch: [DAMAGES[damage](m) for m in ms] for branch, ms in state["moments"].items()}
    with pytest.raises(ValueError, match="moment 0 of objective .* tensors have faults"):
        init.load_state_dict(state | {"moments": moments})
    init.load_state_dict(state)


@pytest.mark.parametrize("damage", [*DAMAGES])
@pytest.mark.parametrize("kind, name", [("l1", "layer.mask"), ("l0", "layer.log_alpha"), ("l1", "pull.lambda_")])
def test_masks(kind, name, damage):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = attach_masks(net, find_groups(net), kind)
    state = {key: value.clone() for key, value in masks.state_dict().items()}
    with pytest.raises(ValueError, match=f"a state of Masks cannot be loaded: {name}"):
        masks.load_state_dict(state | {name: DAMAGES[damage](state[name])})
    with pytest.raises(ValueError, match=f"cannot be loaded: pruning_masks.{name}"):
        net.load_state_dict(net.state_dict() | {f"pruning_masks.{name}": DAMAGES[damage](state[name])})
    masks.load_state_dict(state)


@pytest.mark.parametrize("damage", DAMAGES)
def test_pruned_models(damage, tmp_path):
    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    net = build()
    prune_(net, find_groups(net), {"0": torch.tensor([1, 5])})
    save_pruned(net, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"2.weight": DAMAGES[damage](state["2.weight"])}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"2\.weight (is of torch|holds)"):
        load_pruned(tmp_path, build())


@pytest.mark.parametrize("damage", DAMAGES)
def test_converted_layers(damage):
    stack = nn.TransformerEncoder(RZTXEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    state = stack.state_dict() | {"position_ids": torch.arange(3)}
    assert rztx_to_rezero(state)
    name = "layers.1.linear2.weight"
    with pytest.raises(ValueError, match=f"{name} (is of torch|holds)"):
        rztx_to_rezero(state | {name: DAMAGES[damage](state[name])})


def test_commands_refuse_weights_that_are_no_numbers(tmp_path):
    model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    load_as_saved(str(tmp_path), trust_remote_code=False)
    model.get_input_embeddings().weight.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    for load in (
        lambda: load_as_saved(str(tmp_path), trust_remote_code=False),
        lambda: load_any_model(ModelArguments(model_name_or_path=str(tmp_path)), AutoModelForCausalLM, {}),
    ):
        with pytest.raises(ValueError, match=r"16 of 4224 values of model\.embed_tokens\.weight are infinite or NaN"):
            load()
