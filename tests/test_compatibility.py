"""What users have: pipelines, adapters, quantisation, export, compiled and served generation, scoring harnesses.

Every residual weight here is off 0, where a model that ignores its input or its mask would pass.
"""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.launch import run_workers
from support.small_models import IMAGE_MODELS, close, padded_batch
from torch import nn
from transformers import CompileConfig, ViTImageProcessorPil, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_rezero import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroModel,
    byte_tokenizer,
)


TEXTS = ["to be or not to be", "that", "is the question:"]


@pytest.fixture
def make_model(make_config):
    """Models in evaluation mode, with a head wide enough to tell the tokens apart."""

    def make(model_class=ReZeroForCausalLM, **values):
        return model_class(make_config(**{"initializer_range": 1.0, "num_labels": 3, **values})).eval()

    return make


@pytest.fixture
def make_pipeline(tmp_path):
    """A pipeline from a saved folder, as a user has it."""

    def make(task, model, **options):
        model.save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        return pipeline(task, model=str(tmp_path), **options)

    return make


# pipelines


def test_text_generation_pipeline_gives_a_batch_what_it_gives_each_text(make_model, make_pipeline):
    model = make_model()
    generate = make_pipeline("text-generation", model)
    options = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
    single = [generate(text, **options)[0]["generated_token_ids"] for text in TEXTS]
    batch = generate(TEXTS, batch_size=3, **options)
    assert [out[0]["generated_token_ids"][-6:] for out in batch] == [out[-6:] for out in single]
    ids = byte_tokenizer()(TEXTS[0], return_tensors="pt").input_ids
    assert single[0][-6:] == model.generate(ids, max_new_tokens=6, do_sample=False)[0, -6:].tolist()


def test_fill_mask_pipeline(make_model, make_pipeline):
    model = make_model(ReZeroForMaskedLM, is_causal=False)
    fill = make_pipeline("fill-mask", model)
    texts = ["to <|mask|>e or not to be", "th<|mask|>t"]
    ids = byte_tokenizer()(texts[1], return_tensors="pt").input_ids
    expected = model(ids).logits[0, 2].softmax(-1).topk(5)
    for answer in (fill(texts[1]), fill(texts, batch_size=2)[1]):
        assert [guess["token"] for guess in answer] == expected.indices.tolist()
        close(torch.tensor([guess["score"] for guess in answer]), expected.values)


@pytest.mark.parametrize("is_causal", [True, False])
def test_text_classification_pipeline(make_model, make_pipeline, is_causal):
    model = make_model(ReZeroForSequenceClassification, is_causal=is_causal, id2label={0: "a", 1: "b", 2: "c"})
    classify = make_pipeline("text-classification", model, top_k=None)
    for text, answer in zip(TEXTS, classify(TEXTS, batch_size=3), strict=True):
        expected = model(**byte_tokenizer()(text, return_tensors="pt")).logits[0].softmax(-1)
        scores = {guess["label"]: guess["score"] for guess in answer}
        close(torch.tensor([scores[label] for label in "abc"]), expected)


def test_token_classification_pipeline(make_model, make_pipeline):
    model = make_model(ReZeroForTokenClassification, is_causal=False, id2label={0: "O", 1: "B-X", 2: "I-X"})
    tag = make_pipeline("token-classification", model, ignore_labels=[])
    for text, answer in zip(TEXTS, tag(TEXTS, batch_size=3), strict=True):
        expected = model(**byte_tokenizer()(text, return_tensors="pt")).logits[0].argmax(-1)
        assert [token["entity"] for token in answer] == [model.config.id2label[int(i)] for i in expected]
        assert [token["start"] for token in answer] == list(range(len(text)))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_classification_pipeline_with_the_processor_beside_the_model(name, tmp_path):
    model = IMAGE_MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    answer = pipeline("image-classification", model=str(tmp_path))(image)
    expected = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
    scores = {guess["label"]: guess["score"] for guess in answer}
    close(torch.tensor([scores[f"LABEL_{i}"] for i in range(3)]), expected)


# quantisation and export


@pytest.mark.parametrize("model_class", [ReZeroForCausalLM, ReZeroForSequenceClassification])
def test_int8_dynamic_quantisation(make_model, ids, model_class):
    model = make_model(model_class, hidden_size=64)
    inputs = padded_batch(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torchao used
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(module) for module in small.modules()}
    assert nn.Linear not in kinds and torch.ao.nn.quantized.dynamic.Linear in kinds
    logits, expected = small(**inputs).logits, model(**inputs).logits
    if logits.ndim == 3:
        logits, expected = logits[inputs["attention_mask"] == 1], expected[inputs["attention_mask"] == 1]
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < 0.1, f"{error:.3f} of the logits"


BATCH = {0: torch.export.Dim("batch")}
BATCH_AND_LENGTH = {**BATCH, 1: torch.export.Dim("length", max=64)}  # a learned position table has 64 rows here


class LogitsOnly(nn.Module):
    """What a graph of tensors can hold of a text model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize(("model_class", "positions"), [
    (ReZeroForCausalLM, "rotary"), (ReZeroForCausalLM, "learned"), (ReZeroForMaskedLM, "rotary"),
    pytest.param(ReZeroForMaskedLM, "sinusoidal", marks=pytest.mark.slow),
])  # fmt: skip
def test_exported_program_runs_at_other_sizes(make_model, ids, model_class, positions):
    is_causal = model_class is ReZeroForCausalLM
    model = make_model(model_class, is_causal=is_causal, position_embedding_type=positions)
    inputs, other = padded_batch(ids), padded_batch(torch.randint(0, 256, (3, 13)), 4)
    shapes = dict.fromkeys(inputs, BATCH_AND_LENGTH)
    program = torch.export.export(LogitsOnly(model), (), inputs, dynamic_shapes=shapes).module()
    rows = other["attention_mask"] == 1
    close(program(**other)[rows], model(**other).logits[rows])


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_exported_image_model_runs_at_other_batch_sizes(name):
    model = IMAGE_MODELS[name]().eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    program = torch.export.export(model, (), inputs, dynamic_shapes={"pixel_values": BATCH}).module()
    images = torch.randn(5, 3, 32, 32)
    close(program(pixel_values=images).logits, model(images).logits)


def onnx_logits(module, example, inputs, axes, path):
    """Export with one batch, and run with another."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    shapes = {name: dict(axes) for name in example}
    torch.onnx.export(module, (), path, kwargs=example, dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = dict(zip((i.name for i in session.get_inputs()), (x.numpy() for x in inputs.values()), strict=True))
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("positions", ["rotary", pytest.param("learned", marks=pytest.mark.slow)])
def test_onnx_of_a_language_model_runs_at_other_sizes(make_model, ids, tmp_path, positions):
    model = make_model(position_embedding_type=positions)
    other = padded_batch(torch.randint(0, 256, (3, 13)), 4)
    logits = onnx_logits(LogitsOnly(model).eval(), padded_batch(ids), other, BATCH_AND_LENGTH, tmp_path / "model.onnx")
    rows = other["attention_mask"] == 1
    close(logits[rows], model(**other).logits[rows])


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_onnx_of_an_image_model_runs_at_other_batch_sizes(name, tmp_path):
    model = IMAGE_MODELS[name]().eval()
    example, images = ({"pixel_values": torch.randn(n, 3, 32, 32)} for n in (2, 5))
    logits = onnx_logits(model, example, images, BATCH, tmp_path / "model.onnx")
    close(logits, model(**images).logits)


# generation


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_generation_with_a_static_cache(make_model, ids, backend):
    model = make_model()
    inputs = padded_batch(ids)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    compiled = CompileConfig(backend=backend, fullgraph=True, mode="default")
    compiled._compile_all_devices = True  # generate compiles on accelerators only
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = model.generate(**inputs, **options, cache_implementation="static", compile_config=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert torch.equal(static, model.generate(**inputs, **options))


def test_log_likelihood_of_continuations_is_the_same_in_a_padded_batch(make_model):
    """As lm-evaluation-harness scores: padded on the right, no attention mask, summed over the continuation."""
    model = make_model()
    pairs = [(b"to be or ", b"not to be"), (b"that is ", b"it"), (b"a", b" long way from here")]
    rows = [torch.tensor(list(context + target))[:-1] for context, target in pairs]
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        log_p = model(batch).logits.log_softmax(-1)
        for row, (context, target) in enumerate(pairs):
            positions = range(len(context) - 1, len(context) + len(target) - 1)
            got = sum(log_p[row, t, byte] for t, byte in zip(positions, target, strict=True))
            loss = model(torch.tensor([list(context + target)]),
                         labels=torch.tensor([[-100] * len(context) + list(target)])).loss  # fmt: skip
            close(got, -loss * len(target))


# inference engines


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_foreign_attention_backend_sees_every_layer_and_its_arguments(make_model, ids, is_causal):
    """vLLM and SGLang put their own attention in place, for texts of any length laid end to end."""
    model = make_model(ReZeroModel, is_causal=is_causal, num_key_value_heads=2)
    lengths, seen = [12, 5, 3], []
    text = ids[:1]

    def attend(module, query, key, value, attention_mask, scaling, engine_state=None, **kwargs):
        seen.append((module.layer_idx, module.is_causal, engine_state, query.shape[1], key.shape[1]))
        pieces = [
            nn.functional.scaled_dot_product_attention(
                q, k, v, scale=scaling, is_causal=module.is_causal, enable_gqa=True
            )
            for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(pieces, 2).transpose(1, 2), None

    expected = torch.cat([model(piece).last_hidden_state for piece in text.split(lengths, 1)], 1)
    ALL_ATTENTION_FUNCTIONS["engine"] = attend
    try:
        model.set_attn_implementation("engine")
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        out = model(input_ids=text, position_ids=positions, use_cache=False, engine_state="blocks")
    finally:
        del ALL_ATTENTION_FUNCTIONS["engine"]
    close(out.last_hidden_state, expected)
    assert seen == [(i, is_causal, "blocks", 4, 2) for i in range(3)]


def test_what_the_transformers_backend_of_vllm_reads(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_rezero.ReZeroModel"
    assert model._supports_attention_backend and model.model._supports_attention_backend
    assert set(model.config.base_model_tp_plan.values()) <= {"colwise", "rowwise"}
    linear = {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    planned = {name.replace("*", str(i)) for name in model.config.base_model_tp_plan for i in range(3)}
    assert linear == planned, "a matrix without a plan would be copied to every rank"
    assert list(model.config.base_model_pp_plan) == [
        name for name, _ in model.model.named_children() if name != "rotary_emb"
    ]
    assert sum(isinstance(module, nn.ModuleList) for module in model.model.children()) == 1


def launcher_of_the_docs():
    """The launcher for `transformers serve`, as docs/compatibility.md prints it."""
    text = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
    lines = re.search(r"## Serving.*?\n\n((?:    [^\n]*\n|\n)+)", text, re.DOTALL)[1].splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines) + "\n"


def ask(port, folder):
    """One chat completion of eight tokens, once the server answers."""
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": "to be"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"content-type": "application/json"}
    for _ in range(120):
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            return json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"]
        except urllib.error.URLError:
            time.sleep(0.5)
    raise TimeoutError("the server does not answer")


def test_transformers_serve_alone_does_not_find_the_class_of_a_folder_even_where_it_trusts_its_code(
    make_model, tmp_path
):
    """Where a release finds it, the launcher of docs/compatibility.md can go."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi, uvicorn and openai")
    from transformers.cli.serving.model_manager import ModelManager

    make_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    manager = ModelManager(device="cpu", trust_remote_code=True)
    with pytest.raises(AttributeError, match="module transformers has no attribute ReZeroForCausalLM"):
        manager.load_model_and_processor(manager.process_model_name(str(tmp_path)))


def test_the_documented_launcher_serves_a_model(make_model, tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi, uvicorn and openai")
    model, tokenizer = make_model(initializer_range=1.0), byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    (tmp_path / "serve.py").write_text(launcher_of_the_docs())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", "serve", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            answer = ask(port, tmp_path)
        finally:
            server.terminate()
    ids = tokenizer("to be", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)


# tensor parallelism

TRAIN_IN_PARTS = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
import hf_rezero
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").train()
ids = torch.load(folder + "/ids.pt")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(3):
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())
shares = {type(p.data).__name__ for p in model.model.layers.parameters()}
assert shares == {"DTensor", "Tensor"}, shares
gates = torch.stack([p.detach() for n, p in model.named_parameters() if n.endswith("resweight")])
torch.save({"losses": torch.stack(losses), "gates": gates}, f"{folder}/rank{dist.get_rank()}.pt")
"""


@pytest.mark.parametrize("tied", [False, True])
def test_tensor_parallel_training_equals_one_process(make_model, ids, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied, num_key_value_heads=2, initializer_range=0.1).train()
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    run_workers(TRAIN_IN_PARTS, tmp_path, processes=2)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        losses.append(model(ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    gates = torch.stack([p.detach() for name, p in model.named_parameters() if name.endswith("resweight")])
    assert losses[2] < losses[0]
    for rank in range(2):
        result = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(result["losses"], torch.stack(losses).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["gates"], gates, rtol=1e-4, atol=1e-5)
