"""What transformers asks of its own models: configuration, common, generation, pipeline, parallel plan, training.

Written from the properties that the common tests of transformers check. The residual weights are off 0.
"""

import copy
import inspect

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_rezero
from hf_rezero import (
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroMLPModel,
    ReZeroModel,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
    ReZeroResNetModel,
)


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "resweight_init": 0.5, "initializer_range": 0.5, "num_labels": 3}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "resweight_init": 0.5, "num_labels": 3}
MLP = {"image_size": 16, "num_hidden_layers": 2, "hidden_size": 16, "resweight_init": 0.5, "num_labels": 3}
CASES = {
    "decoder": (ReZeroModel, ReZeroConfig, TEXT),
    "encoder": (ReZeroModel, ReZeroConfig, {**TEXT, "is_causal": False}),
    "causal": (ReZeroForCausalLM, ReZeroConfig, TEXT),
    "tied": (ReZeroForCausalLM, ReZeroConfig, {**TEXT, "tie_word_embeddings": True, "initializer_range": 0.2}),
    "masked": (ReZeroForMaskedLM, ReZeroConfig, {**TEXT, "is_causal": False}),
    "classifier": (ReZeroForSequenceClassification, ReZeroConfig, TEXT),
    "tagger": (ReZeroForTokenClassification, ReZeroConfig, {**TEXT, "is_causal": False}),
    "resnet": (ReZeroResNetModel, ReZeroResNetConfig, RESNET),
    "resnet classifier": (ReZeroResNetForImageClassification, ReZeroResNetConfig, RESNET),
    "mlp": (ReZeroMLPModel, ReZeroMLPConfig, MLP),
    "mlp classifier": (ReZeroMLPForImageClassification, ReZeroMLPConfig, MLP),
}
TEXTS = [name for name, (_, config_class, _) in CASES.items() if config_class is ReZeroConfig]
HEADS = [name for name, case in CASES.items() if "For" in case[0].__name__]
CONFIGS = {"text": (ReZeroConfig, TEXT), "resnet": (ReZeroResNetConfig, RESNET), "mlp": (ReZeroMLPConfig, MLP)}
every_model = pytest.mark.parametrize("name", CASES)
every_text = pytest.mark.parametrize("name", TEXTS)
every_head = pytest.mark.parametrize("name", HEADS)


def make(name, **values):
    model_class, config_class, shape = CASES[name]
    return model_class(config_class(**{**shape, **values})).eval()


def inputs_of(name, batch=3):
    if name in TEXTS:
        return {"input_ids": torch.randint(3, 250, (batch, 9))}
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


def labels_of(model, inputs):
    by_token = isinstance(model, (ReZeroForCausalLM, ReZeroForMaskedLM, ReZeroForTokenClassification))
    like = inputs["input_ids"] if by_token else inputs[model.main_input_name].flatten(1)[:, 0]
    return torch.arange(like.numel()).reshape(like.shape) % 3


def tensors(output):
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]


def assert_same(actual, expected, tolerance=0.0):
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# configuration


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_files_folders_and_keyword_arguments(name, tmp_path):
    config_class, values = CONFIGS[name]
    config = config_class(**values)
    assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.to_json_file(tmp_path / "config.json")
    assert config_class.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "sub")
    for loaded in (
        config_class.from_pretrained(tmp_path, subfolder="sub"),
        AutoConfig.from_pretrained(tmp_path / "sub"),
    ):
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    changed = config_class.from_pretrained(tmp_path / "sub", resweight_init=0.25, num_labels=5)
    assert changed.resweight_init == 0.25 and len(changed.id2label) == len(changed.label2id) == 5
    assert config_class().to_dict() != config.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_takes_what_every_config_takes(name):
    common = {"output_hidden_states": True, "return_dict": False, "dtype": "float16", "problem_type": "regression",
              "id2label": {0: "x"}, "label2id": {"x": 0}, "architectures": ["Other"]}  # fmt: skip
    config = CONFIGS[name][0](**common)
    assert config.dtype == torch.float16
    for key in common.keys() - {"dtype"}:
        assert getattr(config, key) == common[key], key


# common


@every_model
def test_outputs_are_deterministic_and_the_same_as_tuple_and_after_saving(name, tmp_path):
    model, inputs = make(name), inputs_of(name)
    expected = model(**inputs)
    assert_same(model(**inputs), expected)
    for a, b in zip(tensors(expected), model(**inputs, return_dict=False), strict=False):
        assert torch.equal(a, b)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(again(**inputs), expected)


@every_model
def test_a_batch_gives_each_row_what_the_row_gives_alone(name):
    model, inputs = make(name), inputs_of(name)
    batch = tensors(model(**inputs))
    for row in range(3):
        single = tensors(model(**{key: value[row : row + 1] for key, value in inputs.items()}))
        for a, b in zip(single, batch, strict=True):
            torch.testing.assert_close(a[0], b[row], rtol=1e-5, atol=1e-5)


@every_model
def test_hidden_states_are_recorded_in_order_and_keep_gradients(name):
    model, inputs = make(name), inputs_of(name)
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    for a, b in zip(output.hidden_states, output.hidden_states[1:], strict=False):
        assert a.shape != b.shape or not torch.equal(a, b)
    output.hidden_states[0].retain_grad()
    tensors(output)[0].sum().backward()
    assert output.hidden_states[0].grad.any()
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3


@every_text
def test_attentions_are_recorded_and_weigh_the_tokens(name):
    model, inputs = make(name, attn_implementation="eager"), inputs_of(name)
    attentions = model(**inputs, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(3, 4, 9, 9)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(3, 4, 9))
    assert attentions[0].triu(1).any() != model.config.is_causal
    if "For" not in type(model).__name__:
        assert len(model(**inputs).to_tuple()) == 1 + model.config.is_causal


@every_model
def test_every_weight_learns_and_checkpointing_changes_no_gradient(name):
    model, inputs = make(name).train(), inputs_of(name)

    def gradients():
        model.zero_grad()
        output = model(**inputs, labels=labels_of(model, inputs)) if name in HEADS else model(**inputs)
        (output[0] if name in HEADS else output[0].square().mean()).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    assert all(grad is not None and grad.any() for key, grad in expected.items() if not key.endswith(".bias"))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@every_model
def test_missing_weights_get_what_a_fresh_model_has(name, tmp_path):
    """Loading nothing at all, through the meta device, is the same as building with the same seed."""
    model_class, config_class, values = CASES[name]
    model_class(config_class(**values)).save_pretrained(tmp_path)
    torch.manual_seed(1)
    fresh = model_class(config_class(**values))
    torch.manual_seed(1)
    loaded = model_class.from_pretrained(None, config=config_class(**values), state_dict={})
    parameters, buffers = dict(loaded.named_parameters()), dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in fresh.named_buffers())
    for key, tensor in fresh.named_parameters():
        if tensor.ndim == 1:
            assert torch.equal(tensor, parameters[key]), key
        else:
            assert parameters[key].std().item() == pytest.approx(tensor.std().item(), rel=0.3), key


@every_head
def test_a_head_loads_the_base_model_and_the_other_way_round(name, tmp_path):
    model, inputs = make(name), inputs_of(name)
    model.base_model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "head")
    headed, report = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    missing = {key.split(".")[0] for key in report["missing_keys"]}
    assert missing <= {"lm_head", "score", "classifier"} and not report["unexpected_keys"]
    base = AutoModel.from_pretrained(tmp_path / "head")
    expected = model.base_model(**inputs)[0]
    assert torch.equal(base(**inputs)[0], expected) and torch.equal(headed.base_model(**inputs)[0], expected)


@every_model
def test_tensors_are_parameters_or_buffers_and_a_model_builds_on_the_meta_device(name):
    model_class, config_class, values = CASES[name]
    with torch.device("meta"):
        model = model_class(config_class(**values))
    assert all(p.is_meta for p in model.parameters())
    loose = [
        key for module in model.modules() for key, value in vars(module).items() if isinstance(value, torch.Tensor)
    ]
    assert not loose
    assert model.main_input_name == next(iter(inspect.signature(model.forward).parameters))


@every_model
def test_wrong_shapes_are_refused_or_built_anew_on_request(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    size = {"vocab_size": 300} if name in TEXTS else {"num_channels": 1}
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path, **size)
    again = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True, **size)
    parameters = dict(again.named_parameters())
    kept = [key for key, p in model.named_parameters() if p.shape == parameters[key].shape]
    assert len(kept) >= len(parameters) - 3 and all(p.isfinite().all() for p in parameters.values())
    assert all(torch.equal(parameters[key], p) for key, p in model.named_parameters() if key in kept)


@every_text
def test_embeddings_stand_in_for_ids_can_be_swapped_and_resized(name):
    model, inputs = make(name), inputs_of(name)
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert_same(model(inputs_embeds=embeds), expected, 1e-6)
    before = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(280)
    assert model.config.vocab_size == 280 == model.get_input_embeddings().num_embeddings
    assert torch.equal(model.get_input_embeddings().weight[:264], before)
    if (head := model.get_output_embeddings()) is not None:
        assert head.weight.shape[0] == model(**inputs).logits.shape[-1] == 280
        assert (head.weight is model.get_input_embeddings().weight) == (name == "tied")
    resized = model(**inputs)
    torch.testing.assert_close(tensors(resized)[0][..., :264], tensors(expected)[0], rtol=1e-5, atol=1e-5)
    model.resize_token_embeddings(260)
    assert torch.equal(model.get_input_embeddings().weight, before[:260])
    model.resize_token_embeddings(900, mean_resizing=False)
    new = model.get_input_embeddings().weight[260:]
    assert new.std().item() == pytest.approx(before.std().item(), rel=0.05)
    assert model.get_input_embeddings()(torch.tensor([899]))[0].std().item() == pytest.approx(1.0, abs=0.4)
    if (head := model.get_output_embeddings()) is not None:
        assert head.weight[260:].std().item() == pytest.approx(model.config.initializer_range, rel=0.05)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = make("tied")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = ReZeroForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["classifier", "resnet classifier", "mlp classifier"])
@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_classifiers_know_the_three_problem_types(name, problem):
    model, inputs = make(name, problem_type=problem), inputs_of(name)
    labels = {"single_label_classification": torch.tensor([0, 1, 2])}.get(problem, torch.rand(3, 3).round())
    loss = {"regression": nn.MSELoss, "single_label_classification": nn.CrossEntropyLoss}.get(
        problem, nn.BCEWithLogitsLoss
    )
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, loss()(output.logits, labels))


@every_text
def test_padding_on_either_side_changes_no_token(name):
    model, ids = make(name), inputs_of(name)["input_ids"]
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    pad, ones = torch.full((3, 4), 259), torch.ones_like(ids)
    for left in (True, False):
        pairs = (pad, ids), (torch.zeros_like(pad), ones)
        padded, mask = (torch.cat(pair if left else pair[::-1], 1) for pair in pairs)
        output = model(input_ids=padded, attention_mask=mask)[0]
        if output.ndim == 3:
            output = output[:, 4:] if left else output[:, :-4]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_rope_scaling_is_read_from_the_config(scaling):
    parameters = {"rope_type": scaling, "rope_theta": 10_000.0, "factor": 10.0}
    torch.manual_seed(0)
    plain = make("decoder")
    scaled = make("decoder", rope_parameters=parameters)
    scaled.load_state_dict(plain.state_dict())
    short, long = torch.randint(3, 250, (1, 10)), torch.randint(3, 250, (1, 96))
    assert torch.allclose(plain(short)[0], scaled(short)[0], atol=1e-5) == (scaling == "dynamic")
    assert not torch.allclose(plain(long)[0], scaled(long)[0], atol=1e-5)


def test_what_transformers_asks_of_the_code_itself():
    for model_class, _, _ in CASES.values():
        layers = {cls for cls in model_class._can_record_outputs.values() if isinstance(cls, type)}
        assert {cls.__name__ for cls in layers} == set(model_class._no_split_modules)
        parameters = inspect.signature(model_class.forward).parameters
        assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
        if model_class.config_class is ReZeroConfig:
            assert all(issubclass(cls, GradientCheckpointingLayer) for cls in layers)
        assert model_class.__name__ in hf_rezero.__all__


# generation


@pytest.mark.parametrize("options", [
    {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"repetition_penalty": 1.5},
], ids=str)  # fmt: skip
def test_ways_to_generate_give_the_same_with_and_without_a_cache(options):
    model, ids = make("causal"), inputs_of("causal", 1 if "prompt_lookup_num_tokens" in options else 2)["input_ids"]
    settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 259, "do_sample": False, **options}
    results = []
    for use_cache in (True, False) if "prompt_lookup_num_tokens" not in options else (True,):
        torch.manual_seed(0)
        results.append(model.generate(ids, **settings, use_cache=use_cache))
    if len(results) == 1:
        results.append(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert results[0].shape == (len(ids) * options.get("num_return_sequences", 1), 15)
    assert torch.equal(*results)


def test_generation_goes_on_from_a_cache_and_starts_from_embeddings():
    model, ids = make("causal"), inputs_of("causal", 2)["input_ids"]
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
    whole = model.generate(ids, max_new_tokens=6, **settings)
    first = model.generate(ids, max_new_tokens=3, **settings)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, **settings)
    assert torch.equal(rest.sequences, whole.sequences)
    logits = model(whole.sequences[:, :-1]).logits[:, -6:]
    torch.testing.assert_close(torch.stack(whole.scores, 1), logits, rtol=1e-4, atol=1e-4)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=6, **settings)
    assert torch.equal(embedded.sequences, whole.sequences[:, -6:])


def test_assisted_generation_gives_what_the_model_alone_gives():
    model, ids = make("causal"), inputs_of("causal", 1)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    torch.manual_seed(3)
    for assistant in (copy.deepcopy(model), make("causal", num_hidden_layers=1)):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), expected)


# training


@every_head
def test_a_tiny_model_overfits_one_batch(name):
    model, inputs = make(name).train(), inputs_of(name)
    labels = inputs["input_ids"] if name in ("causal", "tied") else labels_of(model, inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
