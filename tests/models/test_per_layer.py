"""Layers of unequal sizes, as structured pruning leaves them: built from the config, saved, cached and generated."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, EncoderDecoderModel, StaticCache

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroModel
from hf_rezero.models.rezero.modeling_rezero import ReZeroPreTrainedModel


NO_ATTENTION = {"num_attention_heads": 0, "num_key_value_heads": 0}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
LAYOUTS = {
    "first without attention": {0: NO_ATTENTION},
    "middle without attention": {2: NO_ATTENTION},
    "unequal": {0: NO_ATTENTION, 1: {**GROUPED, "intermediate_size": 24}, 2: NO_ATTENTION,
                3: {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 0}},
    "last without attention": {0: {"num_attention_heads": 2, "num_key_value_heads": 2}, 3: NO_ATTENTION},
}  # fmt: skip
REMOVED = {0: NO_ATTENTION, 1: {"intermediate_size": 0}, 2: {**NO_ATTENTION, "intermediate_size": 12}}

LOAD_AND_RUN = """
import sys, torch
sys.modules["hf_rezero"] = None  # importing it now raises ImportError
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = torch.load(folder + "/inputs.pt")
ids = model.generate(inputs, max_new_tokens=8, do_sample=False)
torch.save({"logits": model(inputs).logits, "ids": ids}, folder + "/result.pt")
"""


@pytest.fixture
def make_model(make_config):
    """Decoders of four layers and a residual weight of 0.7, whose logits tell the tokens apart."""

    def make(overrides, **values):
        config = make_config(num_hidden_layers=4, per_layer_config=overrides, initializer_range=1.0, **values)
        return ReZeroForCausalLM(config).eval()

    return make


def silence(full, model):
    """Copy the weights of `model` into `full`, and let every sublayer that `model` lacks add zero."""
    missing, unexpected = full.load_state_dict(model.state_dict(), strict=False)
    assert missing and not unexpected
    for name in missing:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            full.get_parameter(name).data.zero_()
    return full


@pytest.mark.parametrize("values", [
    {}, {"resweight_sharing": "sublayer"}, {"norm_position": "pre", "resweight_sharing": "sublayer"},
    {"norm_position": "pre", "norm_type": "rmsnorm"}, {"norm_position": "branch"}, {"is_causal": False},
    {"attention_bias": True, "mlp_bias": True, "position_embedding_type": "learned"},
], ids=str)  # fmt: skip
def test_an_absent_sublayer_adds_nothing(make_config, ids, values):
    sizes = {"num_hidden_layers": 4, **values}
    model = ReZeroModel(make_config(per_layer_config={**REMOVED, 2: NO_ATTENTION}, **sizes)).eval()
    full = silence(ReZeroModel(make_config(**sizes)).eval(), model)
    assert torch.equal(model(ids).last_hidden_state, full(ids).last_hidden_state)
    before = model(ids).last_hidden_state
    model.layers[3].self_attn.o_proj.weight.data.zero_()
    assert not torch.equal(model(ids).last_hidden_state, before)


def test_an_absent_sublayer_leaves_no_residual_and_no_norm(make_model):
    model = make_model(REMOVED, resweight_sharing="sublayer", norm_position="pre").model
    for layer, names in zip(model.layers, [["mlp"], ["self_attn"], ["mlp"], ["self_attn", "mlp"]], strict=True):
        assert list(layer.residuals) == list(layer.norms) == names
        assert (layer.self_attn is None, layer.mlp is None) == ("self_attn" not in names, "mlp" not in names)
    assert model.layers[2].mlp.up_proj.weight.shape == (12, 32)
    assert ReZeroPreTrainedModel._supports_per_layer_config


def test_surgery_on_a_live_model_equals_the_built_one(make_config, ids):
    values = {"resweight_sharing": "sublayer", "norm_position": "pre"}
    live = ReZeroForCausalLM(make_config(**values)).eval()
    live(ids, output_hidden_states=True)
    layer = live.model.layers[0]
    layer.self_attn = None
    del layer.residuals["self_attn"], layer.norms["self_attn"]
    live.model.number_attention_layers()
    live.config.per_layer_config = {0: NO_ATTENTION}
    built = ReZeroForCausalLM(copy.deepcopy(live.config)).eval()
    built.load_state_dict(live.state_dict())
    assert [layer.self_attn.layer_idx for layer in live.model.layers[1:]] == [0, 1]
    for model in (live, built):
        assert torch.equal(model(ids).logits, built(ids).logits)
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == 4
        check_cache(model, ids)


def test_the_attention_implementation_can_change_after_building(make_model, ids):
    model = make_model(LAYOUTS["unequal"], attn_implementation="eager")
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 6:], expected[:, 6:], rtol=1e-4, atol=1e-4)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers[1::2]} == {"sdpa"}


def test_recorded_states_and_attentions(make_model, ids):
    model = make_model(LAYOUTS["unequal"], attn_implementation="eager")
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert [weights.shape[1] for weights in out.attentions] == [4, 3]
    assert len(out.hidden_states) == 5
    assert not torch.equal(out.hidden_states[0], out.hidden_states[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(make_model, ids, reentrant):
    model = make_model(REMOVED, norm_position="pre").train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in expected.values())
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def check_cache(model, ids):
    """Every way to fill a cache must give the logits of the whole text at once."""
    expected = model(ids, use_cache=False).logits
    length = ids.shape[1]
    for make in (
        lambda: DynamicCache(config=model.config),
        DynamicCache,
        lambda: StaticCache(config=model.config, max_cache_len=length),
    ):
        for cuts in ([7, 1, 1, length - 9], [1] * length):
            cache, start, logits = make(), 0, []
            for cut in cuts:
                out = model(ids[:, start : start + cut], past_key_values=cache, use_cache=True)
                logits.append(out.logits)
                start += cut
            torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
            assert cache.get_seq_length() == length


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_logits_equal_uncached_ones(make_model, ids, layout, attention):
    check_cache(make_model(LAYOUTS[layout], head_dim=8, attn_implementation=attention), ids)


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="transformers 5.17 cannot crop an empty slot of a cache")
def test_empty_slots_survive_the_work_of_a_cache(make_model, ids):
    model = make_model(LAYOUTS["unequal"])
    cache = model(ids[:, :12], use_cache=True).past_key_values
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    logits = model(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 10:], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20
    cache.reset()
    assert cache.get_seq_length() == 0


def greedy(model, ids, mask, steps):
    """Greedy decoding without a cache, and the smallest lead of a chosen token over the next."""
    lead = torch.inf
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        top = logits.topk(2).values
        lead = min(lead, (top[:, 0] - top[:, 1]).min().item())
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids, lead


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_equals_decoding_without_a_cache(make_model, ids, layout, padded):
    model = make_model(LAYOUTS[layout])
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :6], mask[0, :6] = 259, 0
    expected, lead = greedy(model, ids, mask, 10)
    assert lead > 1e-3  # no tie that rounding could turn
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    for extra in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7},
                  {"cache_implementation": "static", "prefill_chunk_size": 7}):  # fmt: skip
        assert torch.equal(model.generate(ids, **settings, **extra), expected), extra
    beams = {**settings, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    uncached = model.generate(ids, **beams, use_cache=False)
    for extra in ({}, {"cache_implementation": "static"}):
        cached = model.generate(ids, **beams, **extra)
        torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(cached.sequences, uncached.sequences), extra


def test_cross_attention_has_the_heads_of_its_layer(make_config, ids):
    sizes = {0: {"num_attention_heads": 2, "num_key_value_heads": 1}, 1: {"intermediate_size": 0}}
    encoder = ReZeroModel(make_config(is_causal=False))
    decoder = ReZeroForCausalLM(make_config(add_cross_attention=True, per_layer_config=sizes, initializer_range=1.0))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    assert decoder.model.layers[0].cross_attn.q_proj.out_features == 16
    settings = {"max_new_tokens": 8, "do_sample": False, "decoder_start_token_id": 256, "eos_token_id": None}
    expected = model.generate(ids, **settings, use_cache=False)
    assert len(expected[0].unique()) > 2
    for extra in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **settings, pad_token_id=259, **extra), expected)


def test_cross_attention_needs_heads_in_every_layer(make_config):
    message = "layer 1: num_attention_heads=0, but with add_cross_attention=True every layer reads the encoder"
    with pytest.raises(ValueError, match=message):
        make_config(per_layer_config={1: NO_ATTENTION}, add_cross_attention=True)
    config = make_config(per_layer_config={1: NO_ATTENTION})
    config.add_cross_attention = True  # as EncoderDecoderModel.from_encoder_decoder_pretrained does
    with pytest.raises(ValueError, match=message):
        ReZeroForCausalLM(config)


def test_a_saved_model_loads_to_the_bit_with_and_without_the_library(make_model, ids, tmp_path):
    model = make_model(LAYOUTS["unequal"], norm_position="pre", resweight_sharing="sublayer", head_dim=10)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "inputs.pt")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(ids).logits, model(ids).logits)
    command = [sys.executable, "-c", LOAD_AND_RUN, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = torch.load(tmp_path / "result.pt")
    assert torch.equal(result["logits"], model(ids).logits)
    assert torch.equal(result["ids"], model.generate(ids, max_new_tokens=8, do_sample=False))


def test_the_config_survives_every_copy(tmp_path):
    config = ReZeroConfig(hidden_size=30, num_attention_heads=5, num_hidden_layers=12, per_layer_config={
        0: NO_ATTENTION, 3: {"num_attention_heads": 3, "num_key_value_heads": 3}, 11: {"intermediate_size": 0},
    })  # fmt: skip
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["head_dim"], saved["intermediate_size"], saved["num_key_value_heads"]) == (6, 120, 5)
    copies = {
        "file": AutoConfig.from_pretrained(tmp_path),
        "dict": ReZeroConfig.from_dict(config.to_dict()),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
    }
    for name, again in copies.items():
        assert again.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}, name
        assert again.num_attention_heads == 5 and hasattr(again, "intermediate_size"), name
        assert [layer.num_attention_heads for layer in again.per_layer_config] == [0, 5, 5, 3] + 8 * [5], name
        assert [layer.intermediate_size for layer in again.per_layer_config] == 11 * [120] + [0], name
        assert {layer.head_dim for layer in again.per_layer_config} == {6}, name
    assert copies["deepcopy"] == copies["pickle"] == config


def test_a_zero_for_all_layers_needs_layers_of_their_own():
    sizes = dict.fromkeys(range(2), {"num_attention_heads": 2, "num_key_value_heads": 1})
    config = ReZeroConfig(num_attention_heads=0, head_dim=8, num_hidden_layers=2, per_layer_config=sizes)
    assert [layer.num_key_value_heads for layer in config.per_layer_config] == [1, 1]
    ReZeroConfig.from_dict(config.to_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_layer_config": {1: {**NO_ATTENTION, "intermediate_size": 0}}}, "layer 1: .*lower num_hidden_layers"),
        ({"per_layer_config": dict.fromkeys(range(3), NO_ATTENTION)}, "num_attention_heads is 0 in all 3 layers"),
        ({"per_layer_config": {1: {"num_attention_heads": 0}}}, "layer 1: .*=0 with num_key_value_heads=4: set both"),
        ({"per_layer_config": {1: {"num_key_value_heads": 0}}}, "layer 1: num_attention_heads=4 with .*=0: set both"),
        ({"per_layer_config": {1: {"num_attention_heads": 3}}}, "layer 1: num_attention_heads=3 is not a multiple"),
        ({"per_layer_config": {1: {"intermediate_size": -1}}}, "sets intermediate_size=-1: .*a whole number"),
        ({"per_layer_config": {1: {"intermediate_size": None}}}, "sets intermediate_size=None: .*a whole number"),
        ({"per_layer_config": {1: {"intermediate_size": "9"}}}, "sets intermediate_size='9': .*a whole number"),
        ({"per_layer_config": {1: {"hidden_size": 16}}}, "sets hidden_size=16: a layer may have its own num_att"),
        ({"per_layer_config": {1: {"skip": ["norm"]}}}, r"got skip=\['norm'\]: expected a list with some of attent"),
        ({"per_layer_config": {3: NO_ATTENTION}}, r"in the range \[0, 3\); got \[3\]"),
        ({"intermediate_size": 0}, "intermediate_size=0 for every layer: give a positive number"),
        ({"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads=0 for every layer"),
        ({"num_key_value_heads": -2, "per_layer_config": {1: NO_ATTENTION}}, "num_key_value_heads=-2"),
    ],
)
def test_bad_sizes_are_refused_with_what_came_and_what_to_do(make_config, values, message):
    with pytest.raises(ValueError, match=message):
        make_config(**values)
