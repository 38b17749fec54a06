"""A small run of a model that tells which layers are the identity."""

import pytest
import torch
from support.pruning_models import IMAGE, OTHERS, TEXT, build
from torch import nn

from hf_rezero.structure.probe import changing_layers, example_of, run_quietly, zeroed


@pytest.mark.parametrize("name", [*TEXT, *OTHERS, "resnet", "rezero_resnet", "rezero_mlp"])
def test_every_family_reads_its_example(name):
    model, _ = build(name)
    example = example_of(model)
    with torch.no_grad():
        model(**example)
    assert all(len(value) == 1 for value in example.values())


def test_a_module_without_config_has_no_example():
    assert example_of(nn.Linear(2, 2)) is None and example_of(build("seed_net")[0]) is None
    assert changing_layers(nn.Sequential(nn.Linear(2, 2)), {"0": ["0.weight"]}) == set()


def test_zeros_stand_in_for_parameters_and_go_also_after_an_error():
    layer = nn.Linear(3, 2)
    weight, bias, x = layer.weight, layer.bias, torch.randn(4, 3)
    with pytest.raises(RuntimeError), zeroed(nn.ModuleDict({"a": layer}), ["a.weight", "a.bias"]):
        assert not layer(x).any()
        raise RuntimeError
    assert layer.weight is weight and layer.bias is bias and layer(x).any()


def test_a_layer_that_is_left_open_changes_its_input():
    model, _ = build("gpt2")
    gates = {f"transformer.h.{i}": [f"transformer.h.{i}.{b}.c_proj.{t}" for b in ("attn", "mlp") for t in ("weight", "bias")]
             for i in range(3)}  # fmt: skip
    assert changing_layers(model, gates) == set()
    gates["transformer.h.1"] = gates["transformer.h.1"][:2]
    assert changing_layers(model, gates) == {"transformer.h.1"}


def test_a_run_is_quiet():
    model = build("resnet")[0].train()
    before, numbers = {n: b.clone() for n, b in model.named_buffers()}, torch.random.get_rng_state()
    run_quietly(model, example_of(model))
    assert model.training and torch.equal(torch.random.get_rng_state(), numbers)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert "resnet" in IMAGE
