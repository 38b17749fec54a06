"""What a run does at a signal to end: it finishes its step, saves a checkpoint, says where, and ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from transformers.utils import logging

from ..structure.kept import random_numbers_kept


logger = logging.get_logger(__name__)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class Interrupted(SystemExit):
    """A signal has ended the run, which can be resumed.

    The exit status is that which a shell shows of a process that the signal ends: 128 and the number of the signal,
    so 143 for SIGTERM, 130 for SIGINT (Ctrl-C) and 129 for SIGHUP.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)


class _Abandoned(BaseException):
    """An evaluation inside of the training was given up; the training loop is left, and the step saved."""


@contextmanager
def signals_to(handle: Callable[[int], None]) -> Iterator[None]:
    """Let the signals that end a run call `handle` inside the block; those that are ignored, as by nohup, stay so."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, lambda received, frame: handle(received))
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


def ended_by_signals():
    """Inside the block a signal raises `Interrupted` at once, so that what is open is closed and what is held, released."""

    def leave(number: int) -> None:
        raise Interrupted(number)

    return signals_to(leave)


class Stop:
    """Whether a signal asks a run to end, on any of its processes."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.number, self.pid = accelerator, 0, os.getpid()

    def hear(self, number: int) -> None:
        """Note a signal; a second Ctrl-C ends a run of one process at once."""
        if os.getpid() != self.pid:  # a process that loads data, and ends with the run
            return
        if self.number == number == signal.SIGINT and self.accelerator.num_processes == 1:
            raise Interrupted(number)
        if not self.number:
            # not by `print` or the logger: they might just be writing, and must not be entered twice
            message = f"\n{signal.Signals(number).name}: the run ends after this step, with a checkpoint.\n"
            os.write(2, message.encode())
        self.number = self.number or number

    @contextmanager
    def heard(self, wanted: bool) -> Iterator[None]:
        """Note signals inside the block, where that is wanted."""
        self.number = 0
        if not wanted:
            yield
            return
        with signals_to(self.hear):
            yield

    def is_asked(self) -> bool:
        """Whether any process was asked to end; all must call this, and all get the same answer."""
        if self.accelerator.num_processes > 1:
            number = torch.tensor([self.number], device=self.accelerator.device)
            self.number = int(self.accelerator.gather(number).max())
        return bool(self.number)

    def leave(self, what: str) -> None:
        """Say what was saved, and end.

        Raises:
            Interrupted: Always.
        """
        if self.accelerator.is_main_process:
            name = signal.Signals(self.number).name
            logger.warning(f"{name}: stopped after {what}. Go on with --resume_from_checkpoint true.")
        raise Interrupted(self.number)


class StoppableTrainer(Trainer):
    """The `Trainer`, which ends at SIGTERM, SIGINT and SIGHUP with a checkpoint of the step that it was in.

    An evaluation leaves the random numbers of the training as they were. So it can be given up, and be made when the
    run is resumed, and the weights do not depend on when and how often there was one.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop = Stop(self.accelerator)
        self.saved_step = 0
        if self.args.save_on_signal:
            self.add_callback(_StopCallback(self))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluate, with random numbers that the training does not see."""
        devices: Sequence = [self.args.device] if self.args.device.type == "cuda" else []
        with random_numbers_kept(devices):
            return super().evaluate(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The batches of the training, loaded by processes that a signal to all of a run does not end."""
        loader = super().get_train_dataloader()
        read = getattr(loader, "base_dataloader", loader)  # the one inside of that of accelerate starts the processes
        if self.args.save_on_signal and getattr(read, "num_workers", 0):
            read.worker_init_fn = partial(_deaf_worker, read.worker_init_fn)
        return loader

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.saved_step = self.state.global_step

    def stoppable(self, train: Callable):
        """The result of `train()`, which a signal ends after the step that it comes in.

        Raises:
            Interrupted: A signal came; a checkpoint is saved.
        """
        self.saved_step = 0
        with self.stop.heard(self.args.save_on_signal):
            try:
                result = train()
                if not self.args.save_on_signal or not self.stop.is_asked():
                    return result
            except _Abandoned:
                step = self.state.global_step
                self.state.log_history = [e for e in self.state.log_history if not _is_evaluation(e, step)]
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)
            return self.leave()

    def leave(self) -> None:
        """Say where the last step is saved, and end.

        Raises:
            Interrupted: Always.
        """
        step = self.state.global_step
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        self.stop.leave(f"step {step} of {self.state.max_steps}, which {folder} holds")


def _deaf_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Set up a process that loads data: PyTorch takes its end for an error, and ends it with the run."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)


class _StopCallback(TrainerCallback):
    """Ends the training loop where a checkpoint is whole, and makes up for the evaluation that was left out there."""

    def __init__(self, trainer: StoppableTrainer):
        self.trainer, self.is_first = trainer, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_first = state.global_step > 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.is_first and evaluation_is_due(args, state):
            self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None)
        self.is_first = False

    def on_step_end(self, args, state, control, **kwargs):
        if (
            not _ends_epoch(state) and self.trainer.stop.is_asked()
        ):  # at the end of an epoch a checkpoint may come anyway
            self._stop(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.stop.is_asked():
            self._stop(state, control)

    def _stop(self, state: TrainerState, control: TrainerControl) -> None:
        if self.trainer.saved_step == state.global_step:
            self.trainer.leave()
        control.should_evaluate, control.should_save = False, True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.is_in_train and self.trainer.stop.is_asked():
            raise _Abandoned

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.stop.is_asked():
            self.trainer.leave()


def evaluation_is_due(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the arguments ask for an evaluation after the step of `state`, and its log has none."""
    if any(_is_evaluation(entry, state.global_step) for entry in state.log_history):
        return False
    flow, control = DefaultFlowCallback(), TrainerControl()
    flow.on_step_end(args, state, control)
    if _ends_epoch(state):
        flow.on_epoch_end(args, state, control)
    return control.should_evaluate


def _is_evaluation(entry: dict, step: int) -> bool:
    return entry.get("step") == step and any(name.startswith("eval_") for name in entry)


def _ends_epoch(state: TrainerState) -> bool:
    return abs(state.epoch - round(state.epoch)) < 1e-6
