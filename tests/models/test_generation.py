"""The contract of a forward pass with transformers: names of the cache, what is refused, and every way to generate.

All of it with the transformers that is installed; `make test-newest` runs it with the newest one.
"""

import pytest
import torch
from support.small_models import IMAGE_MODELS, close, padded_batch
from transformers import DynamicCache, GenerationConfig

from hf_rezero import (
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroModel,
)
from hf_rezero.models.rezero.modeling_rezero import CACHE_NAME


@pytest.fixture
def make_model(make_config):
    """Models in evaluation mode, with a head wide enough to tell the tokens apart."""

    def make(model_class=ReZeroForCausalLM, **values):
        return model_class(make_config(**{"initializer_range": 1.0, "num_labels": 3, **values})).eval()

    return make


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_under_either_name(make_model, ids, name):
    model = make_model()
    first = model(ids[:, :12], **{name: DynamicCache(config=model.config)}, use_cache=True)
    cache = first[CACHE_NAME]
    assert cache.get_seq_length() == 12 and first.past_key_values is cache
    close(model(ids[:, 12:], **{name: cache}).logits, model(ids).logits[:, 12:])
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize(("argument", "value"), [
    ("kv_cache", DynamicCache()), ("mask", torch.ones(2, 20)), ("positions", [torch.arange(20)]),
    ("token_type_ids", torch.zeros(2, 20)), ("masks", {"full": torch.ones(2, 20)}),
])  # fmt: skip
@pytest.mark.parametrize("model_class", [ReZeroForCausalLM, ReZeroForSequenceClassification, ReZeroModel])
def test_data_that_nothing_reads_is_refused(make_model, ids, model_class, argument, value):
    model = make_model(model_class)
    model(ids, engine_state="blocks", num_items_in_batch=torch.tensor(3), **{argument: None})
    with pytest.raises(TypeError, match=f"got {argument}, which it does not read"):
        model(ids, **{argument: value})


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_models_refuse_what_they_do_not_read(name):
    model, images = IMAGE_MODELS[name]().eval(), torch.randn(2, 3, 32, 32)
    model(images, num_items_in_batch=torch.tensor(2))
    with pytest.raises(TypeError, match="got bool_masked_pos, which it does not read"):
        model(images, bool_masked_pos=torch.ones(2, 4))


@pytest.mark.parametrize("kept", [
    2, torch.tensor([3, 1]), torch.tensor([[0, 19], [4, 4]]), torch.arange(40).view(2, 20) % 3 == 0,
], ids=["last", "positions", "positions of each row", "mask"])  # fmt: skip
def test_logits_at_some_positions_are_those_of_all(make_model, ids, kept):
    model = make_model()
    logits = model(ids).logits
    if isinstance(kept, int):
        expected = logits[:, -kept:]
    elif kept.ndim == 1 or kept.dtype == torch.bool:
        expected = logits[:, kept] if kept.ndim == 1 else logits[kept]
    else:
        expected = torch.stack([row[index] for row, index in zip(logits, kept, strict=True)])
    close(model(ids, logits_to_keep=kept).logits, expected)


GENERATION = {
    "greedy": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5}, "early exit": {"assistant_early_exit": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3}, "chunked prefill": {"prefill_chunk_size": 7},
}  # fmt: skip
LAYERS = {"equal": None, "unequal": {1: {"skip": ["mlp"]}, 2: {"num_attention_heads": 2, "num_key_value_heads": 2}}}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("mode", GENERATION)
def test_every_way_to_generate_gives_the_text_of_no_cache(make_model, ids, mode, layers):
    model = make_model(initializer_range=1.0, per_layer_config=LAYERS[layers])
    single = "assistant" in str(GENERATION[mode]) or "lookup" in mode
    inputs = {"input_ids": ids[:1]} if single else padded_batch(ids)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **inputs}
    uncached = {"num_beams", "do_sample", "top_k"} & GENERATION[mode].keys()
    torch.manual_seed(0)
    expected = model.generate(**options | {key: GENERATION[mode][key] for key in uncached}, use_cache=False)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**options | GENERATION[mode]), expected)


def test_generation_goes_on_from_a_returned_cache(make_model, ids):
    model = make_model(initializer_range=1.0)
    options = {"do_sample": False, "eos_token_id": None}
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **options)
    more = model.generate(first.sequences, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=4, **options)
    assert torch.equal(more, model.generate(ids, max_new_tokens=8, use_cache=False, **options))


def test_an_error_during_an_early_exit_leaves_the_number_of_layers(make_model, ids):
    model = make_model(position_embedding_type="learned")
    with pytest.raises(ValueError, match=r"got \d+ positions, but the learned position table"):
        model.generate(ids[:1], assistant_early_exit=2, max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert model.config.num_hidden_layers == 3


def test_continuous_batching_gives_the_text_of_each_prompt(make_model, ids):
    model = make_model(initializer_range=1.0)
    prompts = [ids[0].tolist(), ids[1, :5].tolist()]
    options = {"max_new_tokens": 6, "do_sample": False}
    config = GenerationConfig(**options, eos_token_id=-1, num_blocks=8, max_batch_tokens=32)
    model.set_attn_implementation("sdpa")
    answers = model.generate_batch(prompts, generation_config=config, progress_bar=False)
    got = sorted(answer.generated_tokens for answer in answers.values())
    expected = [
        model.generate(torch.tensor([prompt]), eos_token_id=None, **options)[0, -6:].tolist() for prompt in prompts
    ]
    assert got == sorted(expected)
