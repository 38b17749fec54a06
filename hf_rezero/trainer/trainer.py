"""Glue between the parts of this library and the `Trainer` of transformers."""

import copy
import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..diagnostics.resweights import resweight_profile, warn_of_blocked_branches
from ..initialization.gradinit import GradInitReport
from ..optim import decays, param_groups
from ..optim.arguments import UNEXPECTED, check_arguments
from ..optim.param_groups import resweight_groups
from ..optim.registry import parse_optimizer
from ..optim.schedules import PiecewiseLinear, keep_constant
from ..publish.card import is_generated, write_model_card
from ..publish.record import as_list, record_run
from ..structure.modules import config_of
from .checkpoints import CheckedTrainer, check_checkpoint, resume_point
from .distillation import DistillationConfig, DistillingTrainer
from .evaluation import EvaluatingTrainer
from .finite import FiniteTrainer, readable
from .folder import check_writable, locked
from .gradinit import GradInitConfig, run_gradinit, state_file
from .processes import names_lost_processes
from .progress import show_bits
from .pruning import PruningConfig, PruningTrainer
from .pushing import PushingTrainer
from .sharding import ShardedTrainer, unsharded_class
from .stopping import StoppableTrainer


logger = logging.get_logger(__name__)


class ReZeroTrainer(
    StoppableTrainer,
    FiniteTrainer,
    CheckedTrainer,
    PushingTrainer,
    EvaluatingTrainer,
    DistillingTrainer,
    PruningTrainer,
    ShardedTrainer,
):
    """The `Trainer`, with right parameter groups, exact bits per byte, and the residual weights in its logs.

    - Weight decay applies to tensors with two or more dimensions, so never to residual weights, norms and biases.
    - Every evaluation of a causal language model gains `{prefix}_bpb`: the summed negative log-likelihood over
      ln 2 and over the bytes that were predicted, and for tokens that are no bytes `{prefix}_perplexity`, that of a token.
      Bytes behind tokens come with the data, as `num_bytes` of a batch: `evaluation_windows` of `load_tokens` has it.
      Where they are not known, the metric is `{prefix}_bits_per_token`. No logits are kept.
    - `{prefix}_bpb` and `{prefix}_loss` are exact for any batch size and number of processes, see `EvaluatingTrainer`.
    - A model whose `forward` knows `skip_logits` trains without them, on the loss in chunks; label smoothing and loss
      functions of the caller get the logits still.
    - Label smoothing shifts the labels of every causal language model, not only of those that transformers lists.
    - Training logs gain `resweight_mean_abs` and `resweight_max_abs`; the progress bar of a byte model says bits per byte.
    - A data set with `set_epoch` hears of each new epoch, also when its loader is sharded over processes.
    - `train(resume_from_checkpoint=True)` resumes from the last checkpoint that is whole: each ends with a manifest of its
      files. One without optimizer or scheduler is resumed from only with `resume_weights_only`.
    - `gradinit=GradInitConfig(...)`, or `gradinit_steps` of the arguments, learns initial scales of the weights before
      training, on its data, for its optimizer; not when it is resumed. The report is `trainer.gradinit_report`, the
      files are in `output_dir/gradinit`.
    - `push_to_hub` publishes in one commit what loads without this library, never pickles, optimizer states or tokens.
    - A step whose gradient is not finite is left out, weights that are not finite are never saved, see `FiniteTrainer`.
    - At SIGTERM, SIGINT and SIGHUP a run finishes its step, saves a checkpoint and ends, see `StoppableTrainer`. While it
      runs, a lock keeps other runs out of its folder.
    - `pruning=PruningConfig(...)`, or `prune_method` of the arguments, learns masks in the middle of the run and then
      removes what they closed, heads and neurons, for the rest of it. It resumes in each phase, with the model as it
      was built or as a checkpoint has it. The report is `trainer.pruning_report`, the files are in
      `output_dir/pruning`.
    - `distillation=DistillationConfig(...)`, or `distill_from` of the arguments, adds a teacher to the loss.

    Raises:
        ValueError: `resweight_learning_rate` for a model without `resweight`; a damaged checkpoint; nothing to
            resume from; a teacher whose outputs have another shape.

    Example:
        >>> from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainer, ReZeroTrainingArguments
        >>> from hf_rezero.data import ByteDataset, collate_bytes
        >>> import numpy as np
        >>> model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
        >>> args = ReZeroTrainingArguments("outputs/doctest", max_steps=1, save_strategy="no", disable_tqdm=True)
        >>> data = ByteDataset(np.frombuffer(b"to be or not to be " * 9, dtype=np.uint8), block_size=16)
        >>> trainer = ReZeroTrainer(model, args, train_dataset=data, data_collator=collate_bytes)
        >>> trainer.create_optimizer().param_groups[0]["weight_decay"]
        0.0
    """

    def __init__(
        self,
        model=None,
        *args,
        gradinit: GradInitConfig | None = None,
        pruning: PruningConfig | None = None,
        distillation: DistillationConfig | None = None,
        **kwargs,
    ):
        # the Trainer switches the cache off for training, and would write that into every config.json
        self._saved_use_cache = getattr(config_of(model), "use_cache", None)
        super().__init__(model, *args, pruning=pruning, distillation=distillation, **kwargs)
        unwrapped = self.accelerator.unwrap_model(self.model)
        can_skip = "skip_logits" in inspect.signature(unwrapped.forward).parameters
        self._skips_logits = can_skip and self.distillation is None
        self.gradinit, self.gradinit_report = gradinit or GradInitConfig.from_arguments(self.args), None
        is_by_caller = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if self.gradinit is not None and self.gradinit.algorithm is None and is_by_caller:
            raise ValueError(
                "got an optimizer, whose trial step GradInit cannot know: name it, GradInitConfig(algorithm=...)."
            )
        if self.label_smoother is not None and self._is_causal_lm:
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        if self._is_causal_lm and self.distillation is None:
            show_bits(self)
        self.add_callback(_TellEpoch)
        self.add_callback(_WarnOfBlockedBranches)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decide weight decay by shape, where the Trainer decides by name and would decay `resweight`."""
        return [name for name, parameter in model.named_parameters() if decays(parameter)]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple:
        """The optimizer class inside the prefixes of `args.optim`, and its arguments.

        Raises:
            ValueError: The class does not take an argument of `optim_args`, or cannot work with one.
        """
        spec = parse_optimizer(args.optim, args.optim_args)
        given, given_as = spec.arguments, f"optim_args={args.optim_args!r}"
        if spec.base:
            cls, kwargs = spec.base.make, {"lr": args.learning_rate, **spec.base.fixed}
            accepted = inspect.signature(cls).parameters
            kwargs |= {key: value for key, value in _changed_adam_arguments(args).items() if key in accepted}
        else:
            inside = copy.copy(args)
            inside.optim = OptimizerNames(spec.name.base)
            inside.optim_args = ",".join(f"{key}={value}" for key, value in given.items() if "," not in str(value))
            try:
                cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(inside, model)
            except UNEXPECTED as error:
                raise ValueError(f"got {given_as}, which {args.optim} does not take: {error}.") from None
            if not cls.__module__.startswith("torch.optim"):
                return cls, kwargs
            accepted = inspect.signature(cls).parameters
        if given.keys() - accepted or "params" in given:
            raise ValueError(f"got {given_as}: expected, for {spec.name.base}, any of {', '.join(accepted)}.")
        kwargs = {**kwargs, **given}
        if given:
            check_arguments(cls, kwargs, given_as, args.device)
        return cls, kwargs

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer that the arguments name, on the groups of `param_groups`."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        by_caller = self.optimizer_cls_and_kwargs
        cls, kwargs = by_caller or self.get_optimizer_cls_and_kwargs(self.args, model)
        is_class = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
        if is_class and not {"params", "model", "optimizer_dict"} & kwargs.keys():
            rates = {"resweight_learning_rate": self.args.resweight_learning_rate}
            kwargs = {"params": param_groups(model, weight_decay=self.args.weight_decay, **rates)} | kwargs
        self.optimizer_cls_and_kwargs = cls, kwargs
        super().create_optimizer(model)
        self.optimizer_cls_and_kwargs = by_caller
        if by_caller is None:
            self._wrap_optimizer()
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Build the scheduler that the arguments name, with constant learning rates where they ask for them."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        kwargs = self.args.lr_scheduler_kwargs or {}
        if "points" in kwargs:
            self.lr_scheduler = PiecewiseLinear(optimizer or self.optimizer, num_training_steps, **kwargs)
            self._created_lr_scheduler = True
        else:
            super().create_scheduler(num_training_steps, optimizer)
        if self.args.resweight_constant_lr:
            keep_constant(self.lr_scheduler, resweight_groups(self.model, optimizer or self.optimizer))
        return self.lr_scheduler

    def _wrap_optimizer(self) -> None:
        spec = parse_optimizer(self.args.optim, self.args.optim_args)
        if self.is_deepspeed_enabled and (spec.name.centralize or spec.base and not spec.base.by_element):
            raise ValueError(
                f"optim={self.args.optim} needs whole weight matrices, and DeepSpeed ZeRO flattens them. Use FSDP2, or "
                f"radam or lookahead+adamw_torch_fused, which act by element."
            )
        spec.wrap(self.optimizer)

    @names_lost_processes
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, after a look at the folder and at the checkpoint to resume from; `True` means the last complete one.

        Before the first checkpoint, `True` goes on with an interrupted GradInit, or starts over.

        Raises:
            Interrupted: A signal asked the run to end, see `StoppableTrainer`.
            ValueError: Another run is in the folder, it cannot be written to, or the checkpoint cannot be resumed from.
        """
        # a trial of a search has none yet: it is made in `Trainer.train`
        parameters = [] if self.model is None else self.model.parameters()
        weights = sum(p.numel() * p.element_size() for p in parameters)
        with nullcontext() if self.args.process_index else locked(self.args.output_dir, self.args.take_over):
            if not self.args.process_index:
                check_writable(self.args.output_dir, weights)
            return self.stoppable(partial(self._train, resume_from_checkpoint, **kwargs))

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs):
        interrupted = resume_from_checkpoint is True and state_file(self.args.output_dir).exists()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = resume_point(self.args.output_dir)
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.args.resume_weights_only)
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, "trainer_state.json")))
            if self._has_finished(state):
                return self._take_up(resume_from_checkpoint, state)
        elif interrupted and self.gradinit is None:
            raise ValueError(
                f"{state_file(self.args.output_dir)} is of an interrupted GradInit, and this run has none: give "
                f"--gradinit_steps as before, or leave out --resume_from_checkpoint and use another output_dir."
            )
        elif self.gradinit is not None:
            self.gradinit_report = run_gradinit(self, self.gradinit, resume=interrupted)
        return super().train(resume_from_checkpoint or None, **kwargs)

    def _has_finished(self, state: TrainerState) -> bool:
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return state.num_train_epochs == self.args.num_train_epochs and state.global_step >= state.max_steps

    def _take_up(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Load a finished run: `Trainer.train` would take one step more than it was asked for."""
        self._load_from_checkpoint(checkpoint)
        self.state = state
        loss = mean_of_logged(state.log_history)
        # a run that was killed after its last checkpoint has saved no metrics
        saved = "train_loss" in readable(Path(self.args.output_dir, "all_results.json"))
        metrics = {"train_loss": loss, "epoch": state.epoch, "total_flos": state.total_flos}
        return TrainOutput(state.global_step, loss, {} if saved else metrics)

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        """One forward and backward pass, without the logits where the model can do without."""
        if self._skips_logits:
            inputs = {**inputs, "skip_logits": True}
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the size of the residual weights beside every training loss."""
        profile = resweight_profile(self.accelerator.unwrap_model(self.model)) if "loss" in logs else {}
        if profile:
            sizes = [abs(value) for value in profile.values()]
            logs |= {"resweight_mean_abs": sum(sizes) / len(sizes), "resweight_max_abs": max(sizes)}
        if "loss" in logs and self.gradinit_report is not None and not self.state.log_history:
            logs |= _gradinit_metrics(self.gradinit_report)
        super().log(logs, start_time)

    def create_model_card(
        self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, tasks=None, **data
    ) -> None:
        """Write `run.json`, what the run was, and the model card from what it measured; a card by hand stays."""
        resweights = resweight_profile(self.accelerator.unwrap_model(self.model))  # of all processes, if it is sharded
        if not self.is_world_process_zero():
            return
        with unsharded_class(self.model):
            record_run(self, resweights=resweights, tasks=tasks, finetuned_from=finetuned_from, **data)
        card = Path(self.args.output_dir, "README.md")
        if card.exists() and not is_generated(card.read_text()):
            return logger.warning(f"{card} was written by hand and stays as it is.")
        options = {"name": model_name, "repo_id": self.hub_model_id, "license": license, "language": language}
        write_model_card(self.args.output_dir, tags=as_list(tags), **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with the `use_cache` that it came with."""
        if self._saved_use_cache is None:
            return super().save_model(output_dir, _internal_call)
        self.model.config.use_cache = self._saved_use_cache
        super().save_model(output_dir, _internal_call)
        self.model.config.use_cache = self.args.use_cache


def mean_of_logged(log: Sequence[dict]) -> float:
    """The mean loss of the steps of a run, each logged loss being that of the steps since the one before.

    Example:
        >>> mean_of_logged([{"step": 1, "loss": 5.0}, {"step": 2, "eval_loss": 9.0}, {"step": 4, "loss": 1.0}])
        2.0
    """
    logged = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    steps = [now - before for (before, _), (now, _) in pairwise([(0, 0.0), *logged])]
    return sum(n * loss for n, (_, loss) in zip(steps, logged, strict=True)) / sum(steps) if logged else math.nan


def _gradinit_metrics(report: GradInitReport) -> dict:
    """What the first log of a run says of the GradInit before it."""
    return {
        "gradinit_steps": len(report.history),
        "gradinit_constrained_steps": report.constrained_steps,
        "gradinit_grad_norm": report.history[-1]["grad_norm"],
        "gradinit_seconds": report.seconds,
    }


def _changed_adam_arguments(args: TrainingArguments) -> dict:
    """The betas and eps of the arguments, where they are not what transformers passes when nobody asked."""
    default = {field.name: field.default for field in fields(args)}
    changed = {}
    if any(getattr(args, name) != default[name] for name in ("adam_beta1", "adam_beta2")):
        changed["betas"] = args.adam_beta1, args.adam_beta2
    if args.adam_epsilon != default["adam_epsilon"]:
        changed["eps"] = args.adam_epsilon
    return changed


class _TellEpoch(TrainerCallback):
    """accelerate tells a data set its epoch only when the sampler, wrapped once more on several processes, does not listen."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(math.floor(state.epoch + 1e-6))


class _WarnOfBlockedBranches(TrainerCallback):
    """Two zeros in a row show in the first gradient, and nothing else would tell."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            warn_of_blocked_branches(model)
