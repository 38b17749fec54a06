"""New layers in a trained model: nothing changes until they are trained."""

from pathlib import Path

import pytest
import torch
from support.pruning_models import STOCK, TEXT, build, rezero, stir
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rezero import LARS, Ranger, ReZero, byte_tokenizer, grow_, lookahead, param_groups
from hf_rezero.pruning import find_groups, prune_


SCRIPTS = Path(__file__).parents[2] / "scripts"
IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize(
    "config", [{}, {"resweight_sharing": "sublayer"}, {"norm_position": "pre"}, {"tie_word_embeddings": True}]
)
def test_a_grown_model_computes_what_it_did_to_the_bit(config, tmp_path):
    model = stir(rezero(**config))
    before = model(IDS).logits
    assert grow_(model, 3) == [1, 3, 5]
    assert torch.equal(model(IDS).logits, before) and model.config.num_hidden_layers == 7
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, before)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(IDS, **options), again.generate(IDS, use_cache=False, **options))


FAMILIES = [name for name in ("gpt2", "llama", *STOCK) if name not in ("bart", "opt_post_norm")]


@pytest.mark.parametrize("init", ["random", "copy"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_grows_and_comes_back(name, init, tmp_path):
    model, batch = build(name, torch.float32)
    before = model(**batch).logits
    stack = {"t5": "encoder.block", "t5_gated": "decoder.block", "whisper": "model.decoder.layers"}.get(name)
    assert grow_(model, after=[1, 2, 2], stack=stack, init=init) == [2, 4, 5]
    assert torch.equal(model(**batch).logits, before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, before)
    # transformers sizes the cache of T5 by its encoder, so that a decoder with more layers fails in any T5
    if name in TEXT and name not in ("modernbert", "t5_gated"):
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        ids = batch["input_ids"]
        assert torch.equal(again.generate(ids, **options), again.generate(ids, use_cache=False, **options))


def test_a_copied_layer_has_the_weights_of_its_neighbour_but_what_is_0():
    model, _ = build("qwen2")
    (index,) = grow_(model, after=[1], init="copy")
    new, neighbour = model.model.layers[index], model.model.layers[1]
    for name, tensor in new.state_dict().items():
        zero = name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
        assert not tensor.any() if zero else torch.equal(tensor, neighbour.state_dict()[name])
    gated = stir(rezero())
    (index,) = grow_(gated, after=[1], init="copy")
    new, neighbour = (gated.model.layers[i] for i in (index, 1))
    assert torch.equal(new.mlp.down_proj.weight, neighbour.mlp.down_proj.weight)
    assert not new.residuals["layer"].resweight.any() and neighbour.residuals["layer"].resweight.any()


def test_the_types_of_layers_follow_their_neighbours():
    model, _ = build("gemma2")
    before = list(model.config.layer_types)
    grow_(model, after=[0, 3])
    assert model.config.layer_types == [before[i] for i in (0, 0, 1, 2, 3, 3)] and len(set(before)) == 2


def test_new_layers_have_fresh_weights_and_learn():
    model = stir(rezero())
    (index,) = grow_(model, after=[1])
    new, neighbour = model.model.layers[index], model.model.layers[1]
    assert not torch.equal(new.mlp.up_proj.weight, neighbour.mlp.up_proj.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in new.parameters())


def test_new_layers_of_a_model_with_frozen_residual_weights_learn():
    model = stir(rezero(norm_position="pre", resweight_init=1, resweight_trainable=False))
    before = model(IDS).logits
    (index,) = grow_(model, after=[1])
    assert torch.equal(model(IDS).logits, before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.model.layers[index].parameters() if p.requires_grad)


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "ranger": lambda groups: Ranger(groups, lr=1e-2),
    "lars": lambda groups: LARS(groups, lr=1e-2),
    "lookahead": lambda groups: lookahead(torch.optim.AdamW(groups, lr=1e-2), k=2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_goes_on_with_the_old_layers(make):
    def train(grown):
        model = stir(rezero())
        optimizer = make(param_groups(model, weight_decay=0.1))
        for _ in range(3):
            step(model, optimizer)
        if grown:
            grow_(model, after=[3], optimizer=optimizer)
            for parameter in model.model.layers[4].parameters():
                parameter.requires_grad_(False)
        for _ in range(3):
            step(model, optimizer)
        return model, optimizer

    torch.manual_seed(0)
    plain, _ = train(False)
    torch.manual_seed(0)
    grown, optimizer = train(True)
    for old, new in zip(plain.model.layers, grown.model.layers, strict=False):
        torch.testing.assert_close(dict(new.named_parameters()), dict(old.named_parameters()), rtol=1e-5, atol=1e-6)
    grown.requires_grad_(True)
    step(grown, optimizer)
    held = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(held) == set(grown.parameters())
    new = grown.model.layers[4]
    assert held[new.mlp.up_proj.weight] == 0.1 and held[new.residuals["layer"].resweight] == 0.0
    assert new.residuals["layer"].resweight.abs() > 0


def step(model, optimizer):
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_pruned_model_grows_with_the_sizes_of_the_neighbours(tmp_path):
    model = stir(rezero())
    prune_(
        model,
        find_groups(model),
        {"model.layers.1.mlp": torch.arange(10), "model.layers.0.self_attn": torch.tensor([])},
    )
    before = model(IDS).logits
    grow_(model, after=[0, 1])
    assert torch.equal(model(IDS).logits, before)
    assert [layer.intermediate_size for layer in model.config.per_layer_config] == [128, 128, 10, 10, 128, 128]
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, before)


def test_a_sequential_of_wrappers_grows():
    model = nn.Sequential(*(ReZero(nn.Linear(4, 4)) for _ in range(2)))
    with torch.no_grad():
        model[0].resweight.fill_(0.5)
    x = torch.randn(3, 4)
    before = model(x)
    grow_(model, 2)
    assert len(model) == 4 and torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: grow_(m), "exactly one of"),
        (lambda m: grow_(m, 2, after=[1]), "exactly one of"),
        (lambda m: grow_(m, 0), "at least 1"),
        (lambda m: grow_(m, after=[4]), "from 0 to 3"),
        (lambda m: grow_(m, after=[]), "from 0 to 3"),
        (lambda m: grow_(m, 1, stack="encoder"), "expected one of model.layers"),
        (lambda m: grow_(m, 1, init="zeros"), "got init='zeros': expected 'random' or 'copy'"),
        (lambda m: grow_(build("bert")[0], 1), "BertLayer normalises the sum"),
        (lambda m: grow_(build("whisper")[0], 1), "expected one of model.encoder.layers, model.decoder.layers"),
        (lambda m: grow_(build("t5")[0], after=[0], stack="encoder.block"), r"expected layers .* \[1, 2, 3\]"),
        (lambda m: grow_(rezero(norm_position="post"), 1), "no rule finds layers"),
        (lambda m: grow_(rezero(skip_connection=False), 1), "no rule finds layers"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(rezero())


def test_the_script_grows_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import grow

    model = stir(rezero())
    model.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    assert grow.main([str(tmp_path / "small"), str(tmp_path / "deep"), "--num_layers", "2"]) == [1, 4]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "deep")
    assert torch.equal(again(IDS).logits, model(IDS).logits) and len(again.model.layers) == 6
    assert "new layers 1, 4" in capsys.readouterr().out and (tmp_path / "deep" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="is not empty"):
        grow.main([str(tmp_path / "small"), str(tmp_path / "deep"), "--num_layers", "2"])
