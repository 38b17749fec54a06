"""`scripts/reproduce/pruning/pretrained.py`: arms in small from end to end, on small models in place of the pretrained."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pruning import pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small Llama and a small BERT, whose tokens are characters, and a text."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    words = ["[UNK]", "[PAD]", *"abcdefgh "]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).save_pretrained(folder / "llama")
    BertModel(BertConfig(vocab_size=11, **sizes)).save_pretrained(folder / "bert")
    for name in ("llama", "bert"):
        fast.save_pretrained(folder / name)
    text = np.random.default_rng(0).choice(list(b"abcdefgh "), 40_000).astype(np.uint8)
    (folder / "text.txt").write_bytes(text.tobytes())
    return folder


@pytest.fixture
def run(folders, monkeypatch):
    """Calls the script on these models, of which one is read from a GGUF file otherwise."""
    (folders / "llama" / "model.gguf").touch()
    for auto in (pretrained.AutoTokenizer, pretrained.AutoModelForCausalLM):
        load = auto.from_pretrained
        monkeypatch.setattr(
            auto, "from_pretrained", lambda name, gguf_file=None, load=load, **kwargs: load(name, **kwargs)
        )

    def call(*words):
        given = ["--smollm2", folders / "llama", "--minilm", folders / "bert", "--train_file", folders / "text.txt"]
        output = folders / "out.json"
        given += [
            "--output",
            output,
            "--figure",
            folders / "out.png",
            "--configs",
            folders / "configs",
            "--smoke",
            *words,
        ]
        monkeypatch.setattr(sys, "argv", ["run.py pretrained", *map(str, given)])
        pretrained.main()
        return json.loads(output.read_text())

    return call


def test_all_arms_run_and_none_twice(run, folders, monkeypatch):
    results = run()
    assert len(results["runs"]) == 2 * len(pretrained.METHODS) + 2 * (len(pretrained.METHODS) - 1)
    for key, arm in results["runs"].items():
        whole = results["tasks"][key.split(" | ")[0]]["parameters"]
        assert arm["removed"] == pytest.approx(1 - arm["parameters"] / whole, abs=1e-4)
    assert not any("minilm | layers" in key for key in results["runs"])
    rows = pretrained.table(results)
    assert len({len(row) for row in rows}) == 1 and len(rows) == 3 + len(results["runs"]) / 2
    assert (folders / "out.png").stat().st_size > 5000
    monkeypatch.setattr(pretrained, "train", None)
    assert run()["runs"] == results["runs"]
    timed = run("--timings")["runs"]
    assert all(arm.pop("time") > 0 for key, arm in timed.items() if key.endswith("| labels"))
    assert timed == results["runs"]


def arguments(folders):
    names = {"smollm2": folders / "llama", "minilm": folders / "bert", "train_file": folders / "text.txt"}
    return argparse.Namespace(**names, length=16, batch_size=2, windows=2)


@pytest.mark.parametrize("width", [False, True])
@pytest.mark.parametrize("made", [LlamaForCausalLM, BertModel])
def test_the_peer_removes_as_many_parameters(made, width):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = made(made.config_class(vocab_size=50, **sizes))
    ratio = pretrained.peer_ratio(model, width, 0.3)
    groups = pretrained.find_groups(model, ["heads", "neurons"])
    wanted = 0.3 * pretrained.Sizes(model, groups).prunable
    kept = 1 - ratio
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n}
    neurons = sum(p.numel() for n, m in linear.items() if "attention" not in n and "attn" not in n for p in [m.weight])
    rest = sum(p.numel() for p in model.parameters()) - neurons
    left = rest + kept * neurons if not width else kept * rest + kept**2 * neurons
    assert rest + neurons - left == pytest.approx(wanted, rel=0.02)


def test_the_peer_runs(run):
    pytest.importorskip("torch_pruning", reason="torch-pruning is compared by hand and no dependency of the tests")
    results = run("--methods", *pretrained.PEERS)
    for name in ("smollm2", "minilm"):
        removed = [arm["removed"] for key, arm in results["runs"].items() if key.startswith(f"{name} | Torch")]
        assert len(removed) == (4 if name == "smollm2" else 2) and max(removed) < 0.3 and min(removed) > 0


def test_bits_per_byte_are_those_of_the_predicted_tokens(run, folders):
    task = pretrained.Language(arguments(folders))
    ids, sizes = task.tokens(task.held_out[:1])
    assert ids.shape == (1, 16) and sizes == [15]  # a character is a token, and the first is not predicted
    nats = 0.0
    for text in task.held_out:
        ids, _ = task.tokens([text])
        logits = task.whole(ids).logits.detach().double().log_softmax(-1)
        nats -= sum(logits[0, i, ids[0, i + 1]].item() for i in range(15))
    expected = nats / np.log(2) / (15 * len(task.held_out))
    assert pretrained.quality(task, task.whole)["quality"] == pytest.approx(expected, abs=1e-3)


def test_the_whole_model_is_as_similar_as_can_be_to_itself(run, folders):
    task = pretrained.Embeddings(arguments(folders))
    assert pretrained.quality(task, task.whole)["quality"] == pytest.approx(1.0, abs=1e-4)
    batch = next(task.batches(np.random.default_rng(0)))
    first, second = task._both(task.whole, batch)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(len(first)))
    cosines = first @ second.T / 0.05
    expected = -torch.stack([row.log_softmax(0)[i] for i, row in enumerate(cosines)]).mean()
    torch.testing.assert_close(task.loss(task.whole, batch), expected)
    torch.testing.assert_close(task.taught(task.whole, batch), expected / 2, atol=1e-5, rtol=1e-4)
