"""What makes the text models fast and small must not change what they compute."""

from functools import partial

import pytest
import torch
from torch import nn

from hf_rezero import ReZeroConfig, ReZeroForCausalLM
from hf_rezero.models.rezero import modeling_rezero
from hf_rezero.models.rezero.modeling_rezero import ScaledLinear, batched_matmul_attention, scaled_linear


def model_of(**values):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
    return ReZeroForCausalLM(ReZeroConfig(**sizes | {"resweight_init": 0.3} | values))


@pytest.mark.parametrize("bias", [True, False])
def test_scaled_linear_has_the_gradients_of_scale_times_linear_twice(bias):
    shapes = [(2, 3, 4), (5, 4), *([(5,)] if bias else []), (1,)]
    x, weight, *rest = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def run(x, weight, *rest):
        return ScaledLinear.apply(x, weight, rest[0] if bias else None, rest[-1])

    expected = rest[-1] * nn.functional.linear(x, weight, rest[0] if bias else None)
    torch.testing.assert_close(run(x, weight, *rest), expected)
    assert torch.autograd.gradcheck(run, (x, weight, *rest))
    assert torch.autograd.gradgradcheck(run, (x, weight, *rest))


def test_a_watched_layer_and_a_layer_of_another_class_run_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, scale, watched = torch.randn(3, 4), torch.tensor([0.5]), nn.Linear(4, 5)
    watched.register_forward_hook(lambda module, args, output: output + 1)
    for layer in (watched, Doubled(4, 5)):
        torch.testing.assert_close(scaled_linear(layer, x, scale), 0.5 * layer(x))


@pytest.mark.parametrize(("values", "bound"), [({}, 14.2), ({"hidden_act": "relu"}, 10.2)])
def test_numbers_saved_for_the_backward_pass(values, bound):
    model = model_of(num_hidden_layers=16, **values)
    ids = torch.randint(0, 256, (8, 64))
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(ids).last_hidden_state
    assert output.requires_grad and sum(kept.values()) / (ids.numel() * 32 * 16) < bound


@pytest.mark.parametrize(("kind", "length"), [("causal", 10), ("causal", 300), ("full", 300), ("padded", 10)])
def test_batched_matmul_attention_is_that_of_sdpa(kind, length):
    module = model_of(is_causal=kind == "causal").model.layers[0].self_attn
    inputs = torch.randn(3, 2, 4, length, 8, requires_grad=True)
    mask = None
    if kind == "padded":
        mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
        mask[1, :, :, :3] = False
        mask[1, :, :3, 0] = True
    expected = nn.functional.scaled_dot_product_attention(*inputs, mask, is_causal=kind == "causal").transpose(1, 2)
    found, _ = batched_matmul_attention(module, *inputs, mask, scaling=8**-0.5)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((output * weights).sum(), inputs)[0] for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_batched_matmul_attention_trains_in_bfloat16_on_a_cpu_only(monkeypatch):
    calls = []
    attention = modeling_rezero.batched_matmul_attention
    spy = lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(modeling_rezero, "batched_matmul_attention", spy)
    model, ids = model_of(), torch.randint(0, 256, (2, 16))
    loss = model(ids, labels=ids).loss
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=ids).loss
    assert len(calls) == 4
    torch.testing.assert_close(rounded, loss, rtol=0.02, atol=0)


def test_one_compilation_serves_all_layers():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, ids, counter = model_of(num_hidden_layers=12), torch.randint(0, 256, (2, 16)), CompileCounter()
    expected = model(ids, labels=ids, use_cache=False).loss
    for layer in model.model.layers:
        layer.compile(backend=counter)
    torch.testing.assert_close(model(ids, labels=ids, use_cache=False).loss, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("chunk_size", [264, 5 * 264, 2**26])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)])
def test_the_chunked_loss_has_the_value_and_the_gradients_of_the_whole_one(chunk_size, num_items, monkeypatch):
    """One row, five rows, all rows at a time."""
    chunked = partial(modeling_rezero.chunked_causal_lm_loss, chunk_size=chunk_size)
    monkeypatch.setattr(modeling_rezero, "chunked_causal_lm_loss", chunked)
    model, ids = model_of().double(), torch.randint(0, 256, (3, 7))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    found = []
    for skip_logits in (False, True):
        model.zero_grad()
        output = model(ids, labels=labels, skip_logits=skip_logits, num_items_in_batch=num_items)
        assert (output.logits is None) == skip_logits
        output.loss.backward()
        found.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for whole, chunk in zip(*found, strict=True):
        torch.testing.assert_close(chunk, whole)


def test_the_chunked_loss_takes_labels_that_were_shifted_outside_and_another_index_to_ignore():
    model, ids = model_of(), torch.randint(0, 256, (2, 6))
    options = {"shift_labels": torch.randint(0, 5, (2, 6)), "ignore_index": 3}
    whole, chunked = (model(ids, labels=ids, skip_logits=skip, **options).loss for skip in (False, True))
    torch.testing.assert_close(chunked, whole)
    assert not torch.isclose(whole, model(ids, labels=ids).loss)


def test_the_chunked_loss_keeps_no_logits():
    lm_head, labels = nn.Linear(8, 1000), torch.randint(0, 1000, (4, 32))
    hidden_states, sizes = torch.randn(4, 32, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        modeling_rezero.chunked_causal_lm_loss(lm_head, hidden_states, labels, chunk_size=16_000).backward()
    assert sizes and max(sizes) <= 16_000 < 4 * 32 * 1000


def test_logits_come_where_nothing_is_lost_by_them():
    model, ids = model_of(), torch.randint(0, 256, (2, 5))
    assert model(ids, skip_logits=True).logits.shape == (2, 5, 264)
