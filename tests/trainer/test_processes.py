"""A process that hangs or dies ends the others, in time and with a message."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from support.launch import run_function
from support.training import make_trainer
from transformers import TrainerCallback

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainingArguments
from hf_rezero.trainer.processes import LostProcessError, names_lost_processes


TIMEOUT = 5


class At(TrainerCallback):
    """Does something on the second process when its second step begins."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            self.action()


def train(folder, action):
    """Train until the action, and note how long the first process waited for the second."""
    # a process that hangs and hears signals is killed by torchrun half a minute later
    options = {"max_steps": 3, "use_cpu": True, "ddp_timeout": TIMEOUT, "save_on_signal": False, "report_to": []}
    args = ReZeroTrainingArguments(str(folder / "run"), **options)
    model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    trainer = make_trainer(model, args, callbacks=[At(action)])
    start = time.monotonic()
    try:
        trainer.train()
    finally:
        Path(folder, f"seconds{args.process_index}").write_text(str(time.monotonic() - start))


def hang(folder):
    train(folder, lambda: time.sleep(600))


def die(folder):
    train(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(("worker", "least"), [(hang, TIMEOUT), (die, 0)])
def test_a_process_that_hangs_or_dies_ends_the_others_with_a_message(worker, least, tmp_path):
    done = run_function(worker, tmp_path, processes=2, timeout=120, succeeds=False)
    assert "process 0 of 2 lost another one after step 1" in done.stderr
    assert f"has not answered for {TIMEOUT} s (--ddp_timeout)" in done.stderr
    assert least <= float((tmp_path / "seconds0").read_text()) < least + 20  # torch alone waits for half an hour


@pytest.mark.parametrize(("error", "named"), [
    (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
    (torch.distributed.DistNetworkError("connection reset"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
])  # fmt: skip
def test_errors_of_other_kinds_stay_what_they_are(error, named, make_config, arguments):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments())

    @names_lost_processes
    def method(trainer):
        raise error

    with pytest.raises(RuntimeError) as raised:
        method(trainer)
    assert isinstance(raised.value, LostProcessError) == named and (raised.value is error) != named
