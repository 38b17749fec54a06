"""`hf-rezero clm` and `mlm` in the tokens of a tokenizer: training, evaluation, killing, resuming, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.launch import run_command, run_workers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_rezero.commands import clm, mlm, tokenizer
from hf_rezero.commands.running import ModelArguments
from hf_rezero.commands.texts import DataArguments, open_stream
from hf_rezero.data import train_bpe


SHAPE = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,resweight_init=0.5"
WORDS = ["the", "rain", "in", "Spain", "falls", "mainly", "on", "plain", "déjà", "vu", "—", "3.14"]


def prose(seed, count):
    return " ".join(np.random.default_rng(seed).choice(WORDS, count)) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, its rows as a table, and a tokenizer that was trained on it."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("".join(prose(seed, 20) for seed in range(60)))
    (folder / "rows").mkdir()
    for part, seeds in (("train", range(50)), ("validation", range(50, 56))):
        rows = "".join(json.dumps({"passage": prose(seed, 20), "id": seed}) + "\n" for seed in seeds)
        (folder / "rows" / f"{part}.jsonl").write_text(rows)
    command = ["--train_file", f"{folder}/text.txt", "--vocab_size", "300", "--output_dir", f"{folder}/bpe"]
    tokenizer.main(command)
    return folder


def arguments(folder, output_dir, **extra):
    values = {
        "train_file": folder / "text.txt",
        "tokenizer_name": folder / "bpe",
        "output_dir": output_dir,
        "config_overrides": SHAPE,
        "block_size": 16,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "do_train": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "cache_dir": output_dir.parent / "cache",
        **extra,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def bits_by_hand(folder, model, text):
    """Bits per byte of a text, each token predicted once: windows of 16 tokens, 8 apart."""
    tokens = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokens(text).input_ids)
    nats, done = 0.0, 1
    for start in [*range(0, len(ids) - 16, 8), len(ids) - 16]:
        with torch.no_grad():
            log_p = model(ids[None, start : start + 16]).logits[0].double().log_softmax(-1)
        for position in range(done, start + 16):
            nats -= log_p[position - 1 - start, ids[position]].item()
        done = start + 16
    return nats / np.log(2) / (len(text.encode()) - len(tokens.decode(ids[:1]).encode()))


def test_a_run_on_tokens_reports_the_bits_per_byte_that_are_computed_by_hand(folder, tmp_path):
    out = tmp_path / "run"
    metrics = clm.main(arguments(folder, out, do_eval=True, do_predict=True))
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 304
    data = (folder / "text.txt").read_bytes()
    text = data[len(data) * 90 // 100 : len(data) * 95 // 100].decode(errors="ignore")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert metrics["eval_bpb"] == pytest.approx(bits_by_hand(out, model, text), rel=1e-5)
    assert metrics["eval_perplexity"] > 1 and metrics["test_bpb"] < metrics["test_perplexity"]
    card = (out / "README.md").read_text()
    assert "| bits per byte |" in card and "bytes behind the predicted tokens" in card
    assert f"windows of 16 tokens, stride 8, of {len(text.encode())} bytes" in card
    again = arguments(
        folder, tmp_path / "again", do_eval=True, do_train=None, tokenizer_name=None, config_overrides=None
    )
    assert clm.main([*again, "--model_name_or_path", str(out)])["eval_bpb"] == pytest.approx(metrics["eval_bpb"])


def test_rows_of_a_folder_train_and_evaluate_with_workers(folder, tmp_path):
    rows = {"train_file": None, "dataset_name": folder / "rows", "text_column_name": "passage", "do_eval": True}
    one, two = (
        clm.main(arguments(folder, tmp_path / str(n) / "run", preprocessing_num_workers=n, **rows)) for n in (1, 2)
    )
    assert one["eval_bpb"] == two["eval_bpb"]
    with pytest.raises(ValueError, match="'text' is not a column of text"):
        clm.main(arguments(folder, tmp_path / "run", **{**rows, "text_column_name": "text"}))


def test_two_processes_measure_what_one_measures(folder, tmp_path):
    options = {"do_eval": True, "eval_stride": 7, "max_steps": 8, "per_device_eval_batch_size": 3}
    run_command("clm", *arguments(folder, tmp_path / "one", **options))
    both = {**options, "per_device_train_batch_size": 2}
    run_command("clm", *arguments(folder, tmp_path / "two", **both), processes=2)
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    for key in ("eval_bpb", "eval_perplexity", "eval_loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_a_masked_model_trains_on_tokens_and_needs_one_for_the_mask(folder, tmp_path):
    metrics = mlm.main(arguments(folder, tmp_path / "run", do_eval=True))
    assert 4 < metrics["eval_loss"] < 8 and "eval_bpb" not in metrics
    backend = train_bpe([prose(0, 50)], 290)
    backend.mask_token = None
    backend.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no mask token: name another --tokenizer_name"):
        mlm.main(arguments(folder, tmp_path / "other", tokenizer_name=tmp_path / "bare"))


KILLED = """
import os, signal, sys
import torch
from hf_rezero.commands import clm
from hf_rezero.data import tokens

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

save = torch.save
if sys.argv[1] == "tokenizing":
    tokens._save = die
else:
    torch.save = lambda value, file, **options: die() if "checkpoint-8" in str(file) else save(value, file, **options)
clm.main(sys.argv[2:])
"""


def test_a_run_killed_while_it_tokenizes_and_while_it_trains_ends_with_the_same_weights(folder, tmp_path):
    options = {"max_steps": 12, "save_steps": 4}
    clm.main(arguments(folder, tmp_path / "whole" / "run", **options))
    out = tmp_path / "killed" / "run"
    for when, resume in (("tokenizing", {}), ("training", {})):
        command = [sys.executable, "-c", KILLED, when, *arguments(folder, out, **options, **resume)]
        assert subprocess.run(command, env={**os.environ}, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert (out / "checkpoint-4").exists() and not (out / "model.safetensors").exists()
    clm.main(arguments(folder, out, resume_from_checkpoint="true", **options))
    whole, resumed = (load_file(run / "model.safetensors") for run in (tmp_path / "whole" / "run", out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_validation_alone_is_enough_to_evaluate(folder, tmp_path):
    clm.main(arguments(folder, tmp_path / "run"))
    only = {"train_file": None, "validation_file": folder / "text.txt", "do_train": None, "do_eval": True}
    only |= {"model_name_or_path": tmp_path / "run", "config_overrides": None, "tokenizer_name": None, "dtype": "auto"}
    metrics = clm.main(arguments(folder, tmp_path / "again", **only))
    text = (folder / "text.txt").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert metrics["eval_bpb"] == pytest.approx(bits_by_hand(tmp_path / "run", model, text), rel=1e-5)


def test_a_foreign_model_goes_on_with_its_own_tokenizer(folder, tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokens = AutoTokenizer.from_pretrained(folder / "bpe")
    tokens.save_pretrained(tmp_path / "gpt2")
    own = {"model_name_or_path": tmp_path / "gpt2", "tokenizer_name": None, "config_overrides": None, "do_eval": True}
    metrics = clm.main(arguments(folder, tmp_path / "run", max_steps=30, **own))
    before = clm.main(arguments(folder, tmp_path / "before", do_train=None, **own))
    assert metrics["eval_bpb"] < before["eval_bpb"] - 0.2
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tokens.get_vocab()


@pytest.mark.parametrize(("extra", "message"), [
    ({"tokenizer_name": "/nowhere"}, "there is no tokenizer in --tokenizer_name /nowhere"),
    ({"config_overrides": SHAPE + ",vocab_size=200"}, "the model knows 200 tokens: the tokenizer has 300"),
    ({"config_overrides": SHAPE + ",position_embedding_type=learned,max_position_embeddings=8"},
     "inputs of 16 tokens are longer than the position table, max_position_embeddings=8"),
    ({"dtype": "float31"}, "got --dtype float31: expected auto, float32"),
    ({"block_size": 100000}, "the training part has .* one block needs 100000"),
    ({"train_file": None, "validation_file": "text.txt"}, "there is no file|the train part of the text is empty"),
    ({"validation_split_percentage": 0, "do_eval": True}, "the validation part of the text is empty: give --validation"),
])  # fmt: skip
def test_bad_input_gets_one_clear_error(folder, tmp_path, monkeypatch, extra, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        clm.main(arguments(folder, tmp_path / "run", **extra))
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_line_ends_can_be_left_out(folder, tmp_path):
    kept, dropped = (
        clm.main(
            arguments(folder, tmp_path / name, do_train=None, do_eval=True, tokenizer_name=None, keep_linebreaks=keep)
        )
        for name, keep in (("kept", True), ("dropped", False))
    )
    assert kept["eval_bpb"] != dropped["eval_bpb"]
    card = json.loads((tmp_path / "dropped" / "run.json").read_text())["evaluations"]["eval"]
    data = (folder / "text.txt").read_bytes()
    cut = data[len(data) * 90 // 100 : len(data) * 95 // 100]
    assert card["bytes"] == len(cut) - cut.count(b"\n")


@pytest.mark.parametrize("masked", [False, True])
def test_a_stream_trains_and_resumes_to_the_same_weights(folder, tmp_path, masked):
    """More steps than one pass has: the second pass is part of it."""
    rows = {"train_file": None, "dataset_name": folder / "rows", "text_column_name": "passage", "do_eval": True}
    options = {**rows, "streaming": True, "shuffle_buffer_size": 7, "max_steps": 60, "save_steps": 50}
    command = mlm if masked else clm
    whole = command.main(arguments(folder, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-50", tmp_path / "half" / "checkpoint-50")
    half = command.main(arguments(folder, tmp_path / "half", resume_from_checkpoint="true", **options))
    assert half["eval_loss"] == whole["eval_loss"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    if not masked:
        kept = clm.main(
            arguments(
                folder,
                tmp_path / "kept",
                **{**rows, "do_train": None, "config_overrides": None},
                model_name_or_path=tmp_path / "whole",
            )
        )
        assert kept["eval_bpb"] == pytest.approx(whole["eval_bpb"], rel=1e-6)


READS_A_STREAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from hf_rezero import ReZeroTrainer
from hf_rezero.commands import clm

torch.set_num_threads(1)
folder, seen = Path(sys.argv[1]), []
arguments, dies = json.loads((folder / "arguments.json").read_text())
save, step = torch.save, ReZeroTrainer.training_step

def dying(value, file, **options):
    return os.kill(os.getpid(), signal.SIGKILL) if "checkpoint-50" in str(file) else save(value, file, **options)

def recording(self, model, inputs, *others):
    seen.append(inputs["input_ids"].clone())
    return step(self, model, inputs, *others)

torch.save = dying if dies else save
ReZeroTrainer.training_step = recording
clm.main(arguments)
save(torch.stack(seen), folder / f"seen-{os.environ['RANK']}.pt")
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_read_different_documents_and_a_killed_stream_ends_with_the_same_weights(folder, tmp_path):
    rows = {"train_file": None, "dataset_name": folder / "rows", "text_column_name": "passage", "do_eval": True}
    options = {**rows, "streaming": True, "shuffle_buffer_size": 7, "max_steps": 60, "save_steps": 25}
    options |= {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}

    def run(name, dies=False, **more):
        command = arguments(folder, tmp_path / name / "run", **options, **more)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "arguments.json").write_text(json.dumps([command, dies]))
        run_workers(READS_A_STREAM, tmp_path / name, processes=2, succeeds=not dies)

    run("whole")
    args = DataArguments(str(folder / "rows"), text_column_name="passage", block_size=16, shuffle_buffer_size=7)
    stream = open_stream(
        args, ModelArguments(cache_dir=str(tmp_path)), AutoTokenizer.from_pretrained(folder / "bpe"), 42
    )
    windows = torch.stack([window["input_ids"] for window in islice(stream, 60 * 4)]).view(60, 4, 16)
    first, second = (torch.load(tmp_path / "whole" / f"seen-{rank}.pt") for rank in (0, 1))
    assert torch.equal(torch.cat([first, second], 1), windows)

    evaluate = {**rows, "do_train": None, "config_overrides": None, "model_name_or_path": tmp_path / "whole" / "run"}
    alone = clm.main(arguments(folder, tmp_path / "alone", **evaluate))
    whole = json.loads((tmp_path / "whole" / "run" / "all_results.json").read_text())
    assert whole["eval_bpb"] == pytest.approx(alone["eval_bpb"], rel=1e-6)

    run("killed", dies=True)
    assert (tmp_path / "killed" / "run" / "checkpoint-25").exists()
    assert not (tmp_path / "killed" / "run" / "model.safetensors").exists()
    run("killed", resume_from_checkpoint="true")
    one, two = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_buffer_shuffles_and_the_seed_says_how(folder, tmp_path):
    tokens, found = train_bpe([prose(0, 9)], 270), {}
    for name, size, seed in (("a", 7, 0), ("b", 7, 0), ("in order", 0, 0), ("other seed", 7, 3)):
        args = DataArguments(str(folder / "rows"), text_column_name="passage", block_size=16, shuffle_buffer_size=size)
        stream = open_stream(args, ModelArguments(cache_dir=str(tmp_path)), tokens, seed)
        found[name] = torch.stack([window["input_ids"] for window in islice(stream, 9)])
    assert torch.equal(found["a"], found["b"])
    assert not torch.equal(found["a"], found["in order"]) and not torch.equal(found["a"], found["other seed"])


@pytest.mark.parametrize(("extra", "message"), [
    ({"max_steps": -1}, "a stream has no known end: give --max_steps"),
    ({"text_column_name": "words"}, "have no column 'words', but passage, id: name the right one with"),
    ({"do_predict": True}, "has the splits train, validation and none called test, which cannot be cut from a stream"),
    ({"dataset_name": None, "train_file": "text.txt"}, "text.txt has no rows to stream"),
    ({"block_size": 100000}, "the stream ended after .* tokens, and a window needs 100000"),
])  # fmt: skip
def test_bad_streams_get_one_clear_error(folder, tmp_path, monkeypatch, extra, message):
    monkeypatch.chdir(folder)
    rows = {"train_file": None, "dataset_name": "./rows", "text_column_name": "passage", "streaming": True}
    with pytest.raises(ValueError, match=message):
        clm.main(arguments(folder, tmp_path / "run", **{**rows, **extra}))
