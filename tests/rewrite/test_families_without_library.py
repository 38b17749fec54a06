"""Checkpoints of every family of the table in a process without this library: equal to the bit, and nothing without trust."""

import pytest
import torch
from support.pruning_models import AUTO, FAMILIES, build, stir
from support.without_library import GREEDY, answers, save

from hf_rezero import grow_, rezero_
from hf_rezero.pruning import find_groups, prune_
from hf_rezero.structure.residual import residual_stacks


def pruned(name):
    """A model of transformers without the first heads and neurons of each layer."""
    model, batch = build(name, torch.float32)
    return without_first_units(model, ["heads", "neurons"]), batch


def gated_grown_and_pruned(name):
    """With residual weights and two more layers in each stack, then without the first heads, neurons and layer of each."""
    model, batch = build(name, torch.float32)
    rezero_(model)
    for stack, _ in list(residual_stacks(model)):
        grow_(model, 2, stack=stack)
    stir(model)
    return without_first_units(without_first_units(model, ["heads", "neurons"]), ["layers"]), batch


def without_first_units(model, targets):
    groups = find_groups(model, targets)
    prune_(model, groups, {group.name: torch.arange(1, group.num_units) for group in groups})
    return model


CASES = [(maker, name) for maker in (pruned, gated_grown_and_pruned) for name in FAMILIES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each case the model, its batch, and what the process makes of its folder."""
    made, folders = {}, []
    for maker, name in CASES:
        model, batch = made[maker, name] = maker(name)
        folders.append(tmp_path_factory.mktemp(f"{maker.__name__}_{name}"))
        save(model, folders[-1], AUTO[name], batch, [{}] if model.can_generate() else [])
    found = zip(CASES, answers(folders), strict=True)
    return {case: (*made[case], answer) for case, answer in found}


@pytest.mark.parametrize(("maker", "name"), CASES)
def test_logits_and_greedy_texts_are_equal(maker, name, results):
    model, batch, answer = results[maker, name]
    assert torch.equal(answer["logits"], model(**batch).logits) and answer["is_stock"]
    assert torch.equal(answer["logits_again"], answer["logits"])
    texts = [model.generate(**batch, **GREEDY)] if model.can_generate() else []
    assert all(torch.equal(mine, other) for mine, other in zip(texts, answer["texts"], strict=True))


@pytest.mark.parametrize(("maker", "name"), CASES)
def test_without_trust_it_is_refused(maker, name, results):
    answer = results[maker, name][2]
    assert "trust_remote_code=True" in answer["without_trust"]
    assert "load it through AutoModel" in answer["as_stock"] and answer["as_stock_in_half"] != "loaded"
