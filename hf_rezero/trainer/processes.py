"""The processes of one run: how long they wait for each other, and which of them is missed."""

import os
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from accelerate.utils import str_to_bool
from torch import distributed as dist
from transformers import TrainingArguments


Method = TypeVar("Method", bound=Callable)
STARTED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun and accelerate tell each process


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


def join_on_cpus(args: TrainingArguments) -> None:
    """Join the processes of a run on CPUs by gloo, with `ddp_timeout` as the time that they wait for each other.

    accelerate forms the group of a run on CPUs without a timeout, so that a process that hangs would be waited for by all
    others for the half hour that is the default of torch; a group that is there already is taken by it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not torch.accelerator.is_available():
        args.use_cpu = True  # or accelerate forms no group, and each process trains alone
    on_cpus = args.use_cpu or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    if on_cpus and args.ddp_backend in (None, "gloo") and os.environ.keys() >= STARTED and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=args.ddp_timeout_delta)


def names_lost_processes(method: Method) -> Method:
    """Let a method of a Trainer say which process waited for another one in vain, and what can be done.

    Raises:
        LostProcessError: Communication with another process has failed.
    """

    @wraps(method)
    def named(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except RuntimeError as error:
            if not _is_of_communication(error):
                raise
            raise LostProcessError(
                f"process {self.args.process_index} of {self.args.world_size} lost another one after step "
                f"{self.state.global_step}: it has ended, or has not answered for {self.args.ddp_timeout} s "
                f"(--ddp_timeout). The first error of the other processes is the cause; go on from the last checkpoint "
                f"with --resume_from_checkpoint true."
            ) from error

    return named  # pyright: ignore[reportReturnType]


def _is_of_communication(error: RuntimeError) -> bool:
    # gloo has no type of its own, only the path of its source in the message
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
