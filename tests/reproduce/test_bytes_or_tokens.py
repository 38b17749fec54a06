"""Byte models against tokens, in small from end to end: equal compute, the same text scored, nothing run twice."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from common import byte_lm
from hf_rezero.data import evaluation_windows
from rezero import bytes_or_tokens


def run(monkeypatch, output, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", "--output", str(output), *map(str, words)])
    bytes_or_tokens.main()
    return json.loads(output.read_text())


def test_all_arms_cost_the_same_and_are_not_run_twice(tmp_path, monkeypatch):
    words = "".join(f"{'the rain in Spain falls mainly'.split()[i % 6]} {i} " for i in range(6000))
    (tmp_path / "text.txt").write_text(words)
    monkeypatch.setenv("HF_REZERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(bytes_or_tokens.SMOKE, "steps", 30)
    given = ["--train_file", tmp_path / "text.txt", "--smoke", "--arms", "bytes", "BPE, 1,024 tokens"]
    results = run(monkeypatch, tmp_path / "out.json", *given)
    by_bytes, by_tokens = results["runs"].values()
    a_step = by_tokens["flops"] / by_tokens["steps"]
    assert abs(by_bytes["flops"] - by_tokens["flops"]) <= a_step / 2
    assert by_tokens["bytes_of_a_token"] > 2 and by_bytes["steps"] == 30
    rows = bytes_or_tokens.table(results)
    assert len({len(row) for row in rows}) == 1 and rows[2][0] == "BPE, 1,024 tokens"
    monkeypatch.setattr(bytes_or_tokens, "train", None)
    assert run(monkeypatch, tmp_path / "out.json", *given)["runs"] == results["runs"]


def test_the_cost_of_a_token_is_that_of_its_products():
    layers, width, block, vocab = 2, 8, 16, 50
    of_the_layers = layers * (4 * width * width + 2 * 4 * width * width)  # q, k, v, o; up and down
    products = 2 * (of_the_layers + width * vocab) + 2 * 2 * layers * block * width
    assert bytes_or_tokens.flops_of_a_token(vocab, layers, width, block) == 3 * products  # backward is twice forward


def test_bits_per_byte_count_the_bytes_behind_tokens():
    ids, widths = np.arange(50, dtype=np.uint16), np.tile([1, 2, 5], 17)[:50].astype(np.uint8)
    windows = evaluation_windows(ids, 8, 4, widths)
    logits = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))  # of a token after each token

    def loss(batch):
        assert batch.keys() == {"input_ids", "labels"}
        scores = logits[batch["input_ids"][:, :-1]]
        return nn.functional.cross_entropy(scores.transpose(1, 2), batch["labels"][:, 1:])

    nats = sum(-logits[i].double().log_softmax(-1)[i + 1].item() for i in range(49))
    found = byte_lm.bits_per_byte(loss, windows, len(windows), 3)
    assert found == pytest.approx(nats / math.log(2) / int(widths[1:].sum()), rel=1e-6)
