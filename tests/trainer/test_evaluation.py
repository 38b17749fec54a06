"""`eval_loss` and `eval_bpb`: one process and two give what is computed by hand, also where the data are uneven."""

import json
import math

import numpy as np
import pytest
import torch
from support.launch import run_function
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroForMaskedLM, ReZeroTrainer, ReZeroTrainingArguments
from hf_rezero.data import evaluation_windows, train_bpe
from hf_rezero.trainer.evaluation import Sums, predicted_items


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "resweight_init": 0.7}
GPT2 = {"vocab_size": 264, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 259}


def rows(count, *, ragged=True):
    """Sequences of 12 bytes, each with fewer of them to predict than the one before."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, 256, (count, 12), generator=generator)
    labels = ids.clone()
    for index in range(count if ragged else 0):
        labels[index, : index % 10] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def with_labels(labels):
    return [{**row, "labels": label} for row, label in zip(rows(len(labels)), labels, strict=True)]


PROSE = "the rain in Spain falls mainly on the plain; " * 4
BPE = train_bpe([PROSE], 290)
IDS = np.array(BPE(PROSE).input_ids, np.uint16)
WIDTHS = np.array([len(BPE.decode([token])) for token in IDS], np.uint8)
TOKENS = list(evaluation_windows(IDS, 12, 5, WIDTHS))

# name: model, data, options; on two processes with batches of 2 accelerate adds copies, to one of them or to both
CASES = {
    "gpt2, tokens": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2 | {"vocab_size": 600})), TOKENS, {}),
    "gpt2, tokens of unknown bytes": (
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2 | {"vocab_size": 600})),
        [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in TOKENS],
        {},
    ),
    "causal": (lambda: ReZeroForCausalLM(ReZeroConfig(**SHAPE)), rows(7), {}),
    "causal, few": (lambda: ReZeroForCausalLM(ReZeroConfig(**SHAPE)), rows(1), {}),
    "causal, smoothed": (lambda: ReZeroForCausalLM(ReZeroConfig(**SHAPE)), rows(7), {"label_smoothing_factor": 0.1}),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), rows(6), {}),
    "masked": (lambda: ReZeroForMaskedLM(ReZeroConfig(**SHAPE, is_causal=False)), rows(7), {}),
    "classes": (
        lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3)),
        with_labels(torch.tensor([0, 1, 2, 2, 1])),
        {},
    ),
    "regression": (
        lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=1)),
        with_labels(torch.linspace(-1, 9, 5)),
        {},
    ),
}


def make(name, folder):
    build, data, options = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    args = ReZeroTrainingArguments(
        str(folder), use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True, report_to=[], **options
    )
    return ReZeroTrainer(model, args, eval_dataset=data)


def by_hand(name, folder):
    """The mean over all items, from one sample at a time."""
    model, data, smoothing = make(name, folder).model, CASES[name][1], CASES[name][2].get("label_smoothing_factor", 0)
    total, items = 0.0, 0
    for row in data:
        logits, labels = model(row["input_ids"][None]).logits.double(), row["labels"]
        if name == "regression":
            total, items = total + (logits.squeeze() - labels).pow(2).item(), items + 1
            continue
        logits = logits[0, :-1] if name.startswith(("causal", "gpt2")) else logits[0].view(-1, logits.shape[-1])
        labels = labels[1:] if name.startswith(("causal", "gpt2")) else labels.view(-1)
        nll = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        total, items = total + nll.item(), items + int(labels.ne(-100).sum())
    return total / items


def worker(folder):
    """The metrics of every case, from the processes that torchrun started."""
    results = {name: make(name, folder).evaluate() for name in CASES}
    if torch.distributed.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_function(worker, folder, processes=2)
    return json.loads((folder / "two.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_mean_over_all_items_on_one_process_and_on_two(name, tmp_path, two_processes):
    expected = by_hand(name, tmp_path)
    assert make(name, tmp_path).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert two_processes[name]["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["causal", "causal, few", "gpt2"])
def test_bits_per_byte_are_the_loss_in_bits(name, tmp_path, two_processes):
    for metrics in (make(name, tmp_path).evaluate(), two_processes[name]):
        assert metrics["eval_bpb"] == pytest.approx(metrics["eval_loss"] / math.log(2), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2, tokens", "gpt2, tokens of unknown bytes"])
def test_bits_per_byte_of_tokens_count_the_bytes_behind_them(name, tmp_path, two_processes):
    nats = by_hand(name, tmp_path) * (len(IDS) - 1)
    assert len(IDS) < WIDTHS.sum() == len(PROSE)
    for metrics in (make(name, tmp_path).evaluate(), two_processes[name]):
        if name == "gpt2, tokens":
            assert metrics["eval_bpb"] == pytest.approx(nats / math.log(2) / (len(PROSE) - WIDTHS[0]), rel=1e-6)
            assert "eval_bits_per_token" not in metrics
        else:
            assert metrics["eval_bits_per_token"] == pytest.approx(nats / math.log(2) / (len(IDS) - 1), rel=1e-6)
            assert "eval_bpb" not in metrics
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / (len(IDS) - 1)), rel=1e-5)


def test_a_byte_model_and_a_model_of_bytes_as_tokens_have_the_same_bits_per_byte(tmp_path):
    """Tokens of one byte each, once as bytes and once as tokens that happen to be bytes."""
    trainer, text = make("gpt2", tmp_path), np.frombuffer(PROSE.encode(), np.uint8)
    as_bytes = trainer.evaluate(list(evaluation_windows(text, 12, 5)))
    as_tokens = trainer.evaluate(list(evaluation_windows(text, 12, 5, np.ones_like(text))))
    assert as_tokens["eval_bpb"] == as_bytes["eval_bpb"] and "eval_perplexity" not in as_bytes


def test_smoothing_changes_the_loss_and_not_the_bits(tmp_path):
    plain, smoothed = (make(name, tmp_path).evaluate() for name in ("causal", "causal, smoothed"))
    assert smoothed["eval_loss"] != plain["eval_loss"] and smoothed["eval_bpb"] == plain["eval_bpb"]


def test_a_batch_with_nothing_to_predict_does_not_hide_the_others(tmp_path):
    trainer = make("causal", tmp_path)
    empty = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows(2)]
    whole = trainer.evaluate(rows(4, ragged=False))["eval_loss"]
    assert trainer.evaluate(empty + rows(4, ragged=False))["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_a_loss_that_is_not_finite_is_not_left_out(tmp_path):
    trainer = make("causal", tmp_path)
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[int(rows(7)[0]["input_ids"][3])] = torch.nan
    assert math.isnan(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(("labels", "shifted", "items"), [
    (torch.tensor([[1, 2, -100], [3, -100, -100]]), False, 3),
    (torch.tensor([[1, 2, -100], [3, -100, -100]]), True, 1),
    (torch.tensor([4, -100, 5]), False, 2),
    (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), False, 2),
])  # fmt: skip
def test_items_of_a_loss(labels, shifted, items):
    assert predicted_items(labels, shifted) == items


def test_sums_of_one_process_are_its_own():
    assert Sums(1.5, 2, 3.5, 4).over_processes() == Sums(1.5, 2, 3.5, 4)
