"""Runs in forked processes, which have imported all already, and places in them at which they are killed."""

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers.modeling_utils
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hf_rezero import ReZeroTrainer
from hf_rezero.initialization.gradinit import GradInit


KILLED = -signal.SIGKILL
SECONDS = 180  # a run that takes longer hangs


@dataclass
class Outcome:
    """How a process ended: its exit status, minus the signal for one that was killed, and what it wrote."""

    status: int
    text: str

    @property
    def is_raw(self) -> bool:
        """Whether it ended with a traceback."""
        return "Traceback (most recent call last)" in self.text


def forked(run: Callable[[], object], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Start `run` in a process of its own, whose output goes to the file `log`; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= environment or {}
        run()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        print(error.code if isinstance(error.code, str) else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, log: Path, seconds: float = SECONDS) -> Outcome:
    """Wait for a process; one that hangs is ended, and counts as killed."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return Outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))


def run(main: Callable[[], object], log: Path) -> Outcome:
    """The outcome of one process."""
    return ended(forked(main, log), log)


def run_ranks(main: Callable[[], object], log: Path, processes: int = 2) -> list[Outcome]:
    """The outcomes of processes that are joined by gloo; where one ends, the others are given half a minute, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    logs = [log.with_suffix(f".{rank}") for rank in range(processes)]
    pids = []
    for rank, path in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), **address}
        pids.append(forked(main, path, own))
    first = ended(pids[0], logs[0])
    return [first, *(ended(pid, path, 30) for pid, path in zip(pids[1:], logs[1:], strict=True))]


@dataclass
class Places:
    """Places of a run, in their order, and one at which it is ended.

    Attributes:
        target: The number of the place; None only counts.
        number: The signal that it sends to itself there.
        tear: Whether the file that was just written loses its second half first.
        seen: The phase of each place, as far as the run has come.
    """

    target: int | None = None
    number: int = signal.SIGKILL
    tear: bool = False
    seen: list[str] = field(default_factory=list)

    def reach(self, phase: str, file: str | os.PathLike | None = None) -> None:
        """Be at a place of this phase."""
        if len(self.seen) == self.target:
            if self.tear and file is not None and Path(file).is_file():
                os.truncate(file, Path(file).stat().st_size // 2)
            os.kill(os.getpid(), self.number)
        self.seen.append(phase)


class _Steps(TrainerCallback):
    def __init__(self, trainer: ReZeroTrainer, places: Places):
        self.trainer, self.places = trainer, places

    def _reach(self):
        pruner = self.trainer.pruner
        self.places.reach("masks" if pruner is not None and pruner.masks is not None else "training")

    def on_step_begin(self, args, state, control, **kwargs):
        self._reach()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._reach()

    def on_step_end(self, args, state, control, **kwargs):
        self._reach()

    def on_prediction_step(self, args, state, control, **kwargs):
        self.places.reach("evaluation")


@contextmanager
def places_in(places: Places) -> Iterator[None]:
    """Let the steps, the predictions and the writes and removals of files of this process be places."""
    made, taken = ReZeroTrainer.__init__, GradInit.step

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.add_callback(_Steps(self, places))

    def take(self, *args):
        places.reach("GradInit")
        taken(self, *args)

    changed = [(ReZeroTrainer, "__init__", make), (GradInit, "step", take)]
    weights = transformers.modeling_utils, "safe_save_file"
    for owner, name in ((torch, "save"), weights, (transformers.TrainerState, "save_to_json")):
        changed.append((owner, name, _writing(getattr(owner, name), places)))
    changed += [(Path, name, _moving(getattr(Path, name), places)) for name in ("replace", "unlink")]
    changed.append((shutil, "rmtree", _moving(shutil.rmtree, places)))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    for owner, name, function in changed:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


@contextmanager
def sharded_on_cpus() -> Iterator[None]:
    """Let accelerate shard models over gloo, which it does with accelerators only: it asks for the kind of the processes."""
    made = ReZeroTrainer.__init__

    def make(self, model, args, **kwargs):
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        made(self, model, args, **kwargs)

    ReZeroTrainer.__init__ = make
    try:
        yield
    finally:
        ReZeroTrainer.__init__ = made


def _writing(write: Callable, places: Places) -> Callable:
    """A function that writes the file of its second argument, or of its first as a method."""

    def place(first, second, *args, **kwargs):
        places.reach("saving")
        result = write(first, second, *args, **kwargs)
        places.reach("saving", second)
        return result

    return place


def _moving(move: Callable, places: Places) -> Callable:
    def place(path, *args, **kwargs):
        places.reach("saving")
        return move(path, *args, **kwargs)

    return place
