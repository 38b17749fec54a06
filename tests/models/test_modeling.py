"""The text models against the equations in plain torch, and the properties that must hold for every config."""

import pytest
import torch
from support.oracles import rezero_logits
from torch import nn
from transformers import EncoderDecoderConfig, EncoderDecoderModel

from hf_rezero import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroModel,
)


PLAIN = {"resweight_init": 1.0, "resweight_trainable": False}
TABLE_1 = {
    "rezero": {"norm_position": "none"},
    "residual": PLAIN,
    "pre": {"norm_position": "pre", **PLAIN},
    "post": {"norm_position": "post", **PLAIN},
    "branch": {"norm_position": "branch", **PLAIN},
    "deep": {"skip_connection": False, **PLAIN},
    "deep + norm": {"skip_connection": False, "norm_position": "post", **PLAIN},
}
VARIANTS = {
    **{name: {"position_embedding_type": "learned", **values} for name, values in TABLE_1.items()},
    **{f"rezero + {p} {t}": {"norm_position": p, "norm_type": t}
       for p, t in [("pre", "rmsnorm"), ("post", "dyt"), ("branch", "rmsnorm"), ("pre", "dyt")]},
    "rotary": {"position_embedding_type": "rotary"},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "gelu": {"hidden_act": "gelu"},
    "tied": {"tie_word_embeddings": True, "position_embedding_type": "learned"},
    "per sublayer": {"resweight_sharing": "sublayer"},
    "biases, relu": {"attention_bias": True, "mlp_bias": True, "hidden_act": "relu"},
    "grouped heads": {"num_key_value_heads": 2},
    "wide heads": {"head_dim": 12},
    "encoder": {"is_causal": False},
}  # fmt: skip


def randomize(model):
    """Move every parameter off its initial value, so that no term of the equations hides behind a 0 or a 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_equal(actual, expected, tolerance, message=""):
    """Compare in units of the largest expected entry."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{message} differs by {error:.1e} of the largest entry"


def language_model(config):
    return randomize(ReZeroForCausalLM(config)).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_the_equations(make_config, ids, variant):
    config = make_config(**VARIANTS[variant])
    model = language_model(config).double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, expected = model(ids).logits, rezero_logits(weights, config, ids)
    exact = config.position_embedding_type == "learned"  # angles and codes are fp32 in the model
    assert_equal(logits, expected, 1e-12 if exact else 1e-5)
    probe = torch.randn_like(logits)
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_equal(parameter.grad, weights[name].grad, 1e-11 if exact else 1e-4, name)


def test_loss_is_the_mean_negative_log_likelihood_of_the_next_token(make_config, ids):
    model = language_model(make_config())
    labels = ids.clone()
    labels[0, :5] = -100
    log_p = rezero_logits(dict(model.named_parameters()), model.config, ids).log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t + 1]] for b in range(2) for t in range(19) if labels[b, t + 1] >= 0]
    torch.testing.assert_close(model(ids, labels=labels).loss, torch.stack(terms).mean())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_at_resweight_zero_128_layers_are_the_identity_bit_for_bit(make_config, ids, training, is_causal):
    config = make_config(num_hidden_layers=128, resweight_init=0.0, is_causal=is_causal)
    model = ReZeroForCausalLM(config).train(training)
    embeds = model.model.embed_tokens(ids)
    for state in model(ids, output_hidden_states=True).hidden_states:
        assert torch.equal(state, embeds)
    assert torch.equal(model(ids).logits, model.lm_head(embeds))


def test_dropout_does_not_disturb_the_identity(make_config):
    model = ReZeroModel(make_config(resweight_init=0.0, hidden_dropout=0.5, attention_dropout=0.5)).train()
    x = torch.randn(2, 5, 32)
    positions = model.rotary_emb(x, torch.arange(5)[None])
    assert torch.equal(model.layers[0](x, position_embeddings=positions), x)


def test_at_resweight_zero_only_the_residual_weights_and_the_ends_get_gradients(make_config, ids):
    model = ReZeroForCausalLM(make_config(resweight_init=0.0))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        inner = ".layers." in name and "resweight" not in name
        assert bool((parameter.grad == 0).all()) == inner, name


def test_one_optimizer_step_moves_the_residual_weights_first(make_config, ids):
    model = ReZeroForCausalLM(make_config(resweight_init=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    for name, p in model.named_parameters():
        if "resweight" in name:
            torch.testing.assert_close(p.abs(), torch.tensor([0.01]), rtol=1e-4, atol=0)
        elif ".layers." in name:
            assert torch.equal(p, before[name]), name
    step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n.endswith("up_proj.weight"))


def test_no_norm_module_without_a_norm(make_config):
    names = {type(module).__name__ for module in ReZeroForCausalLM(make_config()).modules()}
    assert not [name for name in names if "Norm" in name or "DyT" in name]


def test_a_causal_model_never_looks_ahead_and_an_encoder_does(make_config, ids):
    later = ids.clone()
    later[:, 10:] = (later[:, 10:] + 1) % 256
    for is_causal in (True, False):
        model = language_model(make_config(is_causal=is_causal))
        same = torch.equal(model(ids).logits[:, :10], model(later).logits[:, :10])
        assert same == is_causal


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_chunked_and_left_padded_decoding_gives_the_uncached_logits(make_config, ids, positions, attention):
    model = language_model(make_config(position_embedding_type=positions, attn_implementation=attention))
    full = model(ids, use_cache=False).logits
    cache, chunks = None, []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20)):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chunks.append(output.logits)
    assert_equal(torch.cat(chunks, 1), full, 1e-5)

    pad = torch.full((2, 6), model.config.pad_token_id)
    mask = torch.cat((torch.zeros_like(pad), torch.ones_like(ids)), 1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(torch.cat((pad, ids), 1), attention_mask=mask, position_ids=position_ids).logits[:, 6:]
    assert_equal(padded, full, 1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_generation_without(make_config, ids, cache):
    model = language_model(make_config())
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, cache_implementation=cache, disable_compile=True, **options), expected)


def test_left_padded_batch_generation_equals_single_generation(make_config, ids):
    model = language_model(make_config())
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    pad = torch.full((1, 9), model.config.pad_token_id)
    batch = torch.cat((torch.cat((pad, ids[:1, :11]), 1), ids[1:]))
    mask = torch.ones_like(batch)
    mask[0, :9] = 0
    both = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(both[0, 9:], model.generate(ids[:1, :11], **options)[0])
    assert torch.equal(both[1], model.generate(ids[1:], **options)[0])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_eager_sdpa_and_flex_attention_agree(make_config, ids, is_causal, padded):
    model = language_model(make_config(is_causal=is_causal))
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    kept = mask.bool() if padded else torch.ones_like(ids).bool()
    results = {}
    for name in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results[name] = model(ids, attention_mask=mask if padded else None).logits[kept]
    assert_equal(results["sdpa"], results["eager"], 1e-5)
    assert_equal(results["flex_attention"], results["eager"], 1e-5)


def test_padding_does_not_reach_the_encoder_output(make_config, ids):
    model = language_model(make_config(is_causal=False))
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    changed = ids.clone()
    changed[:, 15:] = 7
    torch.testing.assert_close(model(ids, mask).logits[:, :15], model(changed, mask).logits[:, :15])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(make_config, ids, reentrant):
    model = language_model(make_config(use_cache=False)).train()

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(module.gradient_checkpointing for module in model.model.layers)
    torch.testing.assert_close(gradients(), expected)


def test_compiled_graph_is_whole_and_gives_the_same_loss(make_config, ids):
    model = language_model(make_config(use_cache=False))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_initial_values_are_those_of_the_table(make_config):
    shape = {"hidden_size": 256, "intermediate_size": 512, "resweight_init": 0.25, "num_hidden_layers": 1}
    model = ReZeroForCausalLM(
        make_config(**shape, position_embedding_type="learned", norm_position="pre", norm_type="dyt", mlp_bias=True)
    )
    layer = model.model.layers[0]
    for weight, std in (
        (model.model.embed_tokens.weight, 1.0),
        (model.model.embed_positions.weight, 0.5),
        (model.lm_head.weight, 0.02),
        (layer.self_attn.q_proj.weight, 256**-0.5),
        (layer.mlp.up_proj.weight, 256**-0.5),
        (layer.mlp.down_proj.weight, 512**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert weight.mean().item() == pytest.approx(0, abs=0.03 * std)
    assert layer.residuals["layer"].resweight.item() == 0.25
    assert layer.norms["mlp"].alpha.item() == 0.5
    assert not layer.mlp.up_proj.bias.any()
    tied = ReZeroForCausalLM(make_config(**shape, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert tied.model.embed_tokens(torch.arange(264)).std().item() == pytest.approx(1.0, rel=0.03)


def test_resweight_is_shared_by_layer_or_by_sublayer(make_config):
    for sharing, count in (("layer", 3), ("sublayer", 6)):
        model = ReZeroModel(make_config(resweight_sharing=sharing))
        shapes = [p.shape for name, p in model.named_parameters() if "resweight" in name]
        assert shapes == [(1,)] * count
    frozen = ReZeroModel(make_config(resweight_trainable=False))
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if "resweight" in name)


def test_bf16_keeps_the_residual_weight_in_fp32_and_the_stream_in_bf16(make_config, ids, tmp_path):
    ReZeroForCausalLM(make_config()).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        model = ReZeroForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert {d for n, d in dtypes.items() if "resweight" in n} == {torch.float32}
        assert {d for n, d in dtypes.items() if "resweight" not in n} == {dtype}
        assert model(ids).logits.dtype == dtype


def test_autocast_keeps_the_residual_stream_in_fp32(make_config, ids):
    model = language_model(make_config())
    with torch.autocast("cpu", torch.bfloat16):
        states = model(ids, output_hidden_states=True).hidden_states
        assert {state.dtype for state in states} == {torch.float32}
        model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_layers_of_unequal_shape_are_built_from_their_own_config(make_config, ids, tmp_path):
    overrides = {0: {"num_attention_heads": 2, "num_key_value_heads": 2}, 2: {"intermediate_size": 24}}
    model = language_model(make_config(per_layer_config=overrides))
    assert [layer.self_attn.q_proj.out_features for layer in model.model.layers] == [16, 32, 32]
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [128, 128, 24]
    model.save_pretrained(tmp_path)
    again = ReZeroForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 24)


def test_attention_weights_and_hidden_states_are_captured(make_config, ids):
    model = language_model(make_config(attn_implementation="eager", add_cross_attention=True))
    memory = torch.randn(2, 5, 32)
    output = model(ids, encoder_hidden_states=memory, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert [w.shape for w in output.attentions] == [(2, 4, 20, 20)] * 3
    assert [w.shape for w in output.cross_attentions] == [(2, 4, 20, 5)] * 3
    torch.testing.assert_close(output.cross_attentions[0].sum(-1), torch.ones(2, 4, 20))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cross_attention_equals_the_equations_with_and_without_a_cache(make_config, ids, attention):
    config = make_config(add_cross_attention=True, resweight_sharing="sublayer", attn_implementation=attention)
    model = language_model(config)
    memory = torch.randn(2, 5, 32)
    expected = rezero_logits(dict(model.named_parameters()), config, ids, memory)
    full = model(ids, encoder_hidden_states=memory).logits
    assert_equal(full, expected, 1e-5)
    first = model(ids[:, :12], encoder_hidden_states=memory, use_cache=True)
    rest = model(ids[:, 12:], encoder_hidden_states=memory, past_key_values=first.past_key_values).logits
    assert_equal(torch.cat((first.logits, rest), 1), full, 1e-5)


def test_encoder_decoder_model_learns_and_generates_with_its_cache(make_config, ids):
    encoder = make_config(is_causal=False)
    decoder = make_config(is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(
        EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder),
        randomize(ReZeroModel(encoder)),
        language_model(decoder),
    ).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 256, 259
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    output = model(input_ids=ids, attention_mask=mask, labels=ids[:, :9].clone())
    output.loss.backward()
    assert all(
        p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n or "q_proj" in n
    )
    options = {"max_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 256, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    shorter = model.generate(ids[:1, :12], attention_mask=mask[:1, :12], **options)
    assert torch.equal(cached[:1], shorter)


def test_sequence_classification_pools_the_last_token_or_the_mean(make_config, ids):
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    decoder = randomize(ReZeroForSequenceClassification(make_config(num_labels=3))).eval()
    states = decoder.model(ids, mask).last_hidden_state
    expected = decoder.score(torch.stack((states[0, 11], states[1, 19])))
    torch.testing.assert_close(decoder(ids, mask).logits, expected)
    padded = ids.masked_fill(mask == 0, decoder.config.pad_token_id)
    torch.testing.assert_close(decoder(padded).logits[1], expected[1])
    encoder = randomize(ReZeroForSequenceClassification(make_config(num_labels=3, is_causal=False))).eval()
    states = encoder.model(ids, mask).last_hidden_state
    expected = encoder.score(torch.stack((states[0, :12].mean(0), states[1].mean(0))))
    torch.testing.assert_close(encoder(ids, mask).logits, expected)
    loss = encoder(ids, mask, labels=torch.tensor([2, 0])).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected, torch.tensor([2, 0])))


def test_masked_lm_and_token_classification_losses(make_config, ids):
    labels = torch.where(torch.rand(2, 20) < 0.3, ids, -100)
    masked = randomize(ReZeroForMaskedLM(make_config(is_causal=False)))
    output = masked(ids, labels=labels)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    tagger = randomize(ReZeroForTokenClassification(make_config(is_causal=False, num_labels=5)))
    tags = torch.where(labels == -100, -100, labels % 5)
    output = tagger(ids, labels=tags)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits.flatten(0, 1), tags.flatten()))


def test_errors_say_what_came_and_what_to_do(make_config, ids):
    with pytest.raises(ValueError, match="reads both sides: build the config with is_causal=False"):
        ReZeroForMaskedLM(make_config())
    model = ReZeroModel(make_config(position_embedding_type="learned", max_position_embeddings=16))
    with pytest.raises(ValueError, match="20 positions, but the learned position table has .*=16"):
        model(ids)
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=torch.zeros(2, 20, 32))
    with pytest.raises(ValueError, match="built without `add_cross_attention`"):
        model(ids[:, :5], encoder_hidden_states=torch.zeros(2, 3, 32))


def test_parallel_plans_name_modules_that_exist(make_config):
    model = ReZeroForCausalLM(make_config())
    names = {name.replace(".0.", ".*.") for name, _ in model.model.named_modules()}
    assert set(model.config.base_model_tp_plan) <= names
    assert set(model.config.base_model_pp_plan) <= names
    assert {"lm_head", "model.layers.*.mlp.up_proj"} <= set(model.tp_plan)


def test_64_layers_learn_a_periodic_text_at_once():
    from hf_rezero import ReZeroConfig

    model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=64, num_attention_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([list(b"abcdefghijklmnop" * 2)] * 4)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
