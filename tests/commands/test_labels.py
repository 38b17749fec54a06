"""`hf-rezero classify-texts` for numbers, sets of classes and pairs of texts, in bytes and in tokens."""

import json

import numpy as np
import pytest
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_rezero import byte_tokenizer
from hf_rezero.commands import classify_texts, mlm
from hf_rezero.commands.labels import Numbers, Sets
from hf_rezero.data import train_bpe


SHAPE = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2"
rng = np.random.default_rng(0)


def arguments(folder, **extra):
    values = {
        "train_file": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "config_overrides": SHAPE,
        "max_seq_length": 24,
        "max_steps": 60,
        "learning_rate": 1e-2,
        "do_train": True,
        "do_eval": True,
        "save_strategy": "no",
        "validation_split_percentage": 25,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def write(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_fractions_are_a_regression(tmp_path):
    write(tmp_path, [{"sentence": "abcdefgh"[n % 8] * 5, "label": n % 8 / 8 - 0.5} for n in range(80)])
    metrics = classify_texts.main(arguments(tmp_path, do_predict=True, test_file=tmp_path / "rows.jsonl"))
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert (config.problem_type, config.num_labels) == ("regression", 1)
    assert metrics["eval_mse"] == pytest.approx(metrics["eval_loss"], rel=1e-5) and metrics["eval_pearson"] > 0.5
    lines = (tmp_path / "run" / "predict_results.txt").read_text().splitlines()
    assert len(lines) == 81 and float(lines[1].split("\t")[1]) == pytest.approx(-0.5, abs=0.4)


def test_lists_are_sets_of_classes(tmp_path):
    letters = "abc"
    rows = [{"sentence": "".join(letters[i] for i in range(3) if n >> i & 1) or "-"} for n in range(8)] * 10
    write(tmp_path, [{**row, "label": [c for c in letters if c in row["sentence"]]} for row in rows])
    metrics = classify_texts.main(arguments(tmp_path, do_predict=True, test_file=tmp_path / "rows.jsonl"))
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert (config.problem_type, config.id2label) == ("multi_label_classification", {0: "a", 1: "b", 2: "c"})
    assert metrics["eval_f1"] > 0.8 and metrics["eval_accuracy"] <= 1
    line = (tmp_path / "run" / "predict_results.txt").read_text().splitlines()[8]
    assert line.startswith("7\ta") and "," in line


@pytest.mark.parametrize("tokens", [False, True])
def test_pairs_are_told_apart_by_their_second_text(tmp_path, tokens):
    words = ["sun", "rain", "snow", "wind"]
    pairs = [(words[i], words[j]) for i in range(4) for j in range(4)] * 8
    rows = [{"sentence": a, "other": b, "label": "same" if a == b else "different"} for a, b in pairs]
    write(tmp_path, rows * 2)
    extra = {"text_pair_column_name": "other", "max_steps": 3}
    if tokens:
        train_bpe(words * 9, 290).save_pretrained(tmp_path / "bpe")
        extra["tokenizer_name"] = tmp_path / "bpe"
    metrics = classify_texts.main(arguments(tmp_path, **extra))
    assert 0 <= metrics["eval_accuracy"] <= 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    found = classify_texts.tokenize(["sun"], ["rain"], tokenizer, 24)["input_ids"][0]
    assert found == [*tokenizer("sun").input_ids, tokenizer.sep_token_id, *tokenizer("rain").input_ids]


@pytest.mark.parametrize(("a", "b", "cut"), [(3, 4, (3, 4)), (30, 4, (15, 4)), (4, 30, (4, 15)), (30, 30, (10, 9))])
def test_the_longer_text_of_a_pair_is_cut(a, b, cut):
    ids = classify_texts.tokenize(["a" * a], ["b" * b], byte_tokenizer(), 20)["input_ids"][0]
    assert (ids.count(97), ids.count(98)) == cut and ids[cut[0]] == byte_tokenizer().sep_token_id and len(ids) <= 20


def test_a_pretrained_encoder_gets_its_own_form_and_other_classes(tmp_path):
    tokenizer = train_bpe(["good bad film"] * 9, 290)
    tokenizer.save_pretrained(tmp_path / "bert")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=290, max_position_embeddings=24, num_labels=5, pad_token_id=3, **shape)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    write(tmp_path, [{"sentence": ("good", "bad")[n % 2] + " film", "label": n % 2} for n in range(80)])
    own = {"model_name_or_path": tmp_path / "bert", "config_overrides": None}
    metrics = classify_texts.main(arguments(tmp_path, ignore_mismatched_sizes=True, **own))
    assert metrics["eval_accuracy"] > 0.9
    with pytest.raises(ValueError, match="inputs of 50 tokens are longer than the position table"):
        classify_texts.main(
            arguments(tmp_path, output_dir=tmp_path / "b", max_seq_length=50, **own, ignore_mismatched_sizes=True)
        )


def test_a_decoder_without_padding_pads_with_its_end_token(tmp_path):
    tokenizer = train_bpe(["good bad film"] * 9, 290)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=290, n_embd=16, n_layer=1, n_head=2, n_positions=24)).save_pretrained(
        tmp_path / "gpt2"
    )
    write(tmp_path, [{"sentence": "film " * (n % 5) + ("good", "bad")[n % 2], "label": n % 2} for n in range(80)])
    own = {"model_name_or_path": tmp_path / "gpt2", "config_overrides": None}
    assert classify_texts.main(arguments(tmp_path, **own))["eval_accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "run").eos_token_id


MODULE = """
import datasets
import evaluate

class Flips(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features({"predictions": value, "references": value}))

    def _compute(self, predictions, references):
        return {"flips": sum(p != r for p, r in zip(predictions, references))}
"""


def test_a_module_of_evaluate_scores_beside_our_metrics(tmp_path):
    (tmp_path / "flips").mkdir()
    (tmp_path / "flips" / "flips.py").write_text(MODULE)
    write(tmp_path, [{"sentence": "ab"[n % 2] * 5, "label": n % 2} for n in range(80)])
    metrics = classify_texts.main(arguments(tmp_path, max_steps=2, metric_name=tmp_path / "flips"))
    assert metrics["eval_flips"] == round(20 * (1 - metrics["eval_accuracy"]))
    with pytest.raises(ValueError, match="--metric_name ./nothing is no module that `evaluate` can load"):
        classify_texts.main(arguments(tmp_path, output_dir=tmp_path / "b", metric_name="./nothing"))


def test_a_task_of_glue_names_its_data_set_and_columns():
    args = classify_texts.DataArguments(task_name="mrpc")
    assert (args.dataset_name, args.dataset_config_name) == ("nyu-mll/glue", "mrpc")
    assert (args.text_column_name, args.text_pair_column_name) == ("sentence1", "sentence2")
    with pytest.raises(ValueError, match="got --task_name glue: expected one of cola"):
        classify_texts.DataArguments(task_name="glue")


def test_scores_are_those_of_their_definitions():
    answers, right = rng.normal(size=50), rng.normal(size=50)
    scores = Numbers(["value"]).score(answers, right)
    assert scores["pearson"] == pytest.approx(np.corrcoef(answers, right)[0, 1])
    assert scores["mse"] == pytest.approx(np.mean((answers - right) ** 2))
    assert Numbers(["value"]).score(np.ones(5), right[:5])["pearson"] == 0
    answers, right = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]]), np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]])
    # 3 right ones, 1 too many, 1 missing
    assert Sets(["a", "b", "c"]).score(answers, right) == {"accuracy": pytest.approx(1 / 3), "f1": 0.75}


@pytest.mark.parametrize("kind", ["classify-texts", "mlm"])
def test_an_encoder_without_head_is_continued_pruned_and_loaded_by_auto_model(tmp_path, kind):
    """Packages of embeddings ship such: a `BertModel` with its tokenizer."""
    tokenizer = train_bpe(["good bad film"] * 9, 290)
    tokenizer.save_pretrained(tmp_path / "bert")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=290, max_position_embeddings=24, pad_token_id=tokenizer.pad_token_id, **shape)
    BertModel(config).save_pretrained(tmp_path / "bert")
    words = [("good", "bad")[n % 2] for n in range(400)]
    write(tmp_path, [{"sentence": f"{word} film", "text": f"{word} film", "label": word} for word in words])
    options = {"model_name_or_path": tmp_path / "bert", "config_overrides": None, "weight_decay": 0.1}
    options |= {"prune_method": "l1", "prune_targets": "heads,neurons", "prune_target_sparsity": 0.4}
    if kind == "mlm":
        mlm.main(arguments(tmp_path, max_seq_length=None, block_size=16, **options))
        auto_class, whole = AutoModelForMaskedLM, BertForMaskedLM(config)
    else:
        metrics = classify_texts.main(arguments(tmp_path, **options))
        auto_class, whole = AutoModelForSequenceClassification, BertForSequenceClassification(config)
    model = auto_class.from_pretrained(tmp_path / "run", trust_remote_code=True).eval()
    left = sum(p.numel() for p in model.bert.encoder.parameters())
    assert left < 0.8 * sum(p.numel() for p in whole.bert.encoder.parameters())
    if kind == "classify-texts":
        logits = model(
            **AutoTokenizer.from_pretrained(tmp_path / "run")(["good film", "bad film"], return_tensors="pt")
        )
        found = [model.config.id2label[i] for i in logits.logits.argmax(-1).tolist()]
        assert metrics["eval_accuracy"] == np.mean([a == b for a, b in zip(found, ["good", "bad"], strict=True)]) == 1
