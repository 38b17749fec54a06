"""SIGTERM, SIGINT and SIGHUP: the step is finished and saved, and the resumed run ends with the weights of one never stopped."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launch import SCRIPTS, run_workers
from support.training import make_trainer, same, weights
from transformers import TrainerCallback

from hf_rezero import GradInitConfig, PruningConfig, ReZeroForCausalLM
from hf_rezero.initialization.gradinit import GradInit
from hf_rezero.trainer.checkpoints import fault_of
from hf_rezero.trainer.gradinit import state_file
from hf_rezero.trainer.stopping import SIGNALS, Interrupted


class Signals(TrainerCallback):
    """Sends a signal to its own process at an event of a step, counted from 1."""

    def __init__(self, event, step, number=signal.SIGTERM, times=1):
        self.event, self.step, self.number, self.times = event, step, number, times

    def send(self, event, state):
        if (event, state.global_step) == (self.event, self.step):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_step_begin(self, args, state, control, **kwargs):
        self.send("begin", state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.send("step", state)

    def on_step_end(self, args, state, control, **kwargs):
        self.send("end", state)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.send("evaluation", state)

    def on_save(self, args, state, control, **kwargs):
        self.send("save", state)


@pytest.fixture(autouse=True)
def signals_are_heard():
    """Whoever starts the tests with nohup, or behind &, lets them ignore signals, which a run then ignores too."""
    heard = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make(make_config, arguments, tmp_path):
    def make(name, *callbacks, gradinit=None, pruning=None, **values):
        torch.manual_seed(0)
        values = {"max_steps": 14, "hub_model_id": None, **values}  # 43 windows make 11 steps an epoch
        model = ReZeroForCausalLM(make_config(hidden_dropout=0.1, num_hidden_layers=2))
        args = arguments(output_dir=str(tmp_path / name), **values)
        return make_trainer(model, args, callbacks=list(callbacks), gradinit=gradinit, pruning=pruning)

    return make


RUNS = {
    "adamw": {},
    "ranger": {"optim": "ranger"},
    "lookahead+muon": {"optim": "lookahead+muon", "optim_args": "lookahead_k=3"},
    "l1": {"pruning": PruningConfig("l1", lambda_=0.05, start_step=2, end_step=8)},
    "l0": {"pruning": PruningConfig("l0", target_sparsity=0.3, start_step=2, end_step=8)},
}
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
STOPS = [
    ("adamw", 10, signal.SIGTERM),  # the last step of an epoch
    ("ranger", 5, signal.SIGINT),
    ("lookahead+muon", 6, signal.SIGHUP),  # in the middle of a cycle
    ("l1", 1, signal.SIGTERM),  # before the masks
    ("l1", 7, signal.SIGTERM),  # the last with masks
    ("l0", 5, signal.SIGTERM),
    ("l0", 10, signal.SIGTERM),  # without the removed units
]


@pytest.mark.parametrize(("name", "step", "number"), STOPS)
def test_a_signal_saves_its_step_and_the_run_goes_on_to_the_same_weights(make, name, step, number, caplog):
    whole = make("whole", **RUNS[name])
    whole.train()
    stopped = make("stopped", Signals("step", step, number), **RUNS[name])
    with pytest.raises(Interrupted) as caught:
        stopped.train()
    assert caught.value.code == STATUS[number]
    checkpoint = Path(stopped.args.output_dir, f"checkpoint-{step + 1}")
    said = f"{signal.Signals(number).name}: stopped after step {step + 1} of 14, which {checkpoint} holds. Go on with"
    assert fault_of(checkpoint) is None and said in caplog.text
    resumed = make("stopped", **RUNS[name])
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))


EVALUATIONS = {
    "steps": {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "best": {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "best",
        "metric_for_best_model": "bpb",
        "load_best_model_at_end": True,
    },
}
PLACES = [
    ("steps", "step", 5),
    ("steps", "end", 6),
    ("steps", "evaluation", 6),
    ("steps", "save", 6),
    ("epochs", "end", 11),
    ("epochs", "evaluation", 11),
    ("epochs", "save", 11),
    ("epochs", "end", 22),
    ("best", "evaluation", 12),
]


@pytest.mark.parametrize(("strategy", "event", "step"), PLACES)
def test_what_an_evaluation_would_have_told_is_told_when_the_run_is_resumed(make, strategy, event, step):
    def evaluations(trainer):
        kept = [{k: v for k, v in e.items() if k in ("step", "eval_bpb")} for e in trainer.state.log_history]
        return [entry for entry in kept if "eval_bpb" in entry]

    values = EVALUATIONS[strategy]
    whole = make("whole", **values)
    whole.train()
    stopped = make("stopped", Signals(event, step), **values)
    with pytest.raises(Interrupted):
        stopped.train()
    at = step + (event == "step")
    assert fault_of(Path(stopped.args.output_dir, f"checkpoint-{at}")) is None
    made = evaluations(stopped)
    assert all(entry["step"] < at or event == "save" for entry in made), "an evaluation was finished after the signal"
    resumed = make("stopped", **values)
    resumed.train(resume_from_checkpoint=True)
    if at < whole.state.global_step:
        assert evaluations(resumed) == evaluations(whole)
        assert resumed.state.best_metric == whole.state.best_metric
        assert resumed.state.best_global_step == whole.state.best_global_step
    assert same(weights(whole.model), weights(resumed.model))


def test_training_does_not_depend_on_evaluations(make):
    """Each draws a random number, and dropout reads the next."""
    found = []
    for values in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        trainer = make("run", **values)
        trainer.train()
        found.append(weights(trainer.model))
    assert same(*found)


@pytest.mark.parametrize("step", [0, 2])
def test_gradinit_is_left_after_its_step(make, monkeypatch, step, caplog):
    config = GradInitConfig(num_steps=6, save_steps=50)
    whole = make("whole", gradinit=config)
    whole.train()
    take = GradInit.step

    def signalled(self, *args):
        take(self, *args)
        if len(self.history) == step + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(GradInit, "step", signalled)
        make("stopped", gradinit=config).train()
    resumed = make("stopped", gradinit=config)
    path = state_file(resumed.args.output_dir)
    assert f"SIGTERM: stopped after step {step + 1} of 6 of GradInit, which {path} holds" in caplog.text
    assert len(torch.load(path)["gradinit"]["history"]) == step + 1
    resumed.train(resume_from_checkpoint=True)
    assert resumed.gradinit_report.scales == whole.gradinit_report.scales
    assert same(weights(whole.model), weights(resumed.model))


def test_a_second_ctrl_c_ends_at_once(make):
    trainer = make("run", Signals("step", 5, signal.SIGINT, times=2))
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    assert caught.value.code == 130 and not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_a_second_sigterm_does_not_break_the_save(make):
    trainer = make("run", Signals("step", 5, signal.SIGTERM, times=3))
    with pytest.raises(Interrupted):
        trainer.train()
    assert fault_of(Path(trainer.args.output_dir, "checkpoint-6")) is None


def test_the_handlers_of_others_are_theirs_again_and_what_is_ignored_stays_so(make):
    heard = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        make("ignored", Signals("step", 3, signal.SIGHUP)).train()
        make("off", Signals("step", 3, signal.SIGTERM), save_on_signal=False).train()
        assert heard == [signal.SIGTERM]
        with pytest.raises(Interrupted):
            make("on", Signals("step", 3, signal.SIGTERM)).train()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_training_in_a_thread_hears_no_signals(make):
    trainer = make("thread", max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(make, caplog):
    whole = make("whole", save_strategy="steps", save_steps=4)
    whole.train()

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                folder = Path(args.output_dir, "checkpoint-4")
                folder.mkdir()
                (folder / "config.json").write_text("{")  # in the middle of the first checkpoint
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("killed", Killed()).train()
    again = make("killed", save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=True)
    assert "holds no checkpoint yet, so the run starts over" in caplog.text
    assert same(weights(whole.model), weights(again.model))
    for checkpoint in Path(again.args.output_dir).glob("checkpoint-*"):
        (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="none of them is complete"):  # there is something to lose
        make("killed").train(resume_from_checkpoint=True)


def test_metrics_are_complete_where_a_run_was_killed_after_its_last_checkpoint(make):
    values = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 2}
    whole = make("whole", **values)
    expected = whole.train().metrics
    again = make("whole", **values)
    metrics = again.train(resume_from_checkpoint=True).metrics
    assert metrics["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    assert metrics["total_flos"] == whole.state.total_flos > 0 and metrics["epoch"] == expected["epoch"]
    again.save_metrics("train", metrics)
    assert make("whole", **values).train(resume_from_checkpoint=True).metrics == {}, "those that are saved stay"


COMMAND = """
import os, signal, sys
number = int(sys.argv.pop(1))
from transformers import TrainerCallback
from hf_rezero.commands import clm
from hf_rezero.trainer import trainer
from hf_rezero.commands.__main__ import main

class Signal(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), number)

make = trainer.ReZeroTrainer.__init__
def with_signal(self, *args, **kwargs):
    make(self, *args, **kwargs)
    self.add_callback(Signal())
trainer.ReZeroTrainer.__init__ = with_signal
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_exits_with_the_status_of_the_signal_and_nothing_looks_finished(tmp_path, number):
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes(bytes(range(97, 123)) * 60)
    options = {
        "train_file": text,
        "output_dir": folder,
        "config_overrides": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2",
        "block_size": 16,
        "max_steps": 6,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-c", COMMAND, str(int(number)), "clm", *arguments, "--do_train", "--do_eval"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == STATUS[number], done.stderr
    assert "Traceback" not in done.stderr and f"stopped after step 3 of 6, which {folder}/checkpoint-3" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    assert load_file(folder / "checkpoint-3" / "model.safetensors")


GROUP = """
import os, subprocess, sys
sys.path[:0] = [PATHS]
from support.training import make_trainer
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainingArguments
from transformers import TrainerCallback

class Signal(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            group = os.getpgid(0)
            assert group == os.getpid()  # of this run alone
            # from outside, as a batch system does
            subprocess.run([sys.executable, "-c", f"import os, signal; os.killpg({group}, signal.SIGTERM)"])

sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
args = ReZeroTrainingArguments(sys.argv[1], max_steps=100, per_device_train_batch_size=1, use_cpu=True, report_to=[],
                               disable_tqdm=True, dataloader_num_workers=2)
make_trainer(ReZeroForCausalLM(ReZeroConfig(**sizes)), args, callbacks=[Signal()]).train()
"""


def test_a_signal_to_all_processes_of_a_run_ends_none_that_loads_data(tmp_path):
    code = GROUP.replace("PATHS", f"{str(SCRIPTS.parent / 'tests')!r}, {str(SCRIPTS.parent)!r}")
    command = [sys.executable, "-c", code, tmp_path / "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    assert (
        fault_of(tmp_path / "run" / "checkpoint-3") is None and done.stderr.count("the run ends after this step") == 1
    )


TWO_RANKS = """
import os, signal, sys
from pathlib import Path
import torch
sys.path[:0] = [PATHS]
from support.training import make_trainer
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainingArguments
from hf_rezero.trainer.stopping import Interrupted
from transformers import TrainerCallback

class Signal(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

def train(name, callbacks, resume=None):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16, hidden_dropout=0.1)
    args = ReZeroTrainingArguments(f"{sys.argv[1]}/{name}", max_steps=6, per_device_train_batch_size=4, use_cpu=True,
                                   report_to=[], disable_tqdm=True, save_strategy="no")
    trainer = make_trainer(ReZeroForCausalLM(ReZeroConfig(**sizes)), args, callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Interrupted as ended:
        assert ended.code == 143 and trainer.state.global_step == 3, (ended.code, trainer.state.global_step)
        assert Path(args.output_dir, "checkpoint-3", "manifest.json").exists()
        return None
    return [p.detach().clone() for p in trainer.model.parameters()]

whole = train("whole", [])
assert train("stopped", [Signal()]) is None
resumed = train("stopped", [], resume=True)
assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
print("EQUAL")
"""


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    code = TWO_RANKS.replace("PATHS", f"{str(SCRIPTS.parent / 'tests')!r}, {str(SCRIPTS.parent)!r}")
    assert run_workers(code, tmp_path, processes=2).stdout.count("EQUAL") == 2
