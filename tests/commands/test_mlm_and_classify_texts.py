"""`scripts/run_mlm.py` and `scripts/run_classification.py`, from the command line's arguments to what a run leaves."""

import bz2
import gzip
import json
import lzma
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from support.launch import run_script
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, byte_tokenizer
from hf_rezero.commands import classify_texts as run_classification
from hf_rezero.commands import mlm as run_mlm
from hf_rezero.commands.labels import Classes, labels_of
from hf_rezero.commands.rows import read_file
from hf_rezero.commands.running import ModelArguments, load_model
from hf_rezero.data.windows import collate_bytes


TINY = "num_hidden_layers=2,hidden_size=16,num_attention_heads=2"
LEFT_BY_A_RUN = {"all_results.json", "config.json", "model.safetensors", "tokenizer.json", "training.png"}
MASK = 261
GOOD, BAD = ("a fine and warm film", "warm , fine , a joy"), ("a dull and cold film", "cold , dull , a bore")


def arguments(output_dir, **values):
    """A short run on the CPU; True is a flag and None leaves an argument out."""
    defaults = {
        "output_dir": output_dir,
        "config_overrides": TINY,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    items = [(name, value) for name, value in {**defaults, **values}.items() if value is not None]
    return [text for name, value in items for text in ([f"--{name}"] + ([] if value is True else [str(value)]))]


def results(folder):
    return json.loads(Path(folder, "all_results.json").read_text())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.bin"
    path.write_bytes(b"to be or not to be, that is the question. " * 100)
    return path


@pytest.fixture(scope="module")
def mlm_run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlm") / "run"
    values = {"do_train": True, "do_eval": True, "do_predict": True, "eval_on_start": True, "eval_strategy": "steps"}
    values |= {"max_steps": 60, "eval_steps": 30, "save_strategy": "steps", "save_steps": 30, "block_size": 32}
    return folder, run_mlm.main(arguments(folder, train_file=text, **values))


def write_rows(path, rows, header="sentence\tlabel"):
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n")
    return path


def reviews(count, labels=(0, 1)):
    """Easy texts: two words tell the label, an irrelevant number makes them differ in length."""
    return [((BAD, GOOD)[i % 2][i // 2 % 2] + f" {7**i % 1000}", labels[i % 2]) for i in range(count)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Files of texts with labels, and where `datasets` may keep its copies of them."""
    folder = tmp_path_factory.mktemp("tables")
    return {
        "train_file": write_rows(folder / "train.tsv", reviews(80)),
        "validation_file": write_rows(folder / "dev.tsv", reviews(24)),
        "test_file": write_rows(folder / "test.tsv", reviews(10)),
        "cache_dir": folder / "cache",
    }


@pytest.fixture(scope="module")
def classification_run(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification") / "run"
    values = {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 40, "eval_steps": 10}
    values |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 10, "load_best_model_at_end": "true"}
    values |= {"metric_for_best_model": "accuracy"}
    return folder, run_classification.main(arguments(folder, **tables, **values))


def test_mlm_learns_a_repetitive_text(mlm_run):
    folder, metrics = mlm_run
    state = json.loads((folder / "trainer_state.json").read_text())
    before, *_, after = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert before > 5 and after < before - 1
    for split in ("eval", "test"):
        assert metrics[f"{split}_perplexity"] == pytest.approx(math.exp(metrics[f"{split}_loss"]), rel=1e-5)
        assert results(folder)[f"{split}_perplexity"] == metrics[f"{split}_perplexity"]
    assert LEFT_BY_A_RUN | {"resweights.png"} <= {path.name for path in folder.iterdir()}


def test_mlm_checkpoint_evaluates_to_the_same_loss_again(mlm_run, text, tmp_path):
    folder, metrics = mlm_run
    values = {"model_name_or_path": folder, "config_overrides": None, "train_file": text, "block_size": 32}
    again = run_mlm.main(arguments(tmp_path / "again", do_eval=True, **values))
    assert again["eval_loss"] == metrics["eval_loss"]
    smaller = run_mlm.main(arguments(tmp_path / "b", do_eval=True, per_device_eval_batch_size=1, **values))
    for name in ("eval_loss", "eval_accuracy"):
        assert smaller[name] == pytest.approx(metrics[name], rel=1e-6)


def test_mlm_loss_is_that_of_the_masked_bytes(mlm_run, text):
    folder, metrics = mlm_run
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert not model.config.is_causal
    data = np.frombuffer(text.read_bytes(), dtype=np.uint8)
    validation = data[int(len(data) * 0.9) : int(len(data) * 0.95)]
    windows = run_mlm.MaskedBytes(validation, 32, 0.15, fixed=True)
    assert len(windows) > 4
    batch = collate_bytes(windows.__getitems__(range(len(windows))))
    log_p = model(batch["input_ids"]).logits.log_softmax(-1)
    rows, columns = torch.where(batch["labels"] != -100)
    nll = -log_p[rows, columns, batch["labels"][rows, columns]]
    assert nll.mean().item() == pytest.approx(metrics["eval_loss"], rel=1e-5)
    right = log_p[rows, columns].argmax(-1) == batch["labels"][rows, columns]
    assert right.float().mean().item() == pytest.approx(metrics["eval_accuracy"], rel=1e-6)


def test_bytes_are_masked_as_in_bert():
    data = np.random.default_rng(0).integers(0, 256, 200_000).astype(np.uint8)
    windows = run_mlm.MaskedBytes(data, 100, 0.15)
    batch = collate_bytes(windows.__getitems__(range(len(windows))))
    ids, labels = batch["input_ids"], batch["labels"]
    original = torch.from_numpy(data[: ids.numel()]).long().view_as(ids)
    chosen = labels != -100
    assert torch.equal(labels[chosen], original[chosen]) and torch.equal(ids[~chosen], original[~chosen])
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.005)
    assert (ids[chosen] == MASK).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (ids[chosen] == labels[chosen]).float().mean() == pytest.approx(0.1, abs=0.01)


def test_only_evaluation_masks_are_fixed(text):
    data = np.fromfile(text, dtype=np.uint8)
    fixed, fresh = (run_mlm.MaskedBytes(data, 32, 0.15, fixed=fixed) for fixed in (True, False))
    rows = range(len(fixed))
    first = collate_bytes(fixed.__getitems__(rows))
    fixed.set_epoch(1)
    copy = pickle.loads(pickle.dumps(fixed))
    batches = DataLoader(copy, batch_size=5, collate_fn=collate_bytes)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), first["input_ids"])
    assert torch.equal(fixed[3]["labels"], first["labels"][3])
    masks = [fresh.__getitems__(rows)[0]["labels"] != -100 for _ in range(2)]
    assert not torch.equal(*masks)
    assert not torch.equal(first["labels"][0] != -100, first["labels"][1] != -100)


def test_training_windows_move_with_the_epoch(text):
    windows = run_mlm.MaskedBytes(np.fromfile(text, dtype=np.uint8), 50, 0.01)
    before = windows[0]["input_ids"]
    windows.set_epoch(1)
    assert (windows[0]["input_ids"] != before).sum() > 10


def test_some_byte_is_always_to_be_predicted():
    windows = run_mlm.MaskedBytes(b"abcd" * 8, 4, 1e-6, fixed=True)
    assert [window["labels"].tolist() for window in windows] == [[97, -100, -100, -100]] * len(windows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mlm_probability": 0}, "mlm_probability=0.0: choose a part of the bytes"),
        ({"config_overrides": TINY + ",vocab_size=256"}, "knows 256 tokens: bytes and special tokens need 262"),
        (
            {"config_overrides": TINY + ",position_embedding_type=learned,max_position_embeddings=16"},
            "inputs of 32 bytes are longer than the position table, max_position_embeddings=16",
        ),
        ({"config_overrides": TINY + ",is_causal=true"}, "reads both sides"),
        ({"dataset_name": "enwik8"}, "exactly one of --dataset_name and --train_file"),
        ({"model_name_or_path": "somewhere"}, "--config_overrides shapes a new model"),
    ],
)
def test_mlm_refuses(text, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        run_mlm.main(arguments(tmp_path / "run", **{"train_file": text, "block_size": 32, "do_eval": True, **values}))


def test_mlm_has_no_eval_stride(tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)):
        run_mlm.main(arguments(tmp_path / "run", eval_stride=2))


def test_mlm_resumes_and_does_not_overwrite(mlm_run, text, tmp_path):
    folder = shutil.copytree(mlm_run[0], tmp_path / "run")
    values = {"train_file": text, "do_train": True, "block_size": 32, "max_steps": 64}
    with pytest.raises(ValueError, match="is not empty"):
        run_mlm.main(arguments(folder, **values))
    run_mlm.main(arguments(folder, resume_from_checkpoint="true", **values))
    state = json.loads((folder / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert steps == list(range(2, 65, 2))


def test_classification_learns(classification_run):
    folder, metrics = classification_run
    assert metrics["eval_accuracy"] > 0.9 and metrics["test_accuracy"] > 0.9
    assert results(folder)["eval_accuracy"] == metrics["eval_accuracy"]
    assert LEFT_BY_A_RUN | {"resweights.png", "predict_results.txt"} <= {path.name for path in folder.iterdir()}
    state = json.loads((folder / "trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert state["best_metric"] == max(accuracies) == metrics["eval_accuracy"]


def test_classification_checkpoint_predicts_the_same_without_padding(classification_run):
    folder, _ = classification_run
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.id2label == {0: "0", 1: "1"} and not model.config.is_causal
    lines = ["index\tprediction"]
    for index, (sentence, _) in enumerate(reviews(10)):
        logits = model(**tokenizer(sentence, return_tensors="pt")).logits
        lines.append(f"{index}\t{logits.argmax().item()}")
    assert (folder / "predict_results.txt").read_text().splitlines() == lines
    classify = pipeline("text-classification", str(folder), device="cpu")
    assert [answer["label"] for answer in classify([GOOD[0], BAD[1]])] == ["1", "0"]


def test_classification_evaluates_a_checkpoint_again(classification_run, tables, tmp_path):
    folder, metrics = classification_run
    values = {**tables, "model_name_or_path": folder, "config_overrides": None, "do_eval": True}
    again = run_classification.main(arguments(tmp_path / "again", **values))
    assert again["eval_loss"] == metrics["eval_loss"]
    padded = run_classification.main(
        arguments(tmp_path / "b", pad_to_max_length="true", max_seq_length=64, per_device_eval_batch_size=3, **values)
    )
    assert padded["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)


def test_classification_does_not_overwrite(classification_run, tables):
    with pytest.raises(ValueError, match="is not empty"):
        run_classification.main(arguments(classification_run[0], do_train=True, **tables))


def test_names_of_labels_are_kept_and_predicted(tables, tmp_path):
    labels = ("negative", "positive")
    train = write_rows(tmp_path / "train.csv", [])
    train.write_text("label,review\n" + "".join(f'{label},"{text}"\n' for text, label in reviews(40, labels)))
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"review": text}) + "\n" for text in GOOD + BAD))
    config = tmp_path / "args.yaml"
    config.write_text(f"train_file: {train}\ntext_column_name: review\nlearning_rate: 1e-2\nmax_steps: 40\n")
    values = {"learning_rate": None, "max_steps": None, "do_train": True, "do_predict": True, "test_file": test}
    folder = tmp_path / "run"
    values["cache_dir"] = tables["cache_dir"]
    metrics = run_classification.main([str(config), *arguments(folder, **values)])
    assert metrics == {} and not any(name.startswith("test") for name in results(folder))
    saved = json.loads((folder / "config.json").read_text())
    assert saved["label2id"] == {"negative": 0, "positive": 1}
    assert saved["id2label"] == {"0": "negative", "1": "positive"}
    predicted = [line.split("\t")[1] for line in (folder / "predict_results.txt").read_text().splitlines()[1:]]
    assert predicted == ["positive", "positive", "negative", "negative"]
    assert not list(folder.glob("*.tmp"))


def test_classification_starts_from_a_masked_model(mlm_run):
    source, names = mlm_run[0], {"id2label": {0: "bad", 1: "good", 2: "?"}, "label2id": {"bad": 0, "good": 1, "?": 2}}
    args = ModelArguments(model_name_or_path=str(source))
    model = load_model(args, AutoModelForSequenceClassification, 32, is_causal=False, **names)
    assert (model.config.num_labels, model.config.is_causal, model.config.label2id) == (3, False, names["label2id"])
    before = AutoModelForMaskedLM.from_pretrained(source).model.state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_classification_of_a_causal_model_ignores_the_padding(tables, tmp_path):
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "resweight_init": 0.5}
    ReZeroForCausalLM(ReZeroConfig(**shape)).save_pretrained(tmp_path / "causal")
    values = {**tables, "model_name_or_path": tmp_path / "causal", "config_overrides": None, "do_eval": True}
    losses = [
        run_classification.main(arguments(tmp_path / "run", per_device_eval_batch_size=size, **values))["eval_loss"]
        for size in (1, 8)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


QUOTED = 'an "odd" text'


@pytest.mark.parametrize("compress", [None, gzip, lzma, bz2])
@pytest.mark.parametrize("kind", [".tsv", ".csv", ".json", ".jsonl"])
def test_files_of_every_kind_give_the_same_rows(tmp_path, kind, compress):
    rows = [{"sentence": QUOTED, "label": 1}, {"sentence": "NA", "label": 0}]
    content = {
        ".tsv": f"sentence\tlabel\n{QUOTED}\t1\nNA\t0\n",
        ".csv": 'sentence,label\n"an ""odd"" text",1\nNA,0\n',
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(map(json.dumps, rows)),
    }[kind]
    ending = {None: "", gzip: ".gz", lzma: ".xz", bz2: ".bz2"}[compress]
    path = tmp_path / f"v1.2{kind}{ending}"
    path.write_bytes(compress.compress(content.encode()) if compress else content.encode())
    assert read_file(str(path), str(tmp_path / "cache")).to_list() == rows


def test_a_data_set_with_named_classes_keeps_their_order(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    folder = tmp_path / "data"
    folder.mkdir()
    train = {"text": list(GOOD + BAD) * 3, "label": [0, 0, 1, 1] * 3}
    Dataset.from_dict(train, features).to_parquet(folder / "train.parquet")
    Dataset.from_dict({"text": ["", ""], "label": [-1, -1]}, features).to_parquet(folder / "test.parquet")
    values = {
        "dataset_name": folder,
        "text_column_name": "text",
        "do_train": True,
        "do_predict": True,
        "do_eval": True,
    }
    values |= {"cache_dir": tmp_path / "cache", "validation_split_percentage": 25, "per_device_eval_batch_size": 1}
    metrics = run_classification.main(arguments(tmp_path / "run", **values))
    # the labels of the test part are hidden, and its texts are empty
    assert "eval_accuracy" in metrics and "test_loss" not in metrics
    first, second = (tmp_path / "run" / "predict_results.txt").read_text().splitlines()[1:]
    assert first in ("0\tpos", "0\tneg") and second == f"1\t{first[2:]}"
    table = Dataset.from_dict(train, features)
    assert labels_of(table, "label").names == ["pos", "neg"]


def test_the_cut_for_validation_hangs_on_nothing_but_the_rows():
    rows = Dataset.from_dict({"sentence": [str(i) for i in range(40)], "label": [0, 1] * 20})
    cuts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        cuts.append(run_classification.cut_validation({"train": rows}, 10))
    assert cuts[0]["validation"]["sentence"] == cuts[1]["validation"]["sentence"]
    assert len(cuts[0]["validation"]) == 4
    assert sorted([*cuts[0]["train"]["sentence"], *cuts[0]["validation"]["sentence"]]) == sorted(rows["sentence"])


def test_texts_are_cut_and_counted(tables):
    args = run_classification.DataArguments(max_train_samples=3, max_seq_length=4)
    table = Dataset.from_dict({"sentence": ["abcdefgh", "é", "c", "d"], "label": [5, -1, 5, 5]})
    encoded = run_classification.encode(table, "train", args, Classes(["-1", "5"]), byte_tokenizer())
    assert encoded.to_list() == [
        {"input_ids": list(b"abcd"), "labels": 1},
        {"input_ids": list("é".encode()), "labels": 0},
        {"input_ids": list(b"c"), "labels": 1},
    ]


TSV = {
    "train.tsv": "sentence\tlabel\na\t0\nb\t1\n",
    "other.tsv": "sentence\tlabel\na\t0\nb\t7\n",
    "header.tsv": "sentence\tlabel\n",
    "empty.tsv": "",
    "numbers.tsv": "sentence\tlabel\n1\t0\n2\t1\n",
    "single.tsv": "sentence\tlabel\na\t0\nb\t0\n",
    "unlabelled.tsv": "sentence\tlabel\na\t0\nb\t\n",
    "broken.json": '{"sentence": ',
    "null.jsonl": '{"sentence": null, "label": 0}\n{"sentence": "b", "label": 1}\n',
    "train.txt": "a 0",
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_file": None}, "exactly one of --dataset_name and --train_file"),
        ({"dataset_name": "sst2"}, "exactly one of --dataset_name and --train_file"),
        ({"text_column_name": "text"}, "train part has no column 'text', only sentence, label: .* --text_column_name"),
        ({"label_column_name": "class"}, "no column 'class', only sentence, label: .* --label_column_name"),
        ({"train_file": "train.txt"}, "train.txt is of type .txt: use .tsv, .csv, .json, .jsonl"),
        ({"train_file": "missing.tsv"}, "missing.tsv"),
        ({"train_file": "empty.tsv"}, "empty.tsv is empty, or cannot be read as .tsv"),
        ({"train_file": "header.tsv"}, "header.tsv is empty, or cannot be read as .tsv"),
        ({"train_file": "broken.json"}, "broken.json is empty, or cannot be read as .json: JSON parse error"),
        ({"train_file": "null.jsonl"}, "1 rows of the train part have no text in column 'sentence'"),
        ({"train_file": "numbers.tsv"}, "column 'sentence' of the train part is not text but .*int64"),
        ({"train_file": "single.tsv"}, r"column 'label' holds 1 label, \[0\]: two are needed"),
        ({"train_file": "unlabelled.tsv"}, "some training rows have no label in column 'label'"),
        ({"validation_file": "other.tsv"}, "validation part has the labels 7, .* those are 0, 1"),
        ({"test_file": "other.tsv", "do_predict": True}, "test part has the labels 7, .* those are 0, 1"),
        ({"do_predict": True}, "no rows for test: give --test_file"),
        ({"validation_split_percentage": 0}, "no rows for validation: give --validation_file"),
        ({"max_train_samples": 0, "do_train": True}, "the train part has no rows"),
    ],
)
def test_classification_refuses(tables, tmp_path, values, message):
    for name, content in TSV.items():
        (tmp_path / name).write_text(content)
    values = {"train_file": "train.tsv", "validation_split_percentage": 50, "do_eval": True, **values}
    values = {key: tmp_path / v if key.endswith("_file") and v else v for key, v in values.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_classification.main(arguments(tmp_path / "run", cache_dir=tables["cache_dir"], **values))


@pytest.mark.parametrize("script", [run_mlm, run_classification])
def test_help_names_the_arguments(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--max_train_samples" in shown and script.__doc__.splitlines()[0] in " ".join(shown.split())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_mlm", "run_classification"])
def test_two_processes_evaluate_as_one(mlm_run, classification_run, text, tables, tmp_path, script):
    folder, metrics = mlm_run if script == "run_mlm" else classification_run
    values = {"train_file": text, "block_size": 32} if script == "run_mlm" else {**tables, "do_predict": True}
    values |= {"model_name_or_path": folder, "config_overrides": None, "do_eval": True}
    run_script(f"{script}.py", *arguments(tmp_path / "run", ddp_backend="gloo", **values), processes=2)
    if script == "run_mlm":
        assert results(tmp_path / "run")["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    else:
        assert results(tmp_path / "run")["eval_accuracy"] == metrics["eval_accuracy"]
        ours, theirs = ((path / "predict_results.txt").read_text() for path in (folder, tmp_path / "run"))
        assert ours == theirs
