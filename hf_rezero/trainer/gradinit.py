"""GradInit on the data, the loss and the optimizer of a Trainer, before its first step."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from ..files import written_whole
from ..initialization.gradinit import GradInit, GradInitReport, NonFiniteStepError, half_overlap
from ..initialization.trial import mean_over_processes
from ..optim.registry import parse_optimizer
from ..structure.kept import random_numbers_kept
from .checkpoints import load_state
from .finite import BATCH, NonFiniteError, save_batch
from .flags import option, read_flags
from .stopping import StoppableTrainer


logger = logging.get_logger(__name__)


@dataclass
class GradInitConfig:
    """How `ReZeroTrainer` runs GradInit before training; `gradinit_` explains the arguments.

    A step is two forward and backward passes on a batch of `per_device_train_batch_size`. The algorithm is by default
    the one with the trial step of the run's optimizer, see `OptimizerSpec.trial_step`.
    """

    num_steps: int = option(help="Learn initial scales of the weights in so many steps before training.", flag="steps")
    eta: float | None = option(None, help="Length of GradInit's trial step; default: --learning_rate.")
    algorithm: str | None = option(None, help="Kind of the trial step; default: that of --optim.")
    gamma: float | None = option(None, help="Bound of the gradient norm; default: the paper's rule, 0.1 / eta.")
    scale_lr: float = option(1e-2, help="Learning rate of the scales.")
    min_scale: float = option(0.01, help="Floor of the scales.")
    max_scale: float = option(10.0, help="Ceiling of the scales.")
    scale_clip: float = option(1.0, help="Bound of the gradient of each scale.")
    second_order: str = option(
        "finite_difference", help="finite_difference, or exact for a second backward pass through the first."
    )
    probe_resweight: float | None = option(
        None, help="Value of the residual weights during GradInit; they are restored."
    )
    save_steps: int = option(50, help="Save what was learned after so many steps, so that an interrupted run goes on.")

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "GradInitConfig | None":
        """The config that `--gradinit_*` asks for; None without `--gradinit_steps`."""
        if not args.gradinit_steps:
            return None
        return cls(**read_flags(cls, "gradinit_", args))

    def options(self, args: TrainingArguments) -> dict:
        """The arguments of `GradInit` in a run with these arguments.

        Raises:
            ValueError: GradInit has no trial step for the optimizer of the run.
        """
        derived = {
            "eta": self.eta or args.learning_rate,
            "algorithm": self.algorithm or parse_optimizer(args.optim, args.optim_args).trial_step,
            # low precision hides the difference of gradients that are closer together
            "epsilon": 1e-2 if args.bf16 or args.fp16 else 1e-3,
        }
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("num_steps", "save_steps")}
        return own | derived


def state_file(output_dir: str | os.PathLike) -> Path:
    """Where GradInit saves what it has learned so far."""
    return Path(output_dir, "gradinit", "state.pt")


def run_gradinit(trainer: StoppableTrainer, config: GradInitConfig, resume: bool) -> GradInitReport:
    """Scale the weights of `trainer.model` in place, the same on every process, and write the report.

    The random numbers of the run are left as they were, so that training does not depend on how GradInit was reached.

    Args:
        trainer: Its model must not be wrapped yet.
        config: What to do.
        resume: Go on from what an interrupted run has saved.

    Raises:
        Interrupted: A signal asked the run to end; what was learned so far is saved.
        NonFiniteError: `max_bad_steps` batches in a row give infinity or NaN.
        ValueError: As `GradInit` and `OptimizerSpec.trial_step`, and if the initial weights are not those of the interrupted run.
    """
    args, model = trainer.args, trainer.model.to(trainer.args.device)  # what will be sharded is still on the host
    _same_everywhere(model)
    options = config.options(args)
    init = GradInit(model, loss_fn=_loss_of(trainer), reduce=mean_over_processes, **options)
    path, norms = state_file(args.output_dir), [p.norm().item() for p in model.parameters()]
    left_out = _load(init, path, norms, options) if resume else 0
    done = len(init.history)
    bar = tqdm(
        desc="GradInit", total=config.num_steps, initial=done, disable=args.disable_tqdm or args.process_index > 0
    )
    with bar, random_numbers_kept():
        set_seed(args.seed)
        batches = islice(pairwise(_endless(trainer.get_train_dataloader())), done + left_out, None)
        for skipped in _steps(trainer, init, batches, config.num_steps, left_out):
            bar.update()
            asked = trainer.stop.is_asked()
            if asked or len(init.history) in (config.num_steps, *range(0, config.num_steps, config.save_steps)):
                state = {"gradinit": init.state_dict(), "norms": norms, "options": options, "skipped": skipped}
                _save(trainer, state, path)
            if asked:
                trainer.stop.leave(f"step {len(init.history)} of {config.num_steps} of GradInit, which {path} holds")
    report = init.fold_()
    if trainer.is_world_process_zero():
        report.save(path.with_name("report.json"))
        report.plot(path.with_name("report.png"))
    return report


def _steps(trainer: Trainer, init: GradInit, batches: Iterator[tuple], num_steps: int, skipped: int) -> Iterator[int]:
    """Take steps up to `num_steps`, and tell after each how many batches were left out, as what they gave was not finite.

    Raises:
        Interrupted: A signal asked the run to end; what was learned so far is saved.
        NonFiniteError: `max_bad_steps` batches in a row were left out.
    """
    in_a_row = 0
    while len(init.history) < num_steps:
        batch, fresh = next(batches)
        try:
            init.step(batch, half_overlap(batch, fresh))
            in_a_row = 0
            yield skipped
        except NonFiniteStepError as error:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row >= trainer.args.max_bad_steps:
                save_batch(trainer, batch)
                raise NonFiniteError(f"{in_a_row} batches in a row, the last in {BATCH}: {error}.") from None
            logger.warning(f"{error}. The batch is left out.")


def _same_everywhere(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(broadcast(tensor.data))


def _loss_of(trainer: Trainer):
    def loss(model: nn.Module, batch) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return trainer.compute_loss(model, trainer._prepare_inputs(batch)).float()

    return loss


def _endless(batches) -> Iterator:
    while True:
        yield from batches


def _save(trainer: Trainer, state: dict, path: Path) -> None:
    if trainer.is_world_process_zero():
        with written_whole(path) as temporary:
            torch.save(state, temporary)


def _load(init: GradInit, path: Path, norms: list[float], options: dict) -> int:
    """Take over what was learned; returns how many batches were left out."""
    state = load_state(path, "remove it, and GradInit starts anew")
    before = state.get("options", options)  # a state of an earlier release does not tell
    other = [
        f"{name}={before.get(name)}, now {options[name]}" for name in options if before.get(name) != options[name]
    ]
    if other:
        raise ValueError(
            f"{path} was learned with {'; '.join(other)}: give the arguments of the interrupted run, or leave out "
            f"--resume_from_checkpoint and use another output_dir."
        )
    if not np.allclose(state["norms"], norms, rtol=1e-5):
        raise ValueError(
            f"the weights are not those from which {path} was learned: start from the same checkpoint or seed, or "
            f"leave out --resume_from_checkpoint and use another output_dir."
        )
    init.load_state_dict(state["gradinit"])
    return state.get("skipped", 0)
