"""rezero_: what it does to models of transformers, against the equation, and what it refuses."""

import copy
import pickle

import pytest
import torch
from support.stock_models import DECODERS, STOCK, bert, gpt2, inputs, llama, qwen3, stir, vit, with_labels
from torch import nn
from transformers import LlamaForCausalLM, Trainer
from transformers.pytorch_utils import Conv1D

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, fold_resweight_, gradinit_, grow_, rezero_
from hf_rezero.pruning import attach_masks, find_groups, prune_, remove_pruned_
from hf_rezero.rewrite.modeling_rewritten import gate_
from hf_rezero.structure.architectures import ARCHITECTURES
from hf_rezero.structure.modules import is_linear, output_dim


def resweights(model):
    return [p for name, p in model.named_parameters() if name.endswith("resweight")]


def columns(module):
    return module.weight.shape[1 - output_dim(module)]


def layers_of(model):
    base = model.base_model
    return next(m for m in base.modules() if isinstance(m, nn.ModuleList))


def streams(model, batch):
    """What goes into each layer and comes out of it."""
    pairs = []

    def watch(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        pairs.append((before, output[0] if isinstance(output, tuple) else output))

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers_of(model)]
    model(**batch)
    for handle in handles:
        handle.remove()
    return pairs


@pytest.mark.parametrize("sharing", ["sublayer", "layer"])
@pytest.mark.parametrize("name", STOCK)
def test_at_residual_weights_of_0_each_layer_is_the_identity_to_the_bit(name, sharing):
    model = STOCK[name]()
    report = rezero_(model, resweight_sharing=sharing)
    assert len(resweights(model)) == len(set(report.gates.values())) == (6 if sharing == "sublayer" else 3)
    for mode in (True, False):
        pairs = streams(model.train(mode), inputs(name))
        assert len(pairs) == 3 and all(torch.equal(*pair) for pair in pairs)
    with torch.no_grad():
        for weight in resweights(model):
            weight.fill_(0.5)
    assert not any(torch.equal(*pair) for pair in streams(model, inputs(name)))


@pytest.mark.parametrize("name", STOCK)
def test_the_stream_and_its_branches_are_of_order_1(name):
    model = STOCK[name]()
    rezero_(model, resweight_init=1.0)
    before, after = streams(model.eval(), inputs(name))[0]
    assert 0.6 < before.std() < 1.5 and 0.1 < (after - before).std() < 1.5


@pytest.mark.parametrize("name", STOCK)
def test_inner_gradients_are_0_at_the_start_and_those_of_residual_weights_are_not(name):
    model = STOCK[name]()
    rezero_(model)
    model(**with_labels(name)).loss.backward()
    assert all(weight.grad.abs() > 0 for weight in resweights(model))
    inner = [p for n, p in layers_of(model).named_parameters() if not n.endswith("resweight")]
    assert inner and not any(p.grad.any() for p in inner)


@pytest.mark.parametrize("name", STOCK)
def test_it_learns(name, tmp_path):
    model = STOCK[name]()
    rezero_(model)
    batch = with_labels(name)
    before = model(**batch).loss.item()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * before and all(weight.any() for weight in resweights(model))


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("sharing", ["sublayer", "layer"])
def test_a_pretrained_model_computes_what_it_did_to_the_bit(name, sharing):
    model = stir(STOCK[name]())
    before = model(**inputs(name)).logits
    report = rezero_(model, pretrained=True, resweight_sharing=sharing)
    assert not report.removed_norms and all(weight == 1 for weight in resweights(model))
    assert torch.equal(model(**inputs(name)).logits, before)
    with torch.no_grad():
        assert torch.equal(model(**inputs(name)).logits, before)


def norms_of(model):
    return {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}


def test_norms_go_or_stay_by_choice():
    model = qwen3()
    final, qk = {"model.norm"}, {f"model.layers.{i}.self_attn.{p}_norm" for i in range(3) for p in "qk"}
    before = norms_of(model)
    rezero_(model)
    assert norms_of(model) == qk
    for choices, left in (
        ({"final_norm": "keep"}, final | qk),
        ({"qk_norm": "remove"}, set()),
        ({"norm": "keep"}, before),
    ):
        model = qwen3()
        rezero_(model, **choices)
        assert norms_of(model) == left
    model = bert()
    rezero_(model)
    assert norms_of(model) == {"cls.predictions.transform.LayerNorm"}
    model = llama()
    assert "input_layernorm" in str(norms_of(model.base_model))
    rezero_(model.base_model)
    assert norms_of(model.base_model) == set()


def test_the_class_is_still_one_of_transformers():
    model = llama()
    rezero_(model)
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "RewrittenLlamaForCausalLM"
    assert isinstance(model.config, LlamaForCausalLM.config_class)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 4), lambda: nn.Linear(5, 4, bias=False), lambda: Conv1D(4, 5)])
def test_a_gated_projection_is_w_times_the_projection_with_all_gradients(make):
    projection, x = make().double(), torch.randn(3, 2, 5, dtype=torch.double, requires_grad=True)
    plain = copy.deepcopy(projection)
    gate_(projection, 0.7)
    weight = projection.resweight.data = projection.resweight.data.double()
    projection(x).pow(2).sum().backward()
    mine = [x.grad.clone(), projection.resweight.grad, *(p.grad for p in projection.parameters() if p.ndim == 2)]
    x.grad, oracle = None, weight.clone().requires_grad_()
    (oracle * plain(x)).pow(2).sum().backward()
    theirs = [x.grad, oracle.grad, *(p.grad for p in plain.parameters() if p.ndim == 2)]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    if plain.bias is not None:
        torch.testing.assert_close(projection.bias.grad, plain.bias.grad)
    assert torch.equal(projection(x), projection.train()(x.detach())) and not torch.isnan(projection(x)).any()


def test_embeddings_have_the_deviations_of_the_table():
    model = gpt2()
    rezero_(model)
    tokens, positions = model.transformer.wte, model.transformer.wpe
    assert tokens.weight is model.lm_head.weight and tokens.embed_scale == 32**0.5
    assert abs(tokens.weight.std() * 32**0.5 - 1) < 0.1 and abs(positions.weight.std() - 0.5) < 0.05
    untied = llama()
    rezero_(untied)
    assert abs(untied.model.embed_tokens.weight.std() - 1) < 0.1 and untied.lm_head.weight.std() < 0.03
    fan_in = untied.model.layers[0].mlp.down_proj.weight.std() * 40**0.5
    assert abs(fan_in - 1) < 0.15
    kept = llama()
    before = kept.lm_head.weight.clone(), kept.model.layers[0].mlp.up_proj.weight.clone()
    rezero_(kept, init="keep")
    assert torch.equal(kept.lm_head.weight, before[0])
    assert torch.equal(kept.model.layers[0].mlp.up_proj.weight, before[1])


def test_deep_copies_and_pickles_are_whole():
    model = llama()
    rezero_(model, resweight_sharing="layer")
    stir(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(**inputs("llama")).logits, model(**inputs("llama")).logits)
        with torch.no_grad():
            resweights(other)[0].fill_(0)
        assert not torch.equal(other(**inputs("llama")).logits, model(**inputs("llama")).logits)


# what is done to the result


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_gradient_checkpointing_and_compile_do_not_change_the_loss(name):
    model = STOCK[name]()
    rezero_(model, resweight_sharing="layer")
    stir(model).train()
    batch = with_labels(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = model(**batch).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, loss)


@pytest.mark.parametrize("name", STOCK)
def test_gradinit_leaves_the_residual_weights(name):
    model = STOCK[name]()
    rezero_(model, resweight_init=0.5)
    before = [w.clone() for w in resweights(model)]
    report = gradinit_(model, [with_labels(name)] * 2, num_steps=2, eta=0.1, gamma=1e3)
    assert report.scales and all(torch.equal(a, b) for a, b in zip(before, resweights(model), strict=True))


@pytest.mark.parametrize("name", STOCK)
def test_it_grows(name):
    model = STOCK[name]()
    rezero_(model)
    stir(model)
    before = model(**inputs(name)).logits
    new = grow_(model, 2)
    assert torch.equal(model(**inputs(name)).logits, before) and len(layers_of(model)) == 5
    layer = layers_of(model)[new[0]]
    assert all(not w.any() for w in resweights(layer)) and len(resweights(layer)) == 2
    assert abs(max(m.weight.std() * columns(m) ** 0.5 for m in layer.modules() if is_linear(m)) - 1) < 0.4
    model(**with_labels(name)).loss.backward()
    assert all(w.grad.any() for w in resweights(layer))


@pytest.mark.parametrize("name", STOCK)
def test_layers_are_pruned_by_their_residual_weight(name):
    model = STOCK[name]()
    rezero_(model)
    stir(model)
    with torch.no_grad():
        for weight in resweights(layers_of(model)[1]):
            weight.zero_()
    before = model(**inputs(name)).logits
    (group,) = find_groups(model, ["layers"])
    prune_(model, [group], {group.name: torch.tensor([0, 2])})
    assert torch.equal(model(**inputs(name)).logits, before) and len(resweights(model)) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_heads_and_neurons_are_pruned_through_masks(name):
    model = STOCK[name]()
    rezero_(model)
    stir(model)
    groups = find_groups(model, ["heads", "neurons"])
    masks = attach_masks(model, groups)
    with torch.no_grad():
        for values in masks.split(masks.layer.mask).values():
            values[0] = 0.0
    masked = model(**inputs(name)).logits
    remove_pruned_(model, masks)
    torch.testing.assert_close(model(**inputs(name)).logits, masked, atol=1e-5, rtol=1e-4)
    assert len(resweights(model)) == 6


@pytest.mark.parametrize("name", DECODERS)
def test_folding_gives_the_same_function_and_the_class_of_transformers_back(name):
    model = STOCK[name]()
    stock = type(model)
    rezero_(model, norm="keep", resweight_init=0.3, init="keep")
    stir(model)
    before = model(**inputs(name)).logits
    fold_resweight_(model)
    torch.testing.assert_close(model(**inputs(name)).logits, before)
    assert type(model) is stock and not hasattr(model.config, "rewritten") and not resweights(model)


def test_lora_is_trained_and_merged():
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = llama()
    rezero_(model, resweight_init=0.5)
    before = stir(model)(**inputs("llama")).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    assert torch.equal(adapted(**inputs("llama")).logits, before)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(**with_labels("llama")).loss.backward()
        optimizer.step()
    after = adapted(**inputs("llama")).logits
    assert not torch.allclose(after, before)
    fold_resweight_(adapted.base_model.model)
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs("llama")).logits, after, rtol=1e-4, atol=1e-5)


# what is refused


def unchanged(model, **arguments):
    """The message with which `rezero_` refuses a model, which is as it was."""
    before, kind = {n: p.clone() for n, p in model.named_parameters()}, type(model)
    modules = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError) as error:
        rezero_(model, **arguments)
    assert type(model) is kind and [(n, type(m)) for n, m in model.named_modules()] == modules
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and len(before) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return str(error.value)


def test_gates_asked_twice():
    model = llama()
    rezero_(model)
    assert "model.layers.0.self_attn.o_proj.resweight is there already" in unchanged(model)


def test_models_of_others():
    assert "Sequential is no model of transformers" in unchanged(nn.Sequential(nn.Linear(2, 2)))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert "ReZeroForCausalLM is no model of transformers" in unchanged(ReZeroForCausalLM(ReZeroConfig(**shape)))


def test_layers_without_a_row(monkeypatch):
    for name in list(ARCHITECTURES):
        monkeypatch.delitem(ARCHITECTURES, name)
    assert "no row of the table describes the layers of LlamaForCausalLM" in unchanged(llama())


def test_a_row_that_the_small_run_disproves():
    model = llama()
    layer = layers_of(model)[1]
    layer.forward = lambda hidden_states, **kwargs: type(layer).forward(layer, hidden_states, **kwargs) + 1
    assert "model.layers.1 (LlamaDecoderLayer) changes its input" in unchanged(model)


def test_a_norm_that_no_row_names():
    model = vit()
    layers_of(model)[2].extra = nn.LayerNorm(32)
    assert "vit.layers.2.extra is a norm that the row of its layer does not name" in unchanged(model)


def test_tied_and_wrapped_projections():
    model = llama()
    layers_of(model)[1].mlp.down_proj.weight = layers_of(model)[0].mlp.down_proj.weight
    assert "model.layers.0.mlp.down_proj.weight and model.layers.1.mlp.down_proj.weight are one tensor" in unchanged(
        model
    )

    class Wrapped(nn.Linear):
        pass

    model = llama()
    layers_of(model)[2].mlp.down_proj = Wrapped(40, 32)
    assert "model.layers.2.mlp.down_proj is a Wrapped: expected Linear or Conv1D" in unchanged(model)


def test_quantised_weights():
    model = llama()
    weight = layers_of(model)[0].mlp.up_proj
    weight.weight = nn.Parameter(torch.zeros(40, 32, dtype=torch.int8), requires_grad=False)
    assert "model.layers.0.mlp.up_proj.weight is a Tensor of torch.int8" in unchanged(model)


def test_weights_that_may_be_worth_keeping(tmp_path):
    llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert "say pretrained=True" in unchanged(model)
    rezero_(model, pretrained=False)


def test_unknown_choices():
    assert "got norm='drop': expected 'remove' or 'keep'" in unchanged(llama(), norm="drop")


def test_the_trainer_of_transformers_trains_and_saves_it(tmp_path, arguments):
    model = llama()
    rezero_(model)
    rows = [{"input_ids": row, "labels": row} for row in with_labels("llama")["input_ids"]] * 8
    trainer = Trainer(model, arguments(save_strategy="steps", save_steps=4, max_steps=4), train_dataset=rows)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-4"
    assert (folder / "modeling_rewritten.py").exists() and (folder / "model.safetensors").exists()
