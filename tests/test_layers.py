"""RZTXEncoderLayer, RZTXDecoderLayer and ReZero against the official layers, written out here from their equations."""

import copy
import doctest
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_rezero import layers
from hf_rezero.layers import ReZero, RZTXDecoderLayer, RZTXEncoderLayer


torch.set_num_threads(1)

D, HEADS, FFN = 16, 2, 32
S, T, N = 7, 5, 3  # memory length, target length, batch
LAYERS = [RZTXEncoderLayer, RZTXDecoderLayer]
CAUSAL, CAUSAL_TGT = (nn.Transformer.generate_square_subsequent_mask(length) for length in (S, T))
PADDING = torch.arange(S) >= torch.tensor([[S], [S - 2], [S - 4]])  # (N, S), True = ignore


class OracleEncoderLayer(nn.Module):
    """The official encoder layer: dropout after the gate, attention weights computed."""

    def __init__(self, dropout=0.0, activation=F.relu):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(D, HEADS, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(D, FFN), nn.Linear(FFN, D)
        self.dropout, self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)
        self.resweight = nn.Parameter(torch.Tensor([0]))
        self.act = activation

    def forward(self, src, src_mask=None, src_key_padding_mask=None):
        attended, _ = self.self_attn(src, src, src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)
        x = src + self.dropout1(attended * self.resweight)
        return x + self.dropout2(self.linear2(self.dropout(self.act(self.linear1(x)))) * self.resweight)


class OracleDecoderLayer(nn.Module):
    """The official decoder layer: dropout before the gate."""

    def __init__(self, dropout=0.0, activation=F.relu):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(D, HEADS, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(D, HEADS, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(D, FFN), nn.Linear(FFN, D)
        self.dropout, self.dropout1 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.dropout2, self.dropout3 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.resweight = nn.Parameter(torch.Tensor([0]))
        self.act = activation

    def forward(self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_padding=None, memory_padding=None):
        attended, _ = self.self_attn(tgt, tgt, tgt, attn_mask=tgt_mask, key_padding_mask=tgt_padding)
        x = tgt + self.resweight * self.dropout1(attended)
        attended, _ = self.multihead_attn(x, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_padding)
        x = x + self.resweight * self.dropout2(attended)
        return x + self.resweight * self.dropout3(self.linear2(self.dropout(self.act(self.linear1(x)))))


ORACLES = {RZTXEncoderLayer: OracleEncoderLayer, RZTXDecoderLayer: OracleDecoderLayer}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def set_resweights_(module, value=0.7):
    """Opens every gate, so that equalities below are about the branches and not only about the skip."""
    for name, p in module.named_parameters():
        if name.endswith("resweight"):
            nn.init.constant_(p, value)
    return module


def make(layer, dropout=0.0, **kwargs):
    return set_resweights_(layer(D, HEADS, FFN, dropout, **kwargs))


def inputs_of(layer):
    """The positional inputs of an encoder (S, N, D) or a decoder (T, N, D), (S, N, D)."""
    return (torch.randn(S, N, D),) if layer is RZTXEncoderLayer else (torch.randn(T, N, D), torch.randn(S, N, D))


def encoder_of(layer, depth):
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def oracle_and_ours(layer, dropout=0.0, **kwargs):
    oracle = set_resweights_(ORACLES[layer](dropout))
    for name, p in oracle.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)  # the attention biases start at zero
    ours = layer(D, HEADS, FFN, dropout, **kwargs)
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours


# Equality with the official layers


def test_official_state_dict_keys():
    attention = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    shared = ["linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "resweight"]
    encoder = {f"self_attn.{key}" for key in attention} | set(shared)
    assert set(RZTXEncoderLayer(D, HEADS).state_dict()) == encoder
    assert set(RZTXDecoderLayer(D, HEADS).state_dict()) == encoder | {f"multihead_attn.{key}" for key in attention}


@pytest.mark.parametrize("layer", LAYERS)
def test_same_seed_gives_the_official_weights_in_the_official_order(layer):
    torch.manual_seed(1)
    expected = list(ORACLES[layer]().named_parameters())
    torch.manual_seed(1)
    actual = list(layer(D, HEADS, FFN).named_parameters())
    assert [name for name, _ in actual] == [name for name, _ in expected]
    assert all(torch.equal(a, e) for (_, a), (_, e) in zip(actual, expected, strict=True))


MASKS = {
    RZTXEncoderLayer: [(), (CAUSAL,), (None, PADDING), (CAUSAL.isinf(), PADDING)],
    RZTXDecoderLayer: [
        (),
        (CAUSAL_TGT,),
        (None, torch.ones(T, S, dtype=torch.bool).triu(2)),
        (None, None, PADDING[:, 2:], PADDING),
    ],
}


@pytest.mark.parametrize(("layer", "masks"), [(layer, masks) for layer in LAYERS for masks in MASKS[layer]])
def test_outputs_and_gradients_are_the_official_ones(layer, masks):
    oracle, ours = oracle_and_ours(layer)
    inputs = [x.requires_grad_() for x in inputs_of(layer)]
    target = torch.randn_like(inputs[0])
    results = []
    for module in (oracle, ours):
        out = module(*inputs, *masks)
        grads = torch.autograd.grad((out * target).sum(), [*inputs, *module.parameters()])
        results.append((out, *grads))
    assert all(grad.abs().max() > 1e-3 for grad in results[0])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_falls_on_the_official_places(layer):
    oracle, ours = oracle_and_ours(layer, dropout=0.4)
    inputs = inputs_of(layer)
    torch.manual_seed(2)
    expected = oracle(*inputs)
    torch.manual_seed(2)
    torch.testing.assert_close(ours(*inputs), expected)
    assert not torch.allclose(ours(*inputs), expected)  # another draw
    torch.testing.assert_close(ours.eval()(*inputs), oracle.eval()(*inputs))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("activation", "function"),
    [("relu", F.relu), ("gelu", F.gelu), (torch.sin, torch.sin), (nn.SiLU(), F.silu)],
    ids=["relu", "gelu", "function", "module"],
)
def test_activation(layer, activation, function):
    oracle, ours = oracle_and_ours(layer, activation=activation)
    oracle.act = function
    inputs = inputs_of(layer)
    torch.testing.assert_close(ours(*inputs), oracle(*inputs))


# The identity at start


@pytest.mark.parametrize("training", [True, False])
def test_128_encoder_layers_are_the_identity_to_the_bit(training):
    encoder = encoder_of(RZTXEncoderLayer(D, HEADS, FFN, 0.3), 128).train(training)
    (src,) = inputs_of(RZTXEncoderLayer)
    with torch.set_grad_enabled(training):
        assert torch.equal(encoder(src, CAUSAL.isinf(), PADDING), src)
    set_resweights_(encoder, 0.1)
    assert not torch.allclose(encoder(src), src)


@pytest.mark.parametrize("training", [True, False])
def test_decoder_layers_are_the_identity_to_the_bit(training):
    decoder = nn.TransformerDecoder(RZTXDecoderLayer(D, HEADS, FFN, 0.3), 16).train(training)
    tgt, memory = inputs_of(RZTXDecoderLayer)
    assert torch.equal(decoder(tgt, memory), tgt)


@pytest.mark.parametrize("layer", LAYERS)
def test_at_zero_only_resweight_has_a_gradient(layer):
    module = layer(D, HEADS, FFN, 0.0)
    (module(*inputs_of(layer)) * torch.randn(D)).sum().backward()
    for name, p in module.named_parameters():
        assert torch.count_nonzero(p.grad) == (1 if name == "resweight" else 0), name


# Inside the containers of torch


def test_containers_equal_a_loop_over_the_layers():
    encoder = encoder_of(make(RZTXEncoderLayer), 3)
    decoder = nn.TransformerDecoder(make(RZTXDecoderLayer), 3)
    transformer = nn.Transformer(D, HEADS, custom_encoder=encoder, custom_decoder=decoder)
    for i in range(3):
        set_resweights_(encoder.layers[i], 0.2 + 0.1 * i)
        set_resweights_(decoder.layers[i], 0.3 + 0.1 * i)
    tgt, src = inputs_of(RZTXDecoderLayer)
    memory, expected = src, tgt
    for layer in encoder.layers:
        memory = layer(memory, None, PADDING)
    for layer in decoder.layers:
        expected = layer(expected, memory, CAUSAL_TGT, None, None, PADDING)
    torch.testing.assert_close(encoder(src, None, PADDING), memory)
    torch.testing.assert_close(decoder(tgt, memory, CAUSAL_TGT, memory_key_padding_mask=PADDING), expected)
    masks = {"tgt_mask": CAUSAL_TGT, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    torch.testing.assert_close(transformer(src, tgt, **masks), expected)


def test_layers_of_a_stack_have_their_own_resweight():
    encoder = encoder_of(RZTXEncoderLayer(D, HEADS, FFN), 3)
    assert len({id(layer.resweight) for layer in encoder.layers}) == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_causal", [True, None])
@pytest.mark.parametrize("batch_first", [True, False])
def test_causal_encoder_does_not_look_ahead(training, is_causal, batch_first):
    encoder = encoder_of(make(RZTXEncoderLayer, batch_first=batch_first), 2).train(training)
    x = torch.randn(N, S, D)
    changed = x.clone()
    changed[:, 4:] += 1
    with torch.set_grad_enabled(training):
        before, after = (
            encoder(y if batch_first else y.transpose(0, 1), CAUSAL, is_causal=is_causal) for y in (x, changed)
        )
    if not batch_first:
        before, after = before.transpose(0, 1), after.transpose(0, 1)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])
    free = encoder(x if batch_first else x.transpose(0, 1))
    assert not torch.allclose(free if batch_first else free.transpose(0, 1), before)  # the mask does something


@pytest.mark.parametrize("training", [True, False])
def test_causal_decoder_does_not_look_ahead(training):
    decoder = nn.TransformerDecoder(make(RZTXDecoderLayer), 2).train(training)
    tgt, memory = inputs_of(RZTXDecoderLayer)
    changed = tgt.clone()
    changed[3:] += 1
    before, after = (decoder(y, memory, CAUSAL_TGT, tgt_is_causal=True) for y in (tgt, changed))
    torch.testing.assert_close(after[:3], before[:3])
    assert not torch.allclose(decoder(changed, memory)[:3], decoder(tgt, memory)[:3])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_no_wrong_fast_path(nested, activation):
    """torch's inference path for encoder stacks adds two LayerNorms; ours must not be taken for one of those."""
    layer = make(RZTXEncoderLayer, activation=activation, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if nested else "error")
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        src = torch.randn(N, S, D)
        expected = encoder.train()(src, src_key_padding_mask=PADDING)
        with torch.no_grad():
            actual = encoder.eval()(src, src_key_padding_mask=PADDING)
            bare = encoder.layers[1](encoder.layers[0](src, None, PADDING), None, PADDING)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(bare, expected)
    valid = src.clone()
    valid[PADDING] = 9.0  # what is padded must not matter to the other tokens
    torch.testing.assert_close(encoder(valid, src_key_padding_mask=PADDING)[~PADDING], expected[~PADDING])


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_is_fused_and_knows_that_it_is_causal(layer, monkeypatch):
    """Only the choice of the kernel, no value, depends on need_weights and is_causal."""
    calls = []
    fused = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        calls.append((attn_mask is None, is_causal))
        return fused(query, key, value, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    encoder = layer is RZTXEncoderLayer
    hint = {"src_mask": CAUSAL, "is_causal": True} if encoder else {"tgt_mask": CAUSAL_TGT, "tgt_is_causal": True}
    make(layer)(*inputs_of(layer), **hint)
    assert calls == ([(True, True)] if encoder else [(True, True), (True, False)])


# Layout, devices, types, copies


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_first_is_the_transposed_layout(layer, training):
    sequence_first = make(layer).train(training)
    batch_first = make(layer, batch_first=True).train(training)
    batch_first.load_state_dict(sequence_first.state_dict())
    inputs = inputs_of(layer)
    with torch.set_grad_enabled(training):
        out = batch_first(*(x.transpose(0, 1) for x in inputs))
        torch.testing.assert_close(out.transpose(0, 1), sequence_first(*inputs))
        unbatched = sequence_first(*(x[:, 1] for x in inputs))
        torch.testing.assert_close(unbatched, out[1])


@pytest.mark.parametrize("layer", LAYERS)
def test_device_and_dtype_reach_every_parameter(layer):
    with torch.device("meta"):
        in_context = layer(D, HEADS, FFN)
    for module in (in_context, layer(D, HEADS, FFN, device="meta")):
        assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in layer(D, HEADS, FFN, dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fp32_resweight", [True, False])
def test_bf16(layer, fp32_resweight):
    reference = make(layer)
    low = copy.deepcopy(reference).to(torch.bfloat16)
    if fp32_resweight:
        low.resweight = nn.Parameter(reference.resweight.detach().clone())
    inputs = inputs_of(layer)
    out = low(*(x.bfloat16() for x in inputs))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(*inputs), rtol=0.05, atol=0.05)
    out.float().pow(2).mean().backward()
    assert low.resweight.grad.dtype == low.resweight.dtype and low.resweight.grad.abs() > 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu])
def test_copies_give_the_same_output(layer, activation):
    module = make(layer, activation=activation).eval()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    inputs = inputs_of(layer)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(clone(*inputs), module(*inputs))
        assert clone.resweight is not module.resweight


# Errors


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "swish"}, "activation must be 'relu', 'gelu' or a function of one tensor, got 'swish'"),
        ({"activation": nn.ReLU}, "activation must be .* got <class 'torch.nn.modules.activation.ReLU'>"),
        ({"activation": None}, "activation must be .* got None"),
        ({"nhead": 3}, "d_model must be a multiple of nhead, got d_model=16, nhead=3"),
        ({"nhead": 0}, "nhead must be a positive integer, got 0"),
        ({"d_model": -4}, "d_model must be a positive integer, got -4"),
        ({"d_model": 16.0}, "d_model must be a positive integer, got 16.0"),
        ({"dim_feedforward": 0}, "dim_feedforward must be a positive integer, got 0"),
        ({"dropout": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_constructor_errors(layer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(**({"d_model": D, "nhead": HEADS} | kwargs))


@pytest.mark.parametrize("training", [True, False])
def test_is_causal_without_a_mask_is_an_error(training):
    """The inference path of nn.MultiheadAttention would ignore the flag and look ahead."""
    encoder = make(RZTXEncoderLayer, batch_first=True).train(training)
    decoder = make(RZTXDecoderLayer, batch_first=True).train(training)
    x = torch.randn(N, T, D)
    with torch.set_grad_enabled(training):
        for call in (
            lambda: encoder(x, is_causal=True),
            lambda: encoder_of(encoder, 1)(x, is_causal=True),
            lambda: decoder(x, x, tgt_is_causal=True),
            lambda: decoder(x, x, memory_is_causal=True),
        ):
            with pytest.raises(ValueError, match="is_causal=True says that the mask is causal, but no mask was given"):
                call()


# The wrapper


WRAPPED = {
    "linear": (lambda: nn.Linear(6, 6), (4, 6)),
    "conv": (lambda: nn.Conv2d(3, 3, 3, padding=1), (2, 3, 8, 8)),
    "batchnorm": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.ReLU()), (4, 3, 5)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_rezero_adds_the_gated_branch(name):
    build, shape = WRAPPED[name]
    block, x = ReZero(build()), torch.randn(shape)
    assert block.resweight.shape == (1,) and block.resweight.dtype == torch.float32
    assert torch.equal(block(x), x)
    block.eval()
    assert torch.equal(block(x), x)
    block.resweight.data.fill_(-1.5)
    torch.testing.assert_close(block(x), x - 1.5 * block.module(x))


@pytest.mark.parametrize("name", WRAPPED)
def test_rezero_at_zero_only_resweight_has_a_gradient(name):
    build, shape = WRAPPED[name]
    block = ReZero(build())
    (block(torch.randn(shape)) * torch.randn(shape)).sum().backward()
    assert block.resweight.grad.abs() > 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in block.module.parameters())


def test_rezero_resweight_init():
    x = torch.randn(4, 6)
    block = ReZero(nn.Linear(6, 6), resweight_init=0.25)
    assert block.resweight.item() == 0.25
    torch.testing.assert_close(block(x), x + 0.25 * block.module(x))


def test_rezero_passes_on_arguments_and_the_rest_of_a_tuple():
    attention = nn.MultiheadAttention(D, HEADS)
    x, mask = torch.randn(S, N, D), CAUSAL
    out, weights = ReZero(attention, 0.5)(x, x, x, attn_mask=mask)
    expected, expected_weights = attention(x, x, x, attn_mask=mask)
    torch.testing.assert_close(out, x + 0.5 * expected)
    torch.testing.assert_close(weights, expected_weights)
    out, nothing = ReZero(attention, 0.5)(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(out, x + 0.5 * expected)
    assert nothing is None
    out, (_, cell) = ReZero(nn.LSTM(D, D), 0.5)(x)
    assert out.shape == x.shape and cell.shape == (1, N, D)


def test_rezero_keeps_the_dtype_of_a_bf16_branch():
    block = ReZero(nn.Linear(6, 6).bfloat16(), 0.5)
    x = torch.randn(4, 6).bfloat16()
    assert block(x).dtype == torch.bfloat16 and block.resweight.dtype == torch.float32
    block(x).float().sum().backward()
    assert block.resweight.grad.dtype == torch.float32


def test_rezero_is_created_on_the_device_of_its_module_and_copies():
    assert ReZero(nn.Linear(6, 6, device="meta")).resweight.device.type == "meta"
    block, x = ReZero(nn.Linear(6, 6), 0.5), torch.randn(4, 6)
    for clone in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(clone(x), block(x))


@pytest.mark.parametrize("features", [1, 5])
def test_rezero_refuses_a_branch_of_another_shape(features):
    """One feature would broadcast without a word."""
    with pytest.raises(ValueError, match=rf"Linear must keep .* got \(4, 6\) -> \(4, {features}\)"):
        ReZero(nn.Linear(6, features))(torch.randn(4, 6))


class _ReturnsDict(nn.Module):
    def forward(self, x):
        return {"last_hidden_state": x}


def test_rezero_errors():
    with pytest.raises(TypeError, match="_ReturnsDict must return a tensor or a tuple .* got dict"):
        ReZero(_ReturnsDict())(torch.randn(4, 6))
    with pytest.raises(TypeError, match="must be an instance of torch.nn.Module, got <class"):
        ReZero(nn.Linear)
    with pytest.raises(ValueError, match="resweight_init must be a finite number, got nan"):
        ReZero(nn.Linear(6, 6), float("nan"))


# Behaviour


def test_64_layers_learn_without_norm_and_warmup():
    """Every token must become the mean of its sequence: needs the attention, which begins closed."""
    encoder = encoder_of(RZTXEncoderLayer(D, HEADS, FFN, 0.0), 64)
    x = torch.randn(S, 8, D)
    target = x.mean(0, keepdim=True).expand_as(x)
    optimizer = torch.optim.Adagrad(encoder.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(encoder(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    # The same depth with open gates, as a residual network without norm: the signal explodes.
    assert set_resweights_(encoder_of(RZTXEncoderLayer(D, HEADS, FFN, 0.0), 64), 1.0)(x).abs().max() > 1e4


def test_docstring_examples_run():
    assert doctest.testmod(layers).attempted > 6
    assert doctest.testmod(layers).failed == 0
