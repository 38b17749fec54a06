"""Deployment without residual weights, and the authors' layers in and out."""

import pytest
import torch
from support.pruning_models import rezero_mlp, stir
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rezero import (
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroModel,
    RZTXDecoderLayer,
    RZTXEncoderLayer,
    fold_resweight_,
)
from hf_rezero.rewrite.rztx import rezero_to_rztx, rztx_to_rezero


CONFIGS = {
    "paper": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "per sublayer": {"resweight_sharing": "sublayer"},
    "pre": {"norm_position": "pre"},
    "post": {"norm_position": "post", "norm_type": "rmsnorm"},
    "branch": {"norm_position": "branch"},
    "branch, DyT": {"norm_position": "branch", "norm_type": "dyt"},
    "no skip": {"skip_connection": False},
    "without attention": {"per_layer_config": {1: {"num_attention_heads": 0, "num_key_value_heads": 0}}},
}


def different_gates(model):
    """Another residual weight everywhere, one of them negative."""
    with torch.no_grad():
        for i, parameter in enumerate(p for name, p in model.named_parameters() if name.endswith("resweight")):
            parameter.fill_(0.9 - 0.5 * i)
    return model.eval()


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_a_folded_model_computes_the_same_and_reloads(make_config, ids, tmp_path, values):
    model = different_gates(stir(ReZeroForCausalLM(make_config(**values))))
    before, count = model(ids).logits, sum(name.endswith("resweight") for name in model.state_dict())
    keys = len(model.state_dict())
    assert fold_resweight_(model) is model and len(model.state_dict()) == keys - count
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.resweight_sharing == "none" and torch.equal(again(ids).logits, model(ids).logits)
    again.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in again.parameters())


def test_folding_is_exact_in_double_precision(make_config, ids):
    model = different_gates(stir(ReZeroForSequenceClassification(make_config(num_labels=3)))).double()
    before = model(ids).logits
    torch.testing.assert_close(fold_resweight_(model)(ids).logits, before, rtol=1e-12, atol=1e-12)


def test_bfloat16_weights_are_multiplied_in_float32(make_config, ids):
    model = different_gates(ReZeroForCausalLM(make_config())).to(torch.bfloat16)
    weight = model.model.layers[0].mlp.down_proj.weight.float()
    gate = model.model.layers[0].residuals["layer"].resweight.float().item()
    fold_resweight_(model)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, (weight * gate).to(torch.bfloat16))


def test_models_that_cannot_be_folded_are_refused(make_config):
    with pytest.raises(ValueError, match="expected a ReZero text model"):
        fold_resweight_(rezero_mlp())
    with pytest.raises(ValueError, match="not folded yet"):
        fold_resweight_(fold_resweight_(ReZeroModel(make_config())))
    with pytest.raises(ValueError, match="without residual weights these are 1 and False"):
        make_config(resweight_sharing="none", resweight_init=0.5)


def stack(activation, layers=3):
    layer = RZTXEncoderLayer(32, 4, 48, dropout=0.0, activation=activation, batch_first=True)
    made = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return stir(made)


def counterpart(make_config, activation, **values):
    """A model without positions, whose layers are those of the stack."""
    shape = {"hidden_act": activation, "intermediate_size": 48, "attention_bias": True, "mlp_bias": True}
    model = ReZeroModel(make_config(**shape, position_embedding_type="learned", **values)).eval()
    nn.init.zeros_(model.embed_positions.weight)
    return model


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_authors_stack_and_our_model_compute_the_same(make_config, activation, is_causal):
    official, ours = stack(activation), counterpart(make_config, activation, is_causal=is_causal)
    result = ours.load_state_dict(rztx_to_rezero(official.state_dict()), strict=False)
    assert not result.unexpected_keys and {key.split(".")[0] for key in result.missing_keys} == {
        "embed_tokens",
        "embed_positions",
    }
    x = torch.randn(2, 10, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(10) if is_causal else None
    expected = official(x, mask=mask, is_causal=is_causal)
    torch.testing.assert_close(ours(inputs_embeds=x).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    back = rezero_to_rztx({f"model.{key}": tensor for key, tensor in ours.state_dict().items()})
    assert set(back) == set(official.state_dict())
    assert all(torch.equal(tensor, official.state_dict()[key]) for key, tensor in back.items())


def test_biases_that_are_not_there_become_zeros(make_config):
    model = stir(ReZeroModel(make_config(intermediate_size=48, hidden_act="relu")))
    official = stack("relu")
    official.load_state_dict(rezero_to_rztx(model.state_dict()))
    assert not official.layers[0].self_attn.in_proj_bias.any() and official.layers[0].linear1.weight.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_position": "pre"}, "no norm"),
        ({"resweight_sharing": "sublayer"}, "one residual weight"),
        ({"num_key_value_heads": 2}, "equal queries, keys and values"),
        ({"per_layer_config": {1: {"intermediate_size": 0}}}, "lacks mlp.up_proj"),
    ],
)
def test_what_the_authors_layers_cannot_hold_is_refused(make_config, values, message):
    with pytest.raises(ValueError, match=message):
        rezero_to_rztx(ReZeroModel(make_config(**values)).state_dict())


def test_other_layers_are_refused():
    decoder = nn.TransformerDecoder(RZTXDecoderLayer(16, 2, 32), 1)
    with pytest.raises(ValueError, match="expected the tensors of RZTXEncoderLayer"):
        rztx_to_rezero(decoder.state_dict())
    with pytest.raises(ValueError, match="no key has layers"):
        rztx_to_rezero({"weight": torch.zeros(1)})
