"""`hf-rezero classify-tokens`: which token carries the tag of a word, what is scored, and what is refused."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from support.launch import run_command
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertTokenizerFast,
    EvalPrediction,
)

from hf_rezero import byte_tokenizer
from hf_rezero.commands import classify_tokens
from hf_rezero.commands.classify_tokens import aligned, inside_tags, tokenize_words
from hf_rezero.commands.labels import Tags, with_metric
from hf_rezero.data import train_bpe


SHAPE = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
NAMES, PLACES, OTHERS = ["Anna", "Zoë", "Bob"], ["Paris", "Köln"], ["sees", "the", "rain", "in", "."]
TAGS = {
    **dict.fromkeys(NAMES, "B-PER"),
    **dict.fromkeys(PLACES, "B-LOC"),
    **dict.fromkeys(OTHERS, "O"),
    "York": "I-LOC",
}


def sentences(count, seed=0):
    """Rows of words; the tag of each is that of the word alone."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(list(TAGS), rng.integers(3, 8)).tolist() for _ in range(count)]
    return [{"tokens": words, "ner_tags": [TAGS[word] for word in words]} for words in rows]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder, **extra):
    values = {
        "train_file": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "config_overrides": SHAPE,
        "max_seq_length": 64,
        "max_steps": 60,
        "learning_rate": 1e-2,
        "do_train": True,
        "do_eval": True,
        "save_strategy": "no",
        "validation_split_percentage": 20,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "rows.jsonl", sentences(100))
    write(tmp_path / "test.jsonl", sentences(10, seed=1))
    return tmp_path


def by_hand(run, rows, names):
    """The logits at the first byte of each word, one text at a time, and the ids of their tags."""
    model, logits = AutoModelForTokenClassification.from_pretrained(run).eval(), []
    for row in rows:
        text = " ".join(row["tokens"]).encode()
        starts = [len(" ".join([*row["tokens"][:n], ""]).encode()) for n in range(len(row["tokens"]))]
        with torch.no_grad():
            logits.append(model(torch.tensor([list(text)])).logits[0, starts])
    return torch.cat(logits), torch.tensor([names.index(tag) for row in rows for tag in row["ner_tags"]])


def test_a_model_of_bytes_learns_the_tags_and_is_scored_at_the_first_byte_of_each_word(folder):
    test = {"test_file": folder / "test.jsonl", "validation_file": folder / "test.jsonl", "do_predict": True}
    metrics = classify_tokens.main(arguments(folder, max_steps=20, **test))
    names = ["B-LOC", "B-PER", "I-LOC", "O"]
    saved = json.loads((folder / "run" / "config.json").read_text())
    assert saved["id2label"] == {str(n): name for n, name in enumerate(names)}
    rows = sentences(10, seed=1)
    logits, labels = by_hand(folder / "run", rows, names)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics["eval_loss"] == metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    assert accuracy > 0.9 and metrics["eval_accuracy"] == pytest.approx(accuracy)
    lines = (folder / "run" / "predict_results.txt").read_text().splitlines()[1:]
    predicted = [line.split("\t")[1].split() for line in lines]
    assert [len(tags) for tags in predicted] == [len(row["tokens"]) for row in rows]
    assert [names.index(tag) for tags in predicted for tag in tags] == logits.argmax(-1).tolist()
    assert "token-classification" in (folder / "run" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_score_what_one_scores(folder):
    classify_tokens.main(arguments(folder, do_eval=None, max_steps=5))
    test = {"test_file": folder / "test.jsonl", "validation_file": folder / "test.jsonl", "do_train": None}
    test |= {"model_name_or_path": folder / "run", "config_overrides": None, "per_device_eval_batch_size": 3}
    test |= {"do_predict": True}
    one = classify_tokens.main(arguments(folder, **{**test, "output_dir": folder / "one"}))
    values = arguments(folder, **{**test, "output_dir": folder / "two"}, ddp_backend="gloo")
    run_command("classify_tokens", *values, processes=2)
    two = json.loads((folder / "two" / "all_results.json").read_text())
    assert all(two[f"eval_{key}"] == pytest.approx(one[f"eval_{key}"]) for key in ("loss", "accuracy", "macro_f1"))
    ours, theirs = ((folder / name / "predict_results.txt").read_text() for name in ("one", "two"))
    assert ours == theirs


def test_scores_are_those_of_their_definitions():
    tags, rng = Tags(["O", "B", "I", "never"]), np.random.default_rng(0)
    answers, labels = rng.integers(0, 3, (5, 9)), rng.integers(0, 3, (5, 9))
    labels[rng.random((5, 9)) < 0.3] = -100
    pairs = [(a, b) for a, b in zip(answers.ravel(), labels.ravel(), strict=True) if b >= 0]
    scores = []
    for tag in range(3):
        found, right = sum(a == tag for a, _ in pairs), sum(b == tag for _, b in pairs)
        both = sum(a == b == tag for a, b in pairs)
        precision, recall = both / found, both / right
        scores.append(2 * precision * recall / (precision + recall))
    accuracy = np.mean([a == b for a, b in pairs])
    assert tags.score(answers, labels) == pytest.approx({"accuracy": accuracy, "macro_f1": np.mean(scores)})


@pytest.fixture
def word_pieces(tmp_path):
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.", "the", "rain", "pa"]
    vocabulary += [f"##{piece}" for piece in [*"abcdefghijklmnopqrstuvwxyzëö", "ris", "na"]]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("length", [64, 9])
def test_tokens_of_bert_get_the_tags_that_run_ner_gives_them(word_pieces, all_tokens, length):
    names = ["B-LOC", "B-PER", "I-LOC", "O"]
    inside = inside_tags(names) if all_tokens else None
    assert inside_tags(names) == [2, 1, 2, 3]
    for row in sentences(20):
        expected = word_pieces(row["tokens"], is_split_into_words=True, truncation=True, max_length=length)
        labels, before = [], None
        for word in expected.word_ids():
            tag = row["ner_tags"][word] if word is not None else None
            later = {"B-LOC": "I-LOC"}.get(tag, tag) if all_tokens else None
            tag = tag if word != before else later
            labels.append(-100 if tag is None else names.index(tag))
            before = word
        ids, words = tokenize_words(row["tokens"], word_pieces, length)
        assert ids == expected.input_ids
        assert aligned(words, [names.index(tag) for tag in row["ner_tags"]], inside) == labels


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_each_word_starts_at_the_token_of_its_first_character(kind):
    words = ["Zoë", "sees", "New York", "the", "…", "Köln"]
    text = " ".join(words)
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe([text, "sees the rain"] * 5, 275)
    ids, word_of_token = tokenize_words(words, tokenizer, 512)
    assert ids == tokenizer(text).input_ids
    for n in range(len(words)):  # the tokens before hold the words before and no part of this one
        before = tokenizer.decode(ids[: word_of_token.index(n)])
        assert before.rstrip(" ") == " ".join(words[:n])


def test_a_pretrained_model_keeps_the_order_of_its_tags(folder, word_pieces):
    names = ["O", "B-PER", "B-LOC", "I-LOC"]
    config = BertConfig(
        vocab_size=70,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        id2label=dict(enumerate(names)),
        label2id={name: n for n, name in enumerate(names)},
    )
    BertForTokenClassification(config).save_pretrained(folder / "bert")
    word_pieces.save_pretrained(folder / "bert")
    own = {"model_name_or_path": folder / "bert", "config_overrides": None}
    metrics = classify_tokens.main(arguments(folder, **own, label_all_tokens=True))
    model = AutoModelForTokenClassification.from_pretrained(folder / "run")
    assert metrics["eval_accuracy"] > 0.7 and list(model.config.id2label.values()) == names
    assert AutoTokenizer.from_pretrained(folder / "run").get_vocab() == word_pieces.get_vocab()


def test_texts_of_csv_and_classes_of_parquet_give_the_same_rows(folder):
    rows = sentences(30)
    lines = "".join(f"{' '.join(row['tokens'])},{' '.join(row['ner_tags'])}\n" for row in rows)
    (folder / "rows.csv").write_text("tokens,ner_tags\n" + lines)
    names = ["O", "B-PER", "B-LOC", "I-LOC", "B-ORG"]  # the last in no row
    features = Features({"tokens": List(Value("string")), "pos_tags": List(ClassLabel(names=names))})
    numbered = [[names.index(tag) for tag in row["ner_tags"]] for row in rows]
    table = {"tokens": [row["tokens"] for row in rows], "pos_tags": numbered}
    Dataset.from_dict(table, features).to_parquet(folder / "rows.parquet")
    short = {"max_steps": 1, "do_predict": True, "test_file": folder / "words.jsonl"}
    write(folder / "words.jsonl", [{"tokens": row["tokens"]} for row in rows[:3]])
    written = {}
    for kind, extra in ((".csv", {}), (".parquet", {"task_name": "POS"})):
        out = folder / kind[1:]
        metrics = classify_tokens.main(
            arguments(folder, train_file=folder / f"rows{kind}", output_dir=out, **extra, **short)
        )
        written[kind] = json.loads((out / "config.json").read_text())["label2id"]
        assert not any(key.startswith("test") for key in metrics) and metrics["eval_loss"] < 3
        assert len((out / "predict_results.txt").read_text().splitlines()) == 4
    assert written[".csv"] == {"B-LOC": 0, "B-PER": 1, "I-LOC": 2, "O": 3}
    assert written[".parquet"] == {name: n for n, name in enumerate(names)}


def test_words_behind_the_length_are_told_and_have_no_tag(folder, capsys):
    write(folder / "test.jsonl", [{"tokens": ["Anna", "sees", "Köln"], "ner_tags": ["B-PER", "O", "B-LOC"]}])
    test = {"do_eval": None, "do_predict": True, "test_file": folder / "test.jsonl", "max_steps": 1}
    classify_tokens.main(arguments(folder, max_seq_length=9, **test))
    assert "1 words of the test part have no token: most are behind --max_seq_length 9." in capsys.readouterr().out
    assert (folder / "run" / "predict_results.txt").read_text().splitlines()[1].split("\t")[1].split()[2:] == ["_"]


MODULE = """
import datasets
import evaluate

class Spans(evaluate.Metric):
    def _info(self):
        value = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features({"predictions": value, "references": value}))

    def _compute(self, predictions, references):
        pairs = [(a, b) for p, r in zip(predictions, references) for a, b in zip(p, r)]
        people = [a == b for a, b in pairs if b == "B"]
        return {"B": {"recall": sum(people) / len(people), "number": len(people)}, "overall_f1": 0.25}
"""


@pytest.mark.parametrize("each", [False, True])
def test_a_module_that_reads_sequences_gets_the_names_of_the_words(tmp_path, each):
    (tmp_path / "spans").mkdir()
    (tmp_path / "spans" / "spans.py").write_text(MODULE)
    labels = np.array([[0, -100, 1, 1], [1, 0, -100, -100]])
    logits = np.eye(2)[np.array([[0, 1, 1, 0], [1, 1, 1, 1]])]
    found = with_metric(Tags(["O", "B"]), str(tmp_path / "spans"), each_entity=each)(EvalPrediction(logits, labels))
    more = {"B_recall": 2 / 3, "B_number": 3, "overall_f1": 0.25} if each else {"f1": 0.25}
    assert found == pytest.approx({"accuracy": 3 / 5, "macro_f1": found["macro_f1"], **more})


@pytest.mark.parametrize(("rows", "extra", "message"), [
    ([{"words": ["a"]}], {}, "the train part has no column 'tokens', only words: name the right one with --text_col"),
    ([{"tokens": ["a"], "tags": ["O"]}], {}, "no column 'ner_tags', only tokens, tags: name the right one with --label"),
    ([{"tokens": ["a"], "ner_tags": ["O"]}] * 2, {}, "holds 1 label, \\['O'\\]: two are needed"),
    ([{"tokens": ["a", "b"], "ner_tags": ["O", "B"]}, {"tokens": ["a", "b"], "ner_tags": ["B"]}], {"do_eval": None},
     "row 1 of the train part has 2 words and 1 tags: expected one tag a word"),
    ([{"tokens": [1], "ner_tags": ["O"]}], {}, "column 'tokens' of the train part holds .*int64.*: expected words"),
    ([{"tokens": ["a"], "ner_tags": [0.5]}], {}, "column 'ner_tags' holds .*: tags are lists of names or numbers"),
    (None, {"return_entity_level_metrics": True}, "needs what scores entities: give --metric_name seqeval"),
    (None, {"metric_name": "./nothing"}, "--metric_name ./nothing is no module that `evaluate` can load"),
])  # fmt: skip
def test_bad_input_gets_one_clear_error(folder, rows, extra, message):
    if rows:
        write(folder / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        classify_tokens.main(arguments(folder, validation_split_percentage=0 if rows else 20,
                                       **{**extra, **({"do_eval": None} if rows else {})}))  # fmt: skip
