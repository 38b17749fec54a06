"""Which units go: sizes, costs, selection at a sparsity, and the baselines that score without training."""

import copy

import pytest
import torch
from support.pruning_models import WITH_UNITS, build, gpt2, rezero, seed_net, stir
from torch import nn

from hf_rezero import ReZero
from hf_rezero.pruning import (
    Sizes,
    apoz,
    attach_masks,
    find_groups,
    first_k,
    magnitude,
    prune_,
    random,
    reinitialize_,
    select,
    taylor,
    unit_costs,
    weight_seconds,
    weight_uses,
)
from hf_rezero.pruning.activations import output_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.parametrize("name", ["rezero_gqa", "gpt2", "bert", "seed_net", "resnet"])
@pytest.mark.parametrize("sparsity", [0.2, 0.6])
def test_sizes_are_the_parameters_that_are_counted_after_removal(name, sparsity):
    model, batch = build(name)
    groups = find_groups(model) + (find_groups(model, ["layers"]) if name in ("rezero_gqa", "gpt2") else [])
    sizes = Sizes(model, groups)
    kept = select(model, groups, random(groups, torch.Generator().manual_seed(0)), sparsity, scope="global")
    report = prune_(model, groups, kept)
    removed = report.parameters_before - report.parameters_after
    assert removed / sizes.prunable == pytest.approx(report.sparsity)
    assert sparsity <= report.sparsity <= sparsity + 0.25
    output_of(model, batch)


def test_expected_sizes_are_the_mean_over_independent_units():
    model, groups = net(), find_groups(net())
    sizes = Sizes(model, groups)
    torch.manual_seed(1)
    open_ = {group.name: torch.rand(group.num_units) for group in groups}
    drawn = [sizes.left({name: torch.bernoulli(p) for name, p in open_.items()}) for _ in range(4000)]
    assert float(sizes.left(open_)) == pytest.approx(float(torch.stack(drawn).mean()), rel=0.02)


def test_groups_are_what_the_seed_masks():
    groups = find_groups(seed_net(8))
    assert [(g.name, g.kind, g.num_units) for g in groups if g.kind == "channels"] == [
        (name, "channels", 8) for name in ("0", "3", "6", "8")
    ]
    flattened = next(group for group in groups if group.name == "8")
    assert flattened.readers[0].tensor == "13.weight" and flattened.readers[0].size == 4


def test_residual_sums_are_left_alone():
    model, _ = build("resnet")
    ends = {group.name for group in find_groups(model, ["channels"])}
    assert ends and all(name.endswith("layer.0.convolution") for name in ends)


def test_layers_of_a_stack_of_wrappers_are_found_through_their_resweight():
    model = nn.Sequential(*(ReZero(nn.Linear(4, 4)) for _ in range(3)))
    (group,) = find_groups(model, ["layers"])
    assert group.parts == ("0", "1", "2") and group.gates == (("0.resweight",), ("1.resweight",), ("2.resweight",))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.resweight.fill_(0.1 + i)
    x = torch.randn(2, 4)
    expected = model[2](model[0](x))
    prune_(model, [group], {group.name: torch.tensor([0, 2])})
    torch.testing.assert_close(model(x), expected)


def test_costs_by_parameters_uses_and_seconds():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2))
    x = torch.randn(2, 3, 8, 8)
    groups = find_groups(model)
    per_channel = 3 * 9 + 1 + 64 * 2
    assert unit_costs(model, groups)["0"].tolist() == [per_channel] * 4
    uses = weight_uses(model, x)
    assert uses == {"0": 2 * 64, "3": 2}
    assert unit_costs(model, groups, uses)["0"].tolist() == [28 * 128 + 128 * 2] * 4
    seconds = weight_seconds(model, x, repeats=3)
    assert seconds.keys() == uses.keys() and all(0 < s < 1 for s in seconds.values())
    masks = attach_masks(model, groups, module_costs=uses)
    assert float(masks.weights.mean()) == pytest.approx(1)


def test_select_takes_the_lowest_scores_until_the_sparsity_is_reached():
    model, groups = net(), find_groups(net())
    scores = {"0": torch.arange(16).float(), "2": 100 + torch.arange(12).float()}
    kept = select(model, groups, scores, 0.4, scope="global")
    assert kept["2"].tolist() == list(range(12))
    assert kept["0"].tolist() == list(range(16 - len(kept["0"]), 16))
    one_more = kept | {"0": torch.arange(15 - len(kept["0"]), 16)}
    report = prune_(net(), groups, kept)
    assert report.sparsity >= 0.4 > prune_(net(), groups, one_more).sparsity


def test_select_by_group_takes_the_same_part_of_each():
    model, groups = net(), find_groups(net())
    scores = {"0": torch.arange(16).float(), "2": 100 + torch.arange(12).float()}
    kept = select(model, groups, scores, 0.5)
    assert len(kept["0"]) / 16 == pytest.approx(len(kept["2"]) / 12, abs=0.09)
    assert select(model, groups, scores, 0.5, round_to=4)["0"].shape[0] % 4 == 0
    assert len(select(model, groups, scores, 0.8, min_keep={"neurons": 4})["0"]) >= 4


def test_first_k_drops_the_first():
    groups = find_groups(net())
    assert select(net(), groups, first_k(groups), 0.5)["0"][0] > 0
    assert first_k(groups)["2"].tolist() == list(range(12))


def test_magnitude_is_the_product_of_the_norms():
    model = net()
    expected = model[0].weight.norm(dim=1) * model[2].weight.norm(dim=0)
    torch.testing.assert_close(magnitude(model, find_groups(model))["0"], expected.detach())


def test_magnitude_of_a_fused_projection_is_that_of_its_thirds():
    model = stir(gpt2())
    attention = model.transformer.h[0].attn
    q, k, v = attention.c_attn.weight.detach().split(32, dim=1)
    inside = sum(part.view(32, 4, 8).square().sum((0, 2)) for part in (q, k, v)).sqrt()
    outside = attention.c_proj.weight.detach().view(4, 8, 32).square().sum((1, 2)).sqrt()
    scores = magnitude(model, find_groups(model, ["heads"]))["transformer.h.0.attn"]
    torch.testing.assert_close(scores, inside * outside)


def test_apoz_counts_zeros():
    model, x = net(), torch.randn(40, 6)
    hidden = model[0](x).relu()
    scores = apoz(model, find_groups(model), [x[:20], x[20:]])
    torch.testing.assert_close(scores["0"], -(hidden == 0).float().mean(0))
    assert scores["2"].shape == (12,) and scores["2"].std() > 0


def test_taylor_is_the_derivative_by_a_factor_on_the_unit():
    model, x, y = net(), torch.randn(8, 6), torch.randn(8, 3)
    expected = []
    for rows in (slice(0, 4), slice(4, 8)):
        z = torch.ones(16, requires_grad=True)
        out = model[4](model[3](model[2](model[0](x[rows]).relu() * z)))
        expected.append(torch.autograd.grad((out - y[rows]).square().mean(), z)[0].abs())
    expected = sum(expected) / 2
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    scores = taylor(model.train(), find_groups(model), batches, lambda m, b: (m(b[0]) - b[1]).square().mean())
    torch.testing.assert_close(scores["0"], expected / expected.norm())
    assert model.training and model[0].weight.grad is None and not hasattr(model, "pruning_masks")


@pytest.mark.parametrize("name", WITH_UNITS)
def test_every_score_serves_every_family(name):
    model, batch = build(name)
    groups = find_groups(model)
    for scores in (
        random(groups),
        magnitude(model, groups),
        apoz(model, groups, [batch]),
        taylor(model, groups, [batch], lambda m, b: output_with_gradient(m, b).square().mean()),
    ):
        copied = copy.deepcopy(model)
        report = prune_(copied, groups, select(model, groups, scores, 0.4))
        assert report.sparsity >= 0.4 and output_of(copied, batch).isfinite().all()


def output_with_gradient(model, batch):
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("make", [rezero, gpt2, seed_net])
def test_small_from_scratch_has_the_shape_and_fresh_weights(make):
    model = stir(make())
    groups = find_groups(model)
    prune_(model, groups, select(model, groups, random(groups), 0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reinitialize_(model)
    for name, parameter in model.named_parameters():
        assert parameter.shape == before[name].shape
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g: select(m, g, first_k(g), 1.0), "at least 0 and below 1"),
        (lambda m, g: select(m, g, first_k(g), 0.99, min_keep=8), "at most"),
        (lambda m, g: select(m, g, first_k(g), 0.5, scope="all"), "'group' or 'global'"),
        (lambda m, g: select(m, g, {x.name: torch.ones(3) for x in g}, 0.5), "one for each of"),
        (lambda m, g: select(m, g, {x.name: torch.full((x.num_units,), torch.nan) for x in g}, 0.5), "finite values"),
        (lambda m, g: apoz(m, g, []), "no batches"),
        (lambda m, g: taylor(m, g, []), "no batches"),
        (lambda m, g: apoz(m, find_groups(stir(rezero()), ["layers"]), []), "have no activation"),
    ],
)
def test_bad_input_is_refused(call, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        call(model, find_groups(model))
