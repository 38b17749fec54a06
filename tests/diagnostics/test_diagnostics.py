"""Jacobian spectra, gradients by depth, and their pictures, against what is known in closed form."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_rezero import ReZero, ReZeroForCausalLM, ReZeroModel, RZTXEncoderLayer
from hf_rezero.diagnostics.gradients import gradient_profile
from hf_rezero.diagnostics.jacobian import jacobian_bounds, jacobian_moments, jacobian_spectrum
from hf_rezero.diagnostics.resweights import resweight_profile
from hf_rezero.plots import plot_gradients, plot_jacobian


def linear_map(m, n, values):
    """A linear layer with these singular values."""
    u, _ = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    layer = nn.Linear(n, m).double()
    k = len(values)
    layer.weight.data = u[:, :k] @ torch.diag(values) @ v[:, :k].T
    return layer


def encoder(kind, layers):
    """The recipe of the paper's figure 5: width 16, 4 heads, feed-forward width 64, Xavier-uniform weights."""
    if kind == "rezero":
        stack = nn.Sequential(*(RZTXEncoderLayer(16, 4, 64, 0.0, batch_first=True) for _ in range(layers)))
    else:
        options = {"norm_first": kind == "pre", "batch_first": True}
        stack = nn.Sequential(*(nn.TransformerEncoderLayer(16, 4, 64, 0.0, **options) for _ in range(layers)))
    for name, p in stack.named_parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
        if name.endswith("resweight"):
            nn.init.constant_(p, 0.1)
    return stack


def small_gpt2(**values):
    shape = {"vocab_size": 64, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**{**shape, "bos_token_id": 0, "eos_token_id": 0, **values}))


def small_bert(model_class=BertModel):
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return model_class(BertConfig(vocab_size=64, max_position_embeddings=16, **shape))


@pytest.mark.parametrize(("m", "n"), [(6, 6), (4, 9), (9, 4)])
def test_linear_maps_have_their_singular_values_at_every_input(m, n):
    values = torch.logspace(1, -6, min(m, n), dtype=torch.float64)
    layer = linear_map(m, n, values)
    sigma = jacobian_spectrum(layer, torch.randn(3, n), chunk_size=4)
    torch.testing.assert_close(sigma, values.expand(3, -1), rtol=1e-9, atol=1e-14)
    bounds = jacobian_bounds(layer, torch.randn(2, n), num_steps=50)
    torch.testing.assert_close(bounds.largest, values[0].expand(2))
    torch.testing.assert_close(bounds.smallest, values[-1].expand(2), rtol=1e-8, atol=1e-14)
    assert max(bounds.largest_residual.max(), bounds.smallest_residual.max()) == 0


def test_spectrum_of_nonlinear_models_is_that_of_the_jacobian_of_autograd_and_of_differences(make_config):
    model = ReZeroModel(make_config(hidden_size=8, num_attention_heads=2))
    embeds = torch.randn(2, 4, 8)
    sigma = jacobian_spectrum(model, {"inputs_embeds": embeds})
    oracle = copy.deepcopy(model).double().eval()
    step = 1e-6 * torch.eye(32, dtype=torch.float64).view(32, 4, 8)
    for x, found in zip(embeds.double(), sigma, strict=True):

        def forward(e):
            return oracle(inputs_embeds=e).last_hidden_state

        full = torch.autograd.functional.jacobian(forward, x[None]).view(32, 32)
        torch.testing.assert_close(found, torch.linalg.svdvals(full), rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            differences = ((forward(x + step) - forward(x - step)) / 2e-6).view(32, 32)
        torch.testing.assert_close(found, torch.linalg.svdvals(differences), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [small_gpt2, small_bert], ids=["gpt2", "bert"])
def test_stock_models_go_from_the_embeddings_to_the_last_hidden_state(make):
    model = make()
    ids = torch.randint(0, 64, (2, 4))
    sigma = jacobian_spectrum(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    oracle = copy.deepcopy(model).base_model.double().eval()
    embeds = model.get_input_embeddings()(ids).detach().double()
    for x, found in zip(embeds, sigma, strict=True):
        full = torch.autograd.functional.jacobian(lambda e: oracle(inputs_embeds=e).last_hidden_state, x[None])
        torch.testing.assert_close(found, torch.linalg.svdvals(full.view(32, 32)), rtol=1e-8, atol=1e-12)


def test_what_goes_with_an_example_stays_with_it():
    model, ids = small_bert(), torch.randint(0, 64, (1, 4)).expand(2, -1)
    nn.init.normal_(model.embeddings.token_type_embeddings.weight)
    types = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]])
    both = jacobian_spectrum(model, {"input_ids": ids, "token_type_ids": types})
    for i in range(2):
        alone = jacobian_spectrum(model, {"input_ids": ids[i : i + 1], "token_type_ids": types[i : i + 1]})
        torch.testing.assert_close(both[i : i + 1], alone)
    assert not torch.allclose(both[0], both[1])


def test_images_go_to_the_logits():
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **shape))
    pixels = torch.randn(2, 3, 8, 8)
    sigma = jacobian_spectrum(model, {"pixel_values": pixels})
    oracle = copy.deepcopy(model).double().eval()
    full = torch.autograd.functional.jacobian(lambda e: oracle(e).logits, pixels[:1].double())
    assert sigma.shape == (2, 5)
    torch.testing.assert_close(sigma[0], torch.linalg.svdvals(full.view(5, 192)))


@pytest.mark.parametrize("layers", [1, 64])
def test_rezero_starts_with_all_singular_values_exactly_one(make_config, layers):
    model = ReZeroForCausalLM(make_config(num_hidden_layers=layers, resweight_init=0.0))
    sigma = jacobian_spectrum(model, {"input_ids": torch.randint(0, 256, (1, 5))})
    assert torch.equal(sigma, torch.ones(1, 160, dtype=torch.float64))


def test_published_spectra_at_initialisation():
    means, x = {}, torch.randn(20, 1, 4, 16)
    for kind in ("post", "pre", "rezero"):
        squares = [jacobian_spectrum(encoder(kind, 12), e).square().mean().item() for e in x]
        means[kind] = sorted(squares)
    # the official code printed .810, 10.242 and 1.059; the first two have heavy tails
    assert 0.1 < means["post"][10] < 1.5 and 5 < means["pre"][10] < 14
    assert sum(means["rezero"]) / 20 == pytest.approx(1.059, abs=0.02)
    deep = jacobian_spectrum(encoder("post", 64), x[0])
    assert deep.min() < 1e-10 and deep.median() < 1e-4 * deep.max()
    deep = jacobian_spectrum(encoder("rezero", 64), x[0])
    assert 0.2 < deep.min() < deep.max() < 5


def test_each_layer_norm_takes_away_two_directions_of_each_token():
    sigma = jacobian_spectrum(encoder("post", 1), torch.randn(1, 4, 16))
    assert (sigma < 1e-4 * sigma.max()).sum() == 8  # the mean, and nearly the length: eps is not 0
    assert (sigma < 1e-14).sum() >= 4


def test_moments_agree_with_the_spectrum_within_their_error(make_config):
    model = ReZeroModel(make_config(hidden_size=8, num_attention_heads=2))
    batch = {"inputs_embeds": torch.randn(3, 4, 8)}
    exact = jacobian_spectrum(model, batch).square().mean(1)
    moments = jacobian_moments(model, batch, num_samples=400)
    assert ((moments.mean_square - exact).abs() < 4 * moments.standard_error).all()
    assert (moments.standard_error < 0.1 * exact).all()
    few = jacobian_moments(model, batch, num_samples=100, chunk_size=1)
    assert 1.5 < (few.standard_error / moments.standard_error).mean() < 2.6  # falls as 1 / sqrt(samples)


@pytest.mark.parametrize("num_steps", [1, 4, 12, 31, 32])
def test_bounds_hold_at_every_step(make_config, num_steps):
    model = ReZeroModel(make_config(hidden_size=8, num_attention_heads=2))
    batch = {"inputs_embeds": torch.randn(2, 4, 8)}
    sigma = jacobian_spectrum(model, batch)
    bounds = jacobian_bounds(model, batch, num_steps=num_steps)
    assert (bounds.largest <= sigma[:, 0] + 1e-12).all() and (bounds.smallest >= sigma[:, -1] - 1e-12).all()
    for value, residual in (bounds[:2], bounds[2:]):
        nearest = (sigma - value[:, None]).abs().amin(1)
        assert (nearest <= residual + 1e-12).all()
    if num_steps >= 12:
        torch.testing.assert_close(bounds.largest, sigma[:, 0], rtol=1e-4, atol=0)
    if num_steps == 32:
        torch.testing.assert_close(bounds.smallest, sigma[:, -1])


def test_the_residual_after_one_step_is_that_of_the_equation():
    a, b = 3.0, 1.0
    bounds = jacobian_bounds(lambda x: x * torch.tensor([a, b]), torch.randn(1, 2), num_steps=1)
    theta = bounds.largest.item()
    c = (theta**2 - b**2) / (a**2 - b**2)  # v = (sqrt(c), sqrt(1 - c)) gives |A v| = theta
    residual = math.sqrt((a**4 * c + b**4 * (1 - c)) / theta**2 - theta**2)  # |A^T u - theta v| with u = A v / theta
    assert (
        b < theta < a and bounds.largest_residual.item() == pytest.approx(residual) == bounds.smallest_residual.item()
    )


def test_bounds_of_maps_with_few_distinct_singular_values_stop_early():
    calls = []

    def double(x):
        x.register_hook(calls.append)
        return torch.cat((2 * x[:, :3], 0 * x[:, 3:]), dim=1)

    bounds = jacobian_bounds(double, torch.randn(1, 6))
    assert (bounds.largest.item(), bounds.smallest.item()) == pytest.approx((2.0, 0.0))
    assert bounds.largest_residual.item() == bounds.smallest_residual.item() == 0 and len(calls) < 6
    assert [value.item() for value in jacobian_bounds(lambda x: 0 * x, torch.randn(1, 6))] == [0, 0, 0, 0]


def state_of(model):
    tensors = {name: (t.dtype, t.clone()) for name, t in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tensors, grads, [m.training for m in model.modules()], torch.get_rng_state()


def same(a, b):
    return (
        all(a[0][k][0] == b[0][k][0] and torch.equal(a[0][k][1], b[0][k][1]) for k in a[0] | b[0])
        and all(torch.equal(a[1][k], b[1][k]) for k in a[1] | b[1])
        and a[2] == b[2]
        and torch.equal(a[3], b[3])
    )


def test_the_model_and_the_random_state_come_back_as_they_were():
    model = small_gpt2().bfloat16().train()
    model.transformer.h[1].eval()
    ids = torch.randint(0, 64, (2, 4))
    batch = {"input_ids": ids, "labels": ids}
    model(**batch).loss.backward()
    before = state_of(model)
    assert before[1]
    jacobian_spectrum(model, batch)
    jacobian_moments(model, batch, num_samples=4)
    jacobian_bounds(model, batch, num_steps=3)
    gradient_profile(model, [batch, batch])
    with pytest.raises(ValueError, match="padding"):
        jacobian_spectrum(model, batch | {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])})
    assert same(before, state_of(model))


def test_running_statistics_of_batch_norm_come_back_after_the_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = state_of(model)
    gradient_profile(model, [torch.randn(8, 4)], loss_fn=lambda m, x: m(x).square().mean())
    seen = state_of(model)
    assert torch.equal(before[0]["1.running_mean"][1], seen[0]["1.running_mean"][1]) and before[2] == seen[2]
    assert seen[0]["1.num_batches_tracked"][1] == 0


def test_dropout_is_off():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    expected = torch.linalg.svdvals(net[0].weight.double()).detach()
    torch.testing.assert_close(jacobian_spectrum(net, torch.randn(1, 4))[0], expected)


def test_what_has_no_spectrum_is_refused():
    x = torch.randn(3, 4)
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1 is a BatchNorm1d in training mode.*eval\(\)"):
        jacobian_spectrum(norm, x)
    assert jacobian_spectrum(norm.eval(), x).shape == (3, 4)
    with pytest.raises(ValueError, match="example 0 depends on the others"):
        jacobian_spectrum(lambda x: x - x.mean(0), x)
    with pytest.raises(ValueError, match="does not depend on the inputs"):
        jacobian_spectrum(lambda x: torch.ones_like(x), x)
    with pytest.raises(ValueError, match="not finite"):
        jacobian_spectrum(lambda x: 1e200 * x**3 * 1e200, x)
    with pytest.raises(ValueError, match="one row for each"):
        jacobian_spectrum(lambda x: x.sum(), x)
    with pytest.raises(TypeError, match="must be float64"):
        jacobian_spectrum(lambda x: x.float(), x)
    with pytest.raises(TypeError, match="input_ids"):
        jacobian_spectrum(nn.Linear(4, 4), torch.arange(4)[None])
    with pytest.raises(TypeError, match="BaseModelOutput"):
        small_gpt2_hidden = small_gpt2().transformer
        jacobian_spectrum(lambda x: small_gpt2_hidden.double()(inputs_embeds=x), torch.randn(1, 2, 8))
    with pytest.raises(ValueError, match="expected input_ids, inputs_embeds or pixel_values"):
        jacobian_spectrum(small_gpt2(), {"labels": torch.arange(4)[None]})
    with pytest.raises(ValueError, match="no example"):
        jacobian_spectrum(lambda x: x, torch.zeros(0, 4))
    for call in (
        lambda: jacobian_spectrum(lambda x: x, x, chunk_size=0),
        lambda: jacobian_moments(lambda x: x, x, num_samples=1),
        lambda: jacobian_bounds(lambda x: x, x, num_steps=0),
    ):
        with pytest.raises(ValueError, match="expected at least"):
            call()


def test_batch_norm_in_eval_mode_uses_its_running_statistics():
    shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    model = ResNetForImageClassification(ResNetConfig(**shape)).eval()
    with pytest.raises(ValueError, match="BatchNorm2d in training mode"):
        jacobian_spectrum(copy.deepcopy(model).train(), {"pixel_values": torch.randn(2, 3, 32, 32)})
    sigma = jacobian_spectrum(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert sigma.shape == (2, 3) and (sigma > 0).all()


def test_gradients_are_those_of_backward():
    model = small_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.randint(0, 64, (4, 8))
    profile = gradient_profile(model, {"input_ids": ids, "labels": ids})
    model(input_ids=ids, labels=ids).loss.backward()
    norms = {
        name: math.sqrt(sum(p.grad.square().sum().item() for p in model.get_submodule(name).parameters()))
        for name in ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.2", "transformer.ln_f")
    }
    assert list(profile) == [*norms][:2] + [f"transformer.h.{i}" for i in range(3)] + ["transformer.ln_f"]
    assert {name: profile[name].norm for name in norms} == pytest.approx(norms, rel=1e-5)
    assert all(math.isnan(found.relative_variance) for found in profile.values())


def test_variance_is_that_between_the_batches():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    batches = list(torch.randn(5, 8, 3))

    def loss(model, x):
        return model(x).square().mean()

    grads = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, x), list(model[0].parameters()))])
            for x in batches
        ]
    )
    found = gradient_profile(model, batches, loss_fn=loss)["0"]
    assert found.norm == pytest.approx(grads.mean(0).norm().item(), rel=1e-5)
    expected = (grads - grads.mean(0)).square().sum() / 4 / grads.mean(0).square().sum()
    assert found.relative_variance == pytest.approx(expected.item(), rel=1e-4)


def test_blocks_are_found_wherever_they_are(make_config):
    def names(model, **batch):
        return list(gradient_profile(model, batch))

    ids = torch.randint(0, 64, (2, 8))
    bert = names(small_bert(BertForMaskedLM), input_ids=ids, labels=ids)
    assert bert == ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "cls"]
    shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 1], "layer_type": "basic", "num_labels": 3}
    resnet = ResNetForImageClassification(ResNetConfig(**shape))
    blocks = [f"resnet.encoder.stages.{i}.layers.{j}" for i, j in ((0, 0), (0, 1), (1, 0))]
    pixels = torch.randn(2, 3, 32, 32)
    assert names(resnet, pixel_values=pixels, labels=torch.tensor([0, 2])) == [
        "resnet.embedder",
        *blocks,
        "classifier",
    ]
    # stages of blocks, as nested lists
    nested = nn.ModuleDict({"stem": nn.Linear(4, 4), "stages": nn.ModuleList()})
    nested["stages"].extend(nn.ModuleList((nn.Linear(4, 4), ReZero(nn.Linear(4, 4)))) for _ in range(2))

    def run(model, x):
        x = model["stem"](x)
        for stage in model["stages"]:
            for block in stage:
                x = block(x)
        return x.square().mean()

    profile = gradient_profile(nested, torch.randn(2, 4), loss_fn=run)
    assert list(profile) == ["stem", "stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    # a plain net, whose layers are the blocks
    vgg = nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))})
    vgg["classifier"] = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    profile = gradient_profile(
        vgg, torch.randn(2, 1, 8, 8), loss_fn=lambda m, x: m["classifier"](m["features"](x)).mean()
    )
    assert list(profile) == ["features.0", "features.1", "features.2", "classifier.1"]
    assert list(gradient_profile(nn.Linear(4, 1), torch.randn(2, 4), loss_fn=lambda m, x: m(x).mean())) == [
        "weight",
        "bias",
    ]


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero():
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1), "frozen": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    profile = gradient_profile(model, torch.randn(2, 3), loss_fn=lambda m, x: m["used"](m["frozen"](x)).mean())
    assert list(profile) == ["used", "unused"]
    assert profile["used"].norm > 0 == profile["unused"].norm


def test_what_has_no_gradient_is_refused():
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="a batch of type Tensor has no loss by itself"):
        gradient_profile(model, torch.randn(2, 3))
    with pytest.raises(ValueError, match="scalar tensor"):
        gradient_profile(model, torch.randn(2, 3), loss_fn=lambda m, x: m(x))
    with pytest.raises(ValueError, match="0 batches"):
        gradient_profile(model, [])
    with pytest.raises(ValueError, match="0 groups"):
        gradient_profile(model.requires_grad_(False), torch.randn(2, 3))


def test_resweights_come_in_the_order_of_depth(make_config):
    model = ReZeroForCausalLM(make_config(num_hidden_layers=2, resweight_init=0.5))
    assert resweight_profile(model) == {f"model.layers.{i}.residuals.layer.resweight": 0.5 for i in range(2)}


def test_the_picture_of_a_spectrum_shows_every_singular_value():
    values = [0.0, 1e-30, 1e-3, 1.0, 1.0, 2.0, 5e3, 1.0]
    figure = plot_jacobian({"one layer": {"a": values}, "two": {"a": values[2:], "b": [1.0] * 4}})
    first, second = figure.axes
    heights, edges = first.patches[1].get_data()[:2]
    assert sum(heights) == pytest.approx(1) and heights[0] == pytest.approx(2 / 8)
    assert first.get_ylim()[0] < 1 / 8 and edges[0] < -18 and edges[-1] > math.log10(5e3)
    (spike,) = [i for i, share in enumerate(second.patches[3].get_data().values) if share]
    assert (edges[spike] + edges[spike + 1]) / 2 == pytest.approx(0, abs=1e-9)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [axes.get_title() for axes in figure.axes] == ["one layer", "two"]


@pytest.mark.parametrize("values", [[1.0], [0.5, 3.0], [1e-300, 1e300], [0.0], [1e-18, 9.999e-19]])
def test_every_singular_value_has_its_bar(values):
    heights, edges = plot_jacobian({"": {"a": values}}).axes[0].patches[0].get_data()[:2]
    assert sum(heights) == pytest.approx(1) and len(heights) <= 50
    for value in values:
        log = math.log10(max(value, 1e-18))
        assert heights[[a <= log <= b for a, b in zip(edges, edges[1:], strict=False)].index(True)] > 0


def test_the_picture_of_the_gradients_shows_zeros_too():
    profiles = {"ReZero": {"layers.0": 0.0, "layers.1": 1e-3}, "post": {"layers.0": 1e-9, "layers.1": 1.0}}
    (axes,) = plot_gradients(profiles).axes
    zero, line = axes.lines[1], axes.lines[0]
    assert math.isnan(line.get_ydata()[0]) and list(zero.get_xdata()) == [0]
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] < zero.get_ydata()[0] < 1e-9


def test_pictures_are_written(tmp_path):
    plot_jacobian({"": {"a": [1.0, 1.0, 1.0]}}, tmp_path / "a.png")
    plot_gradients({"model.layers.0": 1.0, "lm_head": 0.5}, tmp_path / "b.png")
    assert min((tmp_path / name).stat().st_size for name in ("a.png", "b.png")) > 3000
    assert not list(tmp_path.glob("*.tmp"))


def test_a_spectrum_and_a_profile_draw_themselves_and_are_what_they_were(tmp_path):
    sigma = jacobian_spectrum(torch.nn.Linear(3, 2), torch.randn(4, 3))
    assert isinstance(sigma, torch.Tensor) and sigma.shape == (4, 2)
    assert type(2 * sigma) is torch.Tensor and type(sigma[0]) is torch.Tensor
    torch.save(sigma, tmp_path / "sigma.pt")
    assert torch.load(tmp_path / "sigma.pt").equal(sigma + 0)
    heights = sigma.plot(tmp_path / "spectrum.png").axes[0].patches[0].get_data().values
    assert sum(heights) == pytest.approx(1) and (tmp_path / "spectrum.png").exists()
    assert f"<td>3</td><td>{sigma[3].max():.4g}</td>" in sigma._repr_html_()
    profile = gradient_profile(
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)),
        torch.randn(2, 3),
        loss_fn=lambda m, x: m(x).mean(),
    )
    assert profile.plot().axes[0].lines[0].get_ydata() == pytest.approx([g.norm for g in profile.values()])
    assert (
        isinstance(profile, dict)
        and f"<td>1</td><td>{profile['1'].norm:.3g}</td><td>nan</td>" in profile._repr_html_()
    )
