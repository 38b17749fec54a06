"""The formulas of `scaling` against what processes keep and send, and against sums by hand."""

import sys

import pytest

from common.record import RESULTS, read_json
from hf_rezero import ReZeroConfig, ReZeroForCausalLM
from speed import scaling


SMALL = scaling.Shape(layers=3, width=32, tokens=32)


def test_parameters_are_those_of_the_model():
    config = ReZeroConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    assert sum(p.numel() for p in ReZeroForCausalLM(config).parameters()) == SMALL.parameters


@pytest.mark.parametrize("kind", scaling.KINDS)
def test_one_process_keeps_everything_and_sends_nothing(kind):
    assert scaling.kept(kind, SMALL, 1) == 16 * SMALL.parameters
    assert scaling.sent(kind, SMALL, 1) == 0


def test_formulas_by_hand():
    shape = scaling.Shape(layers=1, width=1, tokens=10)  # 13 parameters of the layer, 528 of embeddings and head
    assert scaling.kept("DDP", shape, 4) == 16 * 541
    assert scaling.kept("FSDP2", shape, 4, states=3) == 20 * 541 / 4
    assert scaling.kept("TP", shape, 4) == 16 * (1 + 540 / 4) + 4 * 264 * 3 / 4
    assert scaling.sent("DDP", shape, 4) == 2 * 0.75 * 4 * 541
    assert scaling.sent("FSDP2", shape, 4) == 0.75 * 4 * (3 * 541 - 264)
    assert scaling.sent("TP", shape, 4) == 0.75 * 4 * 10 * (2 * 8 + 264)


@pytest.mark.parametrize("kind", scaling.KINDS)
def test_two_processes_keep_and_send_what_the_formulas_say(kind, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    found = scaling.measured(kind, 2, SMALL)
    assert found["kept"] == pytest.approx(found["kept_by_formula"], rel=1e-3)
    assert found["sent"] == pytest.approx(found["sent_by_formula"], rel=1e-3)


def test_the_result_file_says_so_of_two_and_four_processes():
    rows = read_json(RESULTS / "scaling.json")["measured"]
    assert {(row["kind"], row["processes"]) for row in rows} == {(k, n) for k in scaling.KINDS for n in (2, 4)}
    for row in rows:
        assert row["kept"] == pytest.approx(row["kept_by_formula"], rel=1e-3)
        assert row["sent"] == pytest.approx(row["sent_by_formula"], rel=1e-3)
