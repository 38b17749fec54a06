"""The `evaluate` module: bits per byte by its equation, through batches, processes and what the README says."""

import math
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from huggingface_hub.repocard import RepoCard
from support.training import TEXT, make_trainer
from transformers import GPT2Config, GPT2LMHeadModel

from hf_rezero import ReZeroForCausalLM, metrics
from hf_rezero.data.windows import evaluation_windows
from hf_rezero.metrics.bits_per_byte.bits_per_byte import bits_per_byte
from hf_rezero.trainer.evaluation import token_nll


FOLDER = Path(metrics.__file__).parent / "bits_per_byte"
TEXTS = ["to be", "é", "2026", "", "ends"]  # 5 + 2 + 4 + 0 + 4 bytes; one that looks like a number, one without any
NATS = [[1.0, 2.5], [0.25], [3.0, 0.0, 1.5], [], [2.0]]
EXPECTED = 10.25 / math.log(2) / 15


@pytest.fixture
def metric(tmp_path):
    return metrics.load("bits_per_byte", cache_dir=str(tmp_path))


def test_the_equation():
    assert bits_per_byte(8 * math.log(2), 2) == 4
    assert bits_per_byte(0.0, 3) == 0
    assert bits_per_byte(math.inf, 3) == math.inf
    assert math.isnan(bits_per_byte(math.nan, 3))  # a diverged model shall not stop the run that evaluates it


@pytest.mark.parametrize(
    ("nats", "text", "came"), [(-1.0, "abc", "nats=-1.0"), (math.nan, "abc", "nats=nan"), (1.0, "", "0")]
)
def test_what_is_no_likelihood_or_no_text_is_refused(metric, nats, text, came):
    with pytest.raises(ValueError, match=f"{came}.*: expected"):
        metric.compute(predictions=[nats], references=[text])


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'bpb': expected one of bits_per_byte"):
        metrics.load("bpb")


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_totals_and_tokens_texts_and_counts_give_the_same(metric, per_token, counts):
    predictions = NATS if per_token else [sum(nats) for nats in NATS]
    references = [len(text.encode()) for text in TEXTS] if counts else TEXTS
    result = metric.compute(predictions=predictions, references=references)
    assert result == {"bits_per_byte": EXPECTED, "bytes": 15}
    assert type(result["bytes"]) is int


@pytest.mark.parametrize("first", [TEXTS[2], TEXTS[3]])
def test_a_text_that_looks_like_a_number_or_is_empty_may_come_first(metric, first):
    result = metric.compute(predictions=[1.0, 2.0], references=[first, "abc"])
    assert result["bytes"] == len(first) + 3


@pytest.mark.parametrize("convert", [np.array, torch.tensor, lambda values: torch.tensor(values, dtype=torch.float64)])
def test_arrays_and_tensors_are_taken(metric, convert):
    assert metric.compute(predictions=convert([1.5, 2.5]), references=convert([3, 5]))["bits_per_byte"] == (
        4 / math.log(2) / 8
    )


def test_batches_add_up_to_the_bit_in_any_cut(metric):
    generator = np.random.default_rng(0)
    nats, sizes = generator.exponential(50.0, 1000), generator.integers(1, 99, 1000)
    whole = metric.compute(predictions=nats, references=sizes)
    for start in range(0, 1000, 7):
        metric.add_batch(predictions=nats[start : start + 7], references=sizes[start : start + 7])
    assert metric.compute() == whole
    assert whole["bits_per_byte"] == math.fsum(nats) / math.log(2) / sizes.sum()


def test_examples_may_come_one_by_one(metric):
    for nats, text in zip(NATS, TEXTS, strict=True):
        metric.add(prediction=nats, reference=text)
    assert metric.compute()["bits_per_byte"] == EXPECTED


PROCESS = """
import sys, evaluate
sys.modules["hf_rezero"] = None  # importing it now raises ImportError
rank, folder = int(sys.argv[1]), sys.argv[3]
metric = evaluate.load(folder, cache_dir=sys.argv[2], num_process=2, process_id=rank, experiment_id="two")
metric.add_batch(predictions=[[1.0, 2.0], [4.0]][rank:][:1], references=["abc", "defgh"][rank:][:1])
print(metric.compute())
"""


def test_two_processes_add_up_without_this_library(tmp_path):
    command = [sys.executable, "-c", PROCESS]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), str(FOLDER)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert outputs[0][0].strip() == str({"bits_per_byte": 7 / math.log(2) / 8, "bytes": 8}), outputs[0][1]
    assert outputs[1][0].strip() == "None"


def test_the_trainer_reports_what_the_module_says(make_config, arguments, metric):
    model = ReZeroForCausalLM(make_config()).eval()
    trainer = make_trainer(model, arguments(), eval_dataset=evaluation_windows(TEXT[:300], 16))
    for window in trainer.eval_dataset:
        nats, predicted = token_nll(model(window["input_ids"][None]).logits, window["labels"][None])
        metric.add_batch(predictions=nats.detach(), references=predicted)
    expected = metric.compute()
    assert expected["bytes"] == 299
    assert trainer.evaluate()["eval_bpb"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def test_tokens_of_several_bytes_are_charged_to_their_bytes(metric):
    """A model that knows whole words: the same text, cut into fewer tokens, has its nats over the same bytes."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)).eval()
    ids = torch.tensor([[0, 7, 3, 9]])  # <bos> "the " "böse " "cat": 4 + 6 + 3 bytes
    log_p = model(ids).logits[0].double().log_softmax(-1)
    nats = [-log_p[t, ids[0, t + 1]].item() for t in range(3)]
    result = metric.compute(predictions=[nats], references=["the böse cat"])
    assert result["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / 13, rel=1e-12)


def test_the_examples_of_the_readme_run(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    exec("\n".join(blocks), names)
    assert names["result"]["bytes"] == 34 and 0 < names["result"]["bits_per_byte"] < 20


def test_the_folder_is_a_space():
    card = RepoCard.load(FOLDER / "README.md").data
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    assert {"evaluate", "metric"} <= set(card.tags)
    requirements = (FOLDER / "requirements.txt").read_text().split()
    assert any(line.startswith("evaluate") for line in requirements)
    assert "hf_rezero" not in (FOLDER / "bits_per_byte.py").read_text().replace("hf_rezero/", "")
    assert evaluate.load(str(FOLDER)).info.citation


def test_the_app_computes_what_the_module_does():
    from hf_rezero.metrics.bits_per_byte import app

    assert app.score("héllo", "1.5 2.5") == "0.9618 bits per byte over 6 bytes"
    assert "expected numbers" in app.score("abc", "a b")
    assert ": expected" in app.score("abc", "-1")
