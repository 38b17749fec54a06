"""`scripts/diagnose.py` as its users start it."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_rezero import ReZeroForCausalLM, ReZeroForTokenClassification, byte_tokenizer
from hf_rezero.commands import diagnose
from hf_rezero.diagnostics.jacobian import jacobian_spectrum


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 105, 5000).astype(np.uint8).tobytes())
    return path


@pytest.fixture
def checkpoint(make_config, tmp_path):
    ReZeroForCausalLM(make_config()).save_pretrained(tmp_path / "rezero")
    byte_tokenizer().save_pretrained(tmp_path / "rezero")
    return tmp_path / "rezero"


def bert(model_class, folder, **values):
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, **values}
    model_class(BertConfig(vocab_size=262, max_position_embeddings=40, **shape)).save_pretrained(folder)
    return folder


def run(model, out, *words):
    return diagnose.main([str(model), "--output_dir", str(out), "--disable_tqdm", *map(str, words)])


def assert_pictures(out, *names):
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "diagnostics.json"])
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" and (out / name).stat().st_size > 5000 for name in names)


def test_a_rezero_checkpoint_leaves_three_pictures_and_the_figures(text, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    diagnose.main([str(checkpoint), "--output_dir", str(out), "--train_file", str(text), "--length", "6"])
    done = capsys.readouterr()
    assert "Jacobian" in done.err and "gradients: 100%" in done.err  # the progress bar
    assert_pictures(out, "spectrum.png", "gradients.png", "resweights.png")
    found = json.loads((out / "diagnostics.json").read_text())
    assert list(found["gradients"]) == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "lm_head"]
    assert all(part["norm"] > 0 and part["relative_variance"] > 0 for part in found["gradients"].values())
    assert list(found["resweights"].values()) == pytest.approx([0.7] * 3)
    assert found["inputs"] == {"source": "text.txt", "length": 6, "size": 192, "labels": "the next token"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    data = torch.from_numpy(np.fromfile(text, dtype=np.uint8).astype(np.int64))
    sigma = jacobian_spectrum(model, {"input_ids": data[None, 4994:]})
    torch.testing.assert_close(torch.tensor(found["jacobian"]["singular_values"][3]).double(), sigma[0])
    assert f"mean {found['jacobian']['mean']:.3g}" in done.out and "3 residual weights: 0.7 on average" in done.out


def test_gradients_are_those_of_the_mean_loss_over_the_windows(text, checkpoint, tmp_path):
    words = ("--train_file", text, "--length", 2, "--batches", 2, "--batch_size", 2, "--block_size", 64)
    found = run(checkpoint, tmp_path / "out", *words)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    data = np.fromfile(text, dtype=np.uint8).astype(np.int64)
    ids = torch.from_numpy(np.stack([data[s : s + 64] for s in (0, 1645, 3290, 4936)]))
    model(input_ids=ids, labels=ids).loss.backward()
    norm = model.lm_head.weight.grad.norm().item()
    assert found["gradients"]["lm_head"]["norm"] == pytest.approx(norm, rel=1e-4)


def test_stock_gpt2_with_a_tokenizer_of_its_own(tmp_path):
    words = {word: i for i, word in enumerate("[UNK] a cat sat on the mat".split())}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "gpt2")
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 7}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    found = run(tmp_path / "gpt2", tmp_path / "out", "--text", "the cat sat on a mat " * 9, "--batches", 1)
    assert_pictures(tmp_path / "out", "spectrum.png", "gradients.png")
    assert found["inputs"] == {"source": "text", "length": 16, "size": 128, "labels": "the next token"}
    saved = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    assert saved["gradients"]["transformer.h.0"]["relative_variance"] is None and saved["resweights"] == {}


def test_masked_language_models_and_classifiers(text, make_config, tmp_path):
    folder = bert(BertForMaskedLM, tmp_path / "bert")
    found = run(folder, tmp_path / "a", "--train_file", text, "--length", 4)
    assert found["inputs"]["labels"] == "15 % masked tokens" and found["jacobian"]["mean"] > 0
    assert list(found["gradients"])[1] == "bert.encoder.layer.0"
    folder = bert(BertForSequenceClassification, tmp_path / "classifier", num_labels=3)
    assert run(folder, tmp_path / "b", "--train_file", text, "--length", 4)["inputs"]["labels"] == "random"
    ReZeroForTokenClassification(make_config(is_causal=False)).save_pretrained(tmp_path / "tokens")
    found = run(tmp_path / "tokens", tmp_path / "c", "--train_file", text, "--length", 4)
    assert found["gradients"]["model.layers.0"]["norm"] > 0


def test_masks_hide_the_tokens_that_are_asked_for(make_config):
    ids = torch.randint(0, 200, (8, 64))
    inputs, labels, _ = diagnose.label("BertForMaskedLM", ids, 261, make_config())
    hidden = labels != -100
    assert torch.equal(inputs == 261, hidden) and torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(inputs[~hidden], ids[~hidden]) and 0.08 < hidden.float().mean() < 0.25


@pytest.mark.parametrize("kind", ["noise", "file"])
def test_image_classifiers(tmp_path, kind):
    shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 1], "layer_type": "basic", "num_labels": 3}
    ResNetForImageClassification(ResNetConfig(**shape)).save_pretrained(tmp_path / "resnet")
    words = []
    if kind == "file":
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "images.npz", train_x=pixels, train_y=rng.integers(0, 3, 40, dtype=np.uint8))
        words = ["--train_file", tmp_path / "images.npz"]
    found = run(tmp_path / "resnet", tmp_path / "out", *words)
    assert_pictures(tmp_path / "out", "spectrum.png", "gradients.png")
    labels = "classes" if words else "random"
    source = "images.npz" if words else "noise"
    assert found["inputs"] == {"source": source, "shape": [3, 32, 32], "size": 3, "labels": labels}
    assert np.array(found["jacobian"]["singular_values"]).shape == (4, 3)


def test_large_models_get_moments_and_bounds(text, checkpoint, tmp_path, capsys):
    words = ("--train_file", text, "--length", 6, "--examples", 2)
    whole = run(checkpoint, tmp_path / "whole", *words)["jacobian"]
    found = run(checkpoint, tmp_path / "out", *words, "--max_size", 100)["jacobian"]
    assert_pictures(tmp_path / "out", "gradients.png", "resweights.png")
    assert np.mean(found["mean_square"]) == pytest.approx(whole["mean_square"], rel=0.3)
    assert 0.98 * whole["max"] < max(found["largest_at_least"]) <= whole["max"] + 1e-9
    assert min(found["smallest_at_most"]) >= whole["min"]
    assert "192 singular values, more than --max_size" in capsys.readouterr().out


def test_what_cannot_be_read_is_refused_before_anything_is_written(text, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        run(checkpoint, out, "--text", "a")
    with pytest.raises(ValueError, match="--length 99: the text has 5 tokens"):
        run(checkpoint, out, "--text", "abcde", "--length", 99)
    with pytest.raises(SystemExit):
        run(checkpoint, out, "--text", "abc", "--train_file", text)
    with pytest.raises(SystemExit):
        run(checkpoint, out, "--examples", 0)
    assert "--examples 0: expected at least 1" in capsys.readouterr().err
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 5000, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="no tokenizer, and vocab_size=5000"):
        run(tmp_path / "gpt2", out, "--train_file", text)
    shape = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic", "num_labels": 2}
    ResNetForImageClassification(ResNetConfig(**shape)).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="--text for a ResNet"):
        run(tmp_path / "resnet", out, "--text", "abc")
    np.savez(tmp_path / "few.npz", train_x=np.zeros((3, 8, 8), np.uint8), train_y=np.zeros(3))
    with pytest.raises(ValueError, match="holds 3 pictures, 32 are needed"):
        run(tmp_path / "resnet", out, "--train_file", tmp_path / "few.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="holds x: expected train_x and train_y"):
        run(tmp_path / "resnet", out, "--train_file", tmp_path / "other.npz")
    assert not out.exists()
