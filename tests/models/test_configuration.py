import json

import pytest
from transformers import AutoConfig

from hf_rezero import ReZeroConfig


def test_derived_fields_follow_the_given_ones():
    config = ReZeroConfig(hidden_size=96, num_attention_heads=6)
    assert (config.head_dim, config.intermediate_size, config.num_key_value_heads) == (16, 384, 6)


def test_final_norm_follows_the_position_of_the_norms():
    assert [ReZeroConfig(norm_position=p).final_norm for p in ("none", "pre", "post", "branch")] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_position": "sandwich"}, "norm_position='sandwich' is unknown: use one of none, pre, post, branch"),
        ({"norm_type": "batchnorm"}, "norm_type='batchnorm' is unknown"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is unknown: use one of .*gelu_pytorch_tanh"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi' is unknown"),
        ({"resweight_sharing": "model"}, "resweight_sharing='model' is unknown"),
        ({"hidden_size": 64, "num_attention_heads": 5}, "hidden_size=64 does not divide into num_attention_heads=5"),
        ({"num_attention_heads": 0}, "does not divide into num_attention_heads=0"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"head_dim": 3}, "head_dim=3 is odd"),
        ({"config_version": 99}, "config_version=99 was written by a newer hf_rezero"),
        ({"hidden_size": "64"}, "'hidden_size' expected int"),
    ],
)
def test_bad_values_are_refused_with_what_came_and_what_to_do(values, message):
    with pytest.raises(Exception, match=message):
        ReZeroConfig(**values)


def test_a_config_file_from_a_newer_version_is_refused(tmp_path):
    ReZeroConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_version": 2}))
    with pytest.raises(Exception, match="written by a newer hf_rezero; this one reads up to 1: upgrade"):
        AutoConfig.from_pretrained(tmp_path)


def test_round_trip_keeps_every_field_also_of_single_layers(tmp_path):
    config = ReZeroConfig(
        num_hidden_layers=3,
        resweight_init=0.1,
        norm_position="branch",
        per_layer_config={0: {"num_attention_heads": 2, "num_key_value_heads": 2}, 2: {"intermediate_size": 24}},
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, ReZeroConfig)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert [layer.num_attention_heads for layer in again.per_layer_config] == [2, 8, 8]
    assert [layer.intermediate_size for layer in again.per_layer_config] == [2048, 2048, 24]


def test_auto_map_names_every_auto_class():
    assert ReZeroConfig().auto_map.keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }


@pytest.mark.parametrize(
    "values, message",
    [
        ({"vocab_size": 0}, "got vocab_size=0: expected 1 to"),
        ({"hidden_size": -8}, "got hidden_size=-8: expected 1 to"),
        ({"num_hidden_layers": -1}, "got num_hidden_layers=-1: expected 0 to"),
        ({"head_dim": 0}, "got head_dim=0: expected 1 to"),
        ({"max_position_embeddings": 0}, "got max_position_embeddings=0: expected 1 to"),
        ({"hidden_dropout": 4}, "got hidden_dropout=4: expected 0 to 1"),
        ({"attention_dropout": -0.1}, "got attention_dropout=-0.1: expected 0 to 1"),
        ({"resweight_init": float("nan")}, "got resweight_init=nan: expected"),
        ({"norm_eps": float("nan")}, "got norm_eps=nan: expected 0 to 1"),
        ({"embedding_std": 0}, "got embedding_std=0: expected 1e-30 to"),
        ({"initializer_range": float("inf")}, "got initializer_range=inf: expected 0 to"),
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            "rope_type='spiral' and rope_theta=.*: use one of default, linear",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta=0.0: use one of"),
        ({"per_layer_config": [1]}, "per_layer_config holds .*: expected numbers of layers with sizes"),
        ({"per_layer_config": {"first": {}}}, "per_layer_config holds 'first'"),
        ({"per_layer_config": {0: 5}}, "per_layer_config holds 0 with 5"),
        ({"per_layer_config": {0: {1: 2}}}, "per_layer_config holds 0 with {1: 2}"),
        ({"per_layer_config": {0: {"skip": 5}}}, "got skip=5: expected a list"),
        ({"per_layer_config": {0: {"skip": [["mlp"]]}}}, "expected a list with some of"),
    ],
)
def test_what_no_model_can_be_built_or_trained_from_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReZeroConfig(**{"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2} | values)
