"""Checkpoints of rewritten models: AutoModel gives them back, with this library and without it, and nothing else does."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from support.pruning_models import build
from support.stock_models import DECODERS, STOCK, inputs, stir
from support.without_library import GREEDY, answers, save
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    pipeline,
)

from hf_rezero import byte_tokenizer, fold_resweight_, grow_, rezero_
from hf_rezero.pruning import find_groups, load_pruned, prune_, save_pruned
from hf_rezero.rewrite.modeling_rewritten import FORMAT, HOW_TO_LOAD


AUTO = {"vit": AutoModelForImageClassification, "bert": AutoModelForMaskedLM}

MODES = ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"})


def rezero(name, **options):
    model = STOCK[name]()
    rezero_(model, **options)
    return stir(model)


def without_middle_units(name):
    """A stock model without some heads and neurons of its middle layer."""
    model = stir(STOCK[name]())
    groups = [g for g in find_groups(model, ["neurons"] if name == "vit" else ["heads", "neurons"]) if ".1." in g.name]
    prune_(model, groups, {g.name: torch.arange(1, g.num_units) for g in groups})
    return model


CASES = {
    **{f"rezero-{name}": (name, lambda name=name: rezero(name)) for name in STOCK},
    **{f"pruned-{name}": (name, lambda name=name: without_middle_units(name)) for name in STOCK if name != "vit"},
    "shared": ("llama", lambda: rezero("llama", resweight_sharing="layer", final_norm="remove")),
    "qk": ("qwen3", lambda: rezero("qwen3", qk_norm="remove")),
    "kept": ("gpt2", lambda: rezero("gpt2", norm="keep", init="keep")),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each case the model, its folder, and what a process without this library makes of it."""
    torch.manual_seed(0)
    models, folders = {}, {}
    for case, (name, make) in CASES.items():
        models[case], folders[case] = make(), tmp_path_factory.mktemp(case)
        modes = MODES if name in DECODERS else ()
        save(models[case], folders[case], AUTO.get(name, AutoModelForCausalLM), inputs(name), modes)
    found = zip(CASES, answers(folders.values()), strict=True)
    return {case: (models[case], folders[case], answer) for case, answer in found}


@pytest.mark.parametrize("case", CASES)
def test_without_this_library_the_logits_are_equal_to_the_bit(case, results):
    model, _, answer = results[case]
    batch = inputs(CASES[case][0])
    assert torch.equal(answer["logits"], model(**batch).logits) and answer["is_stock"]
    assert torch.equal(answer["logits_again"], answer["logits"])
    if CASES[case][0] in DECODERS:
        cached, uncached, beams, static = answer["texts"]
        expected = model.generate(**batch, **GREEDY)
        assert torch.equal(cached, expected) and torch.equal(uncached, expected) and torch.equal(static, expected)
        assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=2))


@pytest.mark.parametrize("case", CASES)
def test_without_trust_it_is_refused_and_never_becomes_its_stock_class(case, results):
    answer = results[case][2]
    assert "trust_remote_code=True" in answer["without_trust"]
    assert "this model was rewritten with hf_rezero: load it through AutoModel" in answer["as_stock"]
    assert answer["as_stock_in_half"] != "loaded"


@pytest.mark.parametrize("case", CASES)
def test_residual_weights_stay_in_fp32(case, results):
    dtypes = results[case][2]["dtypes"]
    assert dtypes["weight"] == torch.bfloat16 and dtypes.get("resweight", torch.float32) == torch.float32
    assert ("resweight" in dtypes) == (not case.startswith("pruned"))


@pytest.mark.parametrize("case", CASES)
def test_with_this_library_automodel_needs_no_trust(case, results):
    model, folder, _ = results[case]
    name = CASES[case][0]
    loaded = AUTO.get(name, AutoModelForCausalLM).from_pretrained(folder).eval()
    assert type(loaded) is type(model) and isinstance(loaded, type(STOCK[name]()))
    assert torch.equal(loaded(**inputs(name)).logits, model(**inputs(name)).logits)
    assert loaded.config.rewritten == model.config.rewritten and loaded.config.dtype == torch.float32
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_the_stock_class_refuses_it_where_this_library_is(results):
    with pytest.raises(StrictDataclassFieldValidationError, match="load it through AutoModel"):
        LlamaForCausalLM.from_pretrained(results["rezero-llama"][1])


def test_other_heads_take_the_body_of_a_checkpoint(results):
    model, folder, _ = results["rezero-llama"]
    body = AutoModel.from_pretrained(folder).eval()
    stream = model(**inputs("llama"), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(body(**inputs("llama")).last_hidden_state, stream)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert classifier(**inputs("llama")).logits.shape == (2, 3)
    named = {n: p for n, p in classifier.named_parameters() if n.endswith("resweight")}
    with pytest.raises(
        RuntimeError, match="score.weight of RewrittenLlamaForSequenceClassification are of another shape"
    ):
        classifier.save_pretrained(folder / "classifier")
        AutoModelForSequenceClassification.from_pretrained(folder / "classifier", num_labels=5)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    AutoModelForSequenceClassification.from_pretrained(folder / "classifier", **options)
    assert len(named) == 6 and all(torch.equal(p, model.get_parameter(n)) for n, p in named.items())


def test_a_config_builds_a_new_model_of_the_documented_table(results):
    config = AutoConfig.from_pretrained(results["rezero-qwen3"][1])
    model = AutoModelForCausalLM.from_config(config)
    gates = [p for n, p in model.named_parameters() if n.endswith("resweight")]
    assert len(gates) == 6 and not any(gate.any() for gate in gates)
    assert abs(model.model.layers[1].mlp.down_proj.weight.std() * 40**0.5 - 1) < 0.15
    stream = model(**inputs("qwen3"), output_hidden_states=True).hidden_states[0]
    assert abs(stream.std() - 1) < 0.2


def test_sharded_files_and_tied_weights(tmp_path):
    model = rezero("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(**inputs("qwen3")).logits, model(**inputs("qwen3")).logits)


def test_more_tokens_in_a_scaled_table(tmp_path):
    model = rezero("qwen3")
    before = model(**inputs("qwen3")).logits
    model.resize_token_embeddings(270)
    assert torch.equal(model(**inputs("qwen3")).logits[..., :264], before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs("qwen3")).logits, model(**inputs("qwen3")).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tables_for_another_vocabulary_are_new_ones_if_they_are_asked_for(name, tmp_path):
    model = rezero(name)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vocab_size = 300
    with pytest.raises(RuntimeError, match="are of another shape than in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    stream = other(**inputs(name), output_hidden_states=True).hidden_states[0]
    assert other.get_input_embeddings().weight.shape == (300, 32) and abs(stream.std() - 1) < 0.2
    gates = {n: p for n, p in model.named_parameters() if n.endswith("resweight")}
    assert len(gates) == 6 and all(torch.equal(p, other.get_parameter(n)) for n, p in gates.items())


def test_a_grown_model_and_one_without_layers_load(tmp_path):
    model = rezero("llama")
    grow_(model, 2)
    save_and_compare(stir(model), tmp_path / "grown")
    (group,) = find_groups(model, ["layers"])
    prune_(model, [group], {group.name: torch.tensor([1, 3])})
    save_and_compare(model, tmp_path / "pruned")


def save_and_compare(model, folder):
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)


def test_what_is_folded_with_its_norms_is_a_plain_checkpoint(tmp_path):
    model = rezero("llama", norm="keep", init="keep")
    fold_resweight_(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_rewritten.py").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)
    heads = find_groups(loaded, ["layers"])
    prune_(loaded, heads, {heads[0].name: torch.tensor([0, 2])})
    assert type(loaded) is LlamaForCausalLM  # fewer layers of equal sizes: the config says so
    loaded.save_pretrained(tmp_path / "shallow")
    assert len(LlamaForCausalLM.from_pretrained(tmp_path / "shallow").model.layers) == 2


def test_pruned_models_of_transformers_load_through_automodel_and_load_pruned(tmp_path):
    model = without_middle_units("llama")
    save_pruned(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)
    old = load_pruned(tmp_path, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))).eval()
    assert torch.equal(old(**inputs("llama")).logits, model(**inputs("llama")).logits)


@pytest.mark.parametrize("reloaded", [False, True])
def test_another_attention_reaches_the_heads_that_were_pruned_of_a_fused_projection(reloaded, tmp_path):
    """Those of Phi-3 keep a config of their own, which counts their heads."""
    model, batch = build("phi3", torch.float32)
    model.set_attn_implementation("eager")
    heads = find_groups(model, ["heads"])
    prune_(model, heads, {group.name: torch.arange(1, group.num_units) for group in heads})
    before = model(**batch).logits
    if reloaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**batch).logits, before)
    assert all(weights is None for weights in model(**batch, output_attentions=True).attentions)  # eager gives them


def test_a_pipeline_reads_the_folder(tmp_path):
    rezero("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (answer,) = pipeline("text-generation", str(tmp_path))("abc", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("abc")


# damaged folders


def edit_config(folder, **values):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def folder(tmp_path):
    rezero("llama").save_pretrained(tmp_path)
    return tmp_path


def record(folder):
    return json.loads(Path(folder, "config.json").read_text())["rewritten"]


def test_the_file_has_a_text_that_the_original_config_refuses_and_the_base_takes(folder):
    config = json.loads(Path(folder, "config.json").read_text())
    (guard,) = (name for name, value in config.items() if value == HOW_TO_LOAD)
    assert config["model_type"] == "rewritten"
    with pytest.raises(StrictDataclassFieldValidationError, match="load it through AutoModel"):
        LlamaConfig.from_pretrained(folder)
    assert PreTrainedConfig.from_json_file(folder / "config.json").rewritten == config["rewritten"]
    assert vars(AutoConfig.from_pretrained(folder))[guard] == vars(rezero("llama").config)[guard]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 3)


def test_the_config_class_reads_the_file_that_it_wrote(folder):
    config = AutoConfig.from_pretrained(folder)
    again = type(config).from_json_file(folder / "config.json")
    assert type(again) is type(config) and again.to_dict() == config.to_dict() | {"_name_or_path": ""}


def test_a_newer_format(folder):
    edit_config(folder, rewritten=record(folder) | {"format": FORMAT + 1, "more": []})
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, and this code knows formats up to {FORMAT}"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": 3}, "gates is missing, unknown or no such value"),
        ({"extra": 3}, "extra is missing, unknown or no such value"),
        ({"gates": {"layers.7.mlp.down_proj": "layers.7.mlp.down_proj"}}, "names layers.7.mlp.down_proj"),
        ({"gates": {}}, "not expected \\['model.layers.0.mlp.down_proj.resweight'"),
        ({"identities": []}, "missing \\['model.layers.0.input_layernorm.weight'"),
    ],
)
def test_an_edited_record(folder, change, message):
    edit_config(folder, rewritten=record(folder) | change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_no_record(folder):
    edit_config(folder, rewritten=None)
    with pytest.raises(ValueError, match="config.rewritten is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)
    edit_config(folder, original_config_class="NoConfig")
    with pytest.raises(ValueError, match="original_config_class='NoConfig' is no config of transformers"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_residual_weights_are_not_split_over_ranks(folder, monkeypatch):
    monkeypatch.setattr(
        PreTrainedModel, "tp_size", 2
    )  # as transformers sets it for `tp_plan` and `distributed_config`
    with pytest.raises(ValueError, match="inside of projections, which tensor parallelism splits"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_residual_weights(folder):
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.endswith("layers.1.mlp.down_proj.resweight")}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing \\['model.layers.1.mlp.down_proj.resweight'\\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_of_other_shapes(tmp_path):
    without_middle_units("llama").save_pretrained(tmp_path)
    shapes = record(tmp_path)["shapes"]
    shapes["layers.1.mlp.down_proj.weight"] = [32, 20]
    edit_config(tmp_path, rewritten=record(tmp_path) | {"shapes": shapes})
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="of another shape \\['model.layers.1.mlp.down_proj.weight'\\]"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)
