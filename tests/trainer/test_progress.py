"""The progress bar says bits per byte where the loss is one, and stays that of transformers elsewhere."""

import json
import math
import re

import pytest
from support.training import make_trainer
from transformers import ProgressCallback

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainingArguments
from hf_rezero.trainer.progress import BitsBar


def trainer_of(folder, vocab_size=264, callbacks=None, **options):
    model = ReZeroForCausalLM(
        ReZeroConfig(vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    args = ReZeroTrainingArguments(
        str(folder), max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True, report_to=[], **options
    )
    return make_trainer(model, args, callbacks=callbacks)


def bars(trainer):
    return [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]


def test_the_bar_says_bits_per_byte_of_each_logged_loss(tmp_path, capsys):
    trainer = trainer_of(tmp_path)
    trainer.train()
    shown = capsys.readouterr()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = [float(bits) for bits in re.findall(r"{'bpb': '([\d.]+)', 'loss'", shown.out)]
    assert told == pytest.approx([loss / math.log(2) for loss in losses], abs=1e-3) and len(told) == 2
    assert f"bpb={losses[-1] / math.log(2):.3f}" in shown.err
    assert "bpb" not in json.dumps(trainer.state.log_history)  # the log is what it was


def test_other_losses_keep_the_bar_of_transformers(tmp_path):
    assert bars(trainer_of(tmp_path)) == [BitsBar]
    assert bars(trainer_of(tmp_path, vocab_size=1000)) == [ProgressCallback]
    assert bars(trainer_of(tmp_path, label_smoothing_factor=0.1)) == [ProgressCallback]
    assert bars(trainer_of(tmp_path, disable_tqdm=True)) == []


def test_a_bar_of_the_caller_stays(tmp_path):
    class Own(ProgressCallback):
        pass

    assert Own in bars(trainer_of(tmp_path, disable_tqdm=True, callbacks=[Own()]))
