"""`rezero_` on every family of the table: the identity at 0, other values at other gates, trained, grown, pruned, and given back."""

import math

import pytest
import torch
from support.pruning_models import AUTO, FAMILIES, ids_or_picture, stir
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, ResNetConfig, ResNetForImageClassification

from hf_rezero import ReZeroTrainer, grow_, rezero_
from hf_rezero.pruning import find_groups, prune_
from hf_rezero.structure.residual import residual_stacks


def example(name):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    return ids_or_picture(name, ids, torch.randn(2, 3, 8, 8, generator=generator))


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


def results(model, batch):
    """The logits, and what an encoder gives to its decoder, which at 0 does not look at it."""
    outputs = model(**batch)
    return torch.cat([outputs[k].flatten() for k in ("logits", "encoder_last_hidden_state") if k in outputs])


@torch.no_grad()
def test_at_0_no_layer_adds_anything_and_at_other_values_all_do(name, model):
    original, batch = type(model), example(name)
    report = rezero_(model)
    assert isinstance(model, original)
    assert report.removed_norms and all(
        type(model.get_submodule(n)) is torch.nn.Identity for n in report.removed_norms
    )
    before = results(model, batch)
    for projection in report.gates:
        model.get_submodule(projection).weight.normal_()
    assert torch.equal(results(model, batch), before)
    for projection in report.gates:
        model.get_submodule(projection).resweight.fill_(0.1)
        assert not torch.equal(results(model, batch), before), projection
        model.get_submodule(projection).resweight.zero_()


def test_all_residual_weights_get_gradients(name, model):
    rezero_(model)
    stir(model)
    results(model, example(name)).square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n.endswith("resweight")}
    assert gradients and all(g is not None and g.abs() > 0 for g in gradients.values()), gradients


NUM_ANSWERS = 4


def lesson(name):
    """Examples, one for each answer: the place that answers sees the question, a token or a picture, through layers alone."""
    generator = torch.Generator().manual_seed(0)
    return [question(name, answer, generator) for answer in range(NUM_ANSWERS)]


def question(name, answer, generator):
    if name == "vit":
        return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(answer)}
    token = torch.tensor([answer + 5])
    if name == "whisper":
        return {"input_features": torch.randn(6, 14, generator=generator), "labels": token}
    rest, unasked = torch.full((3,), 3), torch.full((3,), -100)
    ids, labels = torch.cat([token, rest]), torch.cat([unasked, token])
    if AUTO[name] is AutoModelForSeq2SeqLM:
        return {"input_ids": ids, "labels": token}
    if AUTO[name] is AutoModelForMaskedLM:
        return {"input_ids": ids, "labels": labels}
    return {
        "input_ids": torch.cat([ids, token]),
        "labels": torch.cat([unasked[:1], labels]),
    }  # the label of a place is next


def test_it_learns_under_the_trainer_through_its_residual_weights(name, model, arguments):
    """Without layers all examples get one distribution, whose mean loss over the answers is at least the log of their number."""
    rezero_(model)
    examples = lesson(name)
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    least = math.log(NUM_ANSWERS)
    assert model(**batch).loss >= least
    ReZeroTrainer(model, arguments(max_steps=25, learning_rate=3e-2), train_dataset=examples).train()
    assert model.eval()(**batch).loss < 0.5 * least
    with torch.no_grad():
        for resweight in (p for n, p in model.named_parameters() if n.endswith("resweight")):
            resweight.zero_()
    assert model(**batch).loss >= least - 1e-5


@torch.no_grad()
def test_grown_and_pruned_it_comes_back(name, model, tmp_path):
    batch = example(name)
    rezero_(model)
    stir(model)
    before = model(**batch).logits
    for stack, _ in list(residual_stacks(model)):
        grow_(model, 1, stack=stack)
    assert torch.equal(model(**batch).logits, before)
    groups = find_groups(model, ["neurons"])
    prune_(model, groups, {group.name: torch.arange(1, group.num_units) for group in groups})
    expected = model(**batch).logits
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    again = AUTO[name].from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and torch.equal(again(**batch).logits, expected)


def test_branches_that_end_in_a_batch_norm_are_refused():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    with pytest.raises(ValueError, match="normalization is a BatchNorm2d: expected Linear or Conv1D"):
        rezero_(model)
    assert type(model) is ResNetForImageClassification
