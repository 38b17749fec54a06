"""Learned masks on the model of a Trainer, and their removal in the middle of a run."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.utils import reduce
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files import write_text, written_whole
from ..optim.loading import check_state
from ..pruning.groups import PruningGroup
from ..pruning.mask_layers import MASK_LAYERS
from ..pruning.masks import Masks, attach_masks, masks_of
from ..pruning.penalty import Lagrangian
from ..pruning.report import PruningReport
from ..pruning.rules import UNITS, find_groups, search
from ..pruning.select import select
from ..pruning.storage import read_provenance, replay_
from ..pruning.surgery import remove_pruned_
from ..structure.modules import provenance_of
from .checkpoints import load_state
from .flags import names, number_or_by_name, numbers_by_name, option, read_flags


logger = logging.get_logger(__name__)


class Steps(NamedTuple):
    """Masks are there from step `start` to step `end`, and pull harder over the first `warmup` steps of these."""

    start: int
    end: int
    warmup: int


@dataclass
class PruningConfig:
    """When and how `ReZeroTrainer` prunes; `attach_masks` and the mask layers explain what is not explained here.

    The units are removed at `end_step`; the steps after it fine-tune the smaller model, and there should be many.
    Residual weights must have moved from 0 when the masks come. `min_keep` and `round_to` may differ by kind, and `cost`
    may be costs by module as `attach_masks` takes them.
    """

    method: str = option("l1", help="l1 or l0: learn masks during training and remove what they close.")
    targets: tuple[str, ...] | None = option(
        None,
        help="Any of heads, neurons, channels, layers, sublayers, width; default: what the model has of the first three.",
        read=names,
    )
    target_sparsity: float | None = option(None, help="Fraction of the prunable parameters that shall go.")
    lambda_: float | None = option(None, help="Fixed factor of the penalty, without target.", flag="lambda")
    start_step: int = option(0, help="Train so many steps before the masks come.")
    end_step: int | None = option(
        None, help="Remove the closed units after so many steps; default: half-way from start to end."
    )
    warmup_steps: int | None = option(
        None, help="Steps in which the penalty rises; default: half of those with masks if there is a target."
    )
    mask_learning_rate: float | None = option(
        None, help="Constant learning rate of the masks; default: 0.01 for l1, 0.05 for l0."
    )
    beta: float = option(2 / 3, help="Temperature of the L0 gates.")
    beta_end: float | None = option(
        None, help="Temperature that the L0 gates reach at --prune_end_step; default: that of the start."
    )
    log_alpha: float = option(2.5, help="Where the L0 gates start; 2.5 is just open.")
    penalty: str = option("sigmoid", help="Penalty of the L0 gates: sigmoid, or hard_sigmoid, which pulls earlier.")
    estimator: str = option("paper", help="L0 gates without noise: paper, or threshold for gates of 0 and 1.")
    per_example: bool = option(False, help="Draw the L0 gates for each example.")
    capture: float = option(0.02, help="An L1 mask below this stays 0 for ever.")
    min_keep: int | Mapping[str, int] = option(
        1, help="Units that stay in every group, or by kind: heads=1,neurons=8.", read=number_or_by_name
    )
    round_to: int | Mapping[str, int] = option(
        1, help="Kept units of every group are a multiple of this, or by kind.", read=number_or_by_name
    )
    sphere: bool = option(False, help="Keep the norms of the weights that read each unit, beside L1 masks.")
    alternate_steps: int = option(0, help="Train weights and masks in turn, so many steps each; 0: both always.")
    hold_resweight: bool = option(True, help="Do not train the residual weights while there are masks.")
    branch_lambda: Mapping[str, float] | None = option(
        None,
        help="Factors of the penalty by kind or by pattern of names: heads=2,*.layers.0.*=0.",
        read=numbers_by_name,
    )
    cost: str | Mapping[str, float] = option(
        "units", help="units charges every unit alike, params its parameters.", read=str
    )

    def __post_init__(self):
        if self.method not in MASK_LAYERS:
            raise ValueError(f"got method={self.method!r}: expected {' or '.join(map(repr, MASK_LAYERS))}.")
        if isinstance(self.cost, str) and self.cost not in ("units", "params"):
            raise ValueError(f"got cost={self.cost!r}: expected 'units', 'params', or costs by module.")
        if self.target_sparsity is None and self.lambda_ is None:
            raise ValueError("got neither target_sparsity nor lambda_: how much shall be pruned?")
        if self.mask_learning_rate is None:
            self.mask_learning_rate = MASK_LAYERS[self.method].learning_rate
        if MASK_LAYERS[self.method].catches and self.capture <= self.mask_learning_rate:
            raise ValueError(
                f"got capture={self.capture} with mask_learning_rate={self.mask_learning_rate}: a mask would step over "
                f"the interval in which it is caught. Expected a larger capture or a smaller rate."
            )

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "PruningConfig | None":
        """The config that `--prune_*` asks for; None without `--prune_method`."""
        return None if args.prune_method is None else cls(**read_flags(cls, "prune_", args))

    def targets_in(self, model: nn.Module) -> list[str]:
        """The targets, or by default what the model has of heads, neurons and channels."""
        return list(self.targets or (target for target, groups in search(model, UNITS).items() if groups))

    def steps(self, max_steps: int) -> Steps:
        """The schedule in a run of so many steps.

        Raises:
            ValueError: The run has no such steps.
        """
        start = self.start_step
        end = start + (max_steps - start) // 2 if self.end_step is None else self.end_step
        if not 0 <= start < end <= max_steps:
            raise ValueError(
                f"got start_step={start}, end_step={end} for a run of {max_steps} steps: expected 0 <= start_step < "
                f"end_step <= max_steps, with many steps left for fine-tuning after end_step."
            )
        default = 0 if self.target_sparsity is None else (end - start) // 2
        return Steps(start, end, default if self.warmup_steps is None else self.warmup_steps)

    def attach(self, model: nn.Module, warmup_steps: int) -> Masks:
        """Masks for `model` as the config has them; what could only fail at their removal fails here.

        Raises:
            ValueError: As `find_groups`, `attach_masks` and `select`.
        """
        groups = find_groups(model, self.targets)
        if (self.method, self.estimator) != ("l0", "threshold"):
            _check_tied(model, groups)
        options = {name: value for name, value in vars(self).items() if name in MASK_LAYERS[self.method].options()}
        options |= {n: getattr(self, n) for n in ("min_keep", "sphere", "alternate_steps", "hold_resweight")}
        options |= {} if self.lambda_ is None else {"lambda_": self.lambda_}
        masks = attach_masks(
            model,
            groups,
            self.method,
            target_sparsity=self.target_sparsity,
            warmup_steps=warmup_steps,
            branch_lambda=self.branch_lambda,
            module_costs=self.cost,
            **options,
        )
        if self.target_sparsity is not None:
            limits = {"min_keep": self.min_keep, "round_to": self.round_to}
            select(masks.sizes, groups, masks.split(masks.layer.scores()), self.target_sparsity, **limits)
        return masks


def _check_tied(model: nn.Module, groups: Sequence[PruningGroup]) -> None:
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    read = [reader.tensor for group in groups for reader in group.readers if reader.tensor in tied]
    if read:
        raise ValueError(
            f"{read[0]} is tied, so it can only take masks that end as 0 or 1: untie the embeddings, leave out the target "
            f"that it belongs to, or use method='l0' with estimator='threshold'."
        )


class Pruner(TrainerCallback):
    """Takes a run of a Trainer through training, training with masks, and fine-tuning without the removed units.

    All happens inside of one training loop. Masks have an optimizer of their own, Adam at a constant rate, so neither
    the schedule nor what the optimizer of the run does (decay, trust ratios, slow weights) reaches them. The penalty is
    added as a gradient, once for each step: losses, their logs and their scaling never see it.
    """

    def __init__(self, trainer: "PruningTrainer", config: PruningConfig):
        self.trainer, self.config = trainer, config
        self.optimizer = self.steps = None
        self.reset()

    def reset(self) -> None:
        """Forget an earlier call of `train`."""
        if masks_of(self.trainer.model) is not None:
            self.trainer.model.pruning_masks.detach_()
        self.masks = self.batch = self.restored = None
        self.removed = False

    def state(self) -> dict:
        """What a checkpoint needs beside the weights, see `restore`."""
        targets = self.config.targets_in(self.trainer.model)
        state = {"method": self.config.method, "targets": targets, "removed": self.removed}
        if self.masks is not None:
            state |= {"masks": self.masks.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.removed:
            report = self.trainer.pruning_report
            provenance = provenance_of(self.trainer.model)
            state |= {"provenance": provenance, "report": report and report.to_dict()}
        return state

    def restore(self, state: dict, checkpoint: str) -> None:
        """Take over what `state` has saved; masks follow when training begins.

        Raises:
            ValueError: It is from another kind of pruning.
        """
        wanted = self.config.method, self.config.targets_in(self.trainer.model)
        if state and (state["method"], state["targets"]) != wanted:
            raise ValueError(
                f"{checkpoint} prunes {', '.join(state['targets'])} by {state['method']}, and this run "
                f"{', '.join(wanted[1])} by {wanted[0]}: give the same arguments, or start anew."
            )
        self.restored, self.removed = state, state.get("removed", False)
        if state.get("report"):
            self.trainer.pruning_report = PruningReport.from_dict(state["report"])

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = self.config.steps(state.max_steps)
        saved = self.restored or {}
        if not self.removed and state.global_step > self.steps.start and "masks" not in saved:
            raise ValueError(
                f"the checkpoint is of step {state.global_step} and has no masks, and start_step={self.steps.start}: "
                f"give a start_step from {state.global_step} on, or resume from an earlier checkpoint."
            )
        if "masks" in saved:
            self._attach(saved, state.global_step)
        self._advance(state)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.masks is not None and self.config.method == "l0" and self.config.beta_end is not None:
            done = (state.global_step - self.steps.start) / (self.steps.end - self.steps.start)
            self.masks.layer.beta.fill_(self.config.beta + done * (self.config.beta_end - self.config.beta))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.masks is None or self.trainer.step_is_left_out:
            return
        for parameter in self.masks.parameters():
            # the data gradient: DDP was built without the masks, and the gradient scaler does not know their optimizer
            parameter.grad = self._reduced(parameter)
        self.masks.penalty().backward()
        self.masks.before_step()

    def _reduced(self, parameter: nn.Parameter) -> torch.Tensor:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if self.trainer.accelerator.num_processes > 1:
            gradient = reduce(gradient, "mean")
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return gradient if scaler is None else gradient / scaler.get_scale()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.masks is None or self.trainer.step_is_left_out or self._overflows():
            return
        self.optimizer.step()
        self.masks.after_step()

    def _overflows(self) -> bool:
        """Whether a gradient of the masks is not finite, or a gradient scaler skips this step.

        Inside of a fused optimizer the scaler does so unnoticed.
        """
        gradients = [p.grad for p in self.masks.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return True
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
        return scaled and self.trainer.accelerator.optimizer_step_was_skipped

    def on_step_end(self, args, state, control, **kwargs):
        self._advance(state)

    def _advance(self, state: TrainerState) -> None:
        """Attach or remove masks where it is time, after the gradients are gone and before anything is saved."""
        if self.removed:
            return
        if self.masks is None and state.global_step >= self.steps.start:
            self._attach({}, state.global_step)
        if self.masks is not None and state.global_step >= self.steps.end:
            self._remove()

    def _attach(self, saved: dict, step: int) -> None:
        try:
            self.masks = self.config.attach(self.trainer.model, self.steps.warmup)
        except ValueError as error:
            raise ValueError(f"no masks can be attached at start_step={self.steps.start}: {error}") from None
        self.optimizer = torch.optim.Adam(self.masks.parameters(), lr=self.config.mask_learning_rate)
        if saved:
            self.masks.load_state_dict(saved["masks"])
            check_state(self.optimizer, saved["optimizer"])
            self.optimizer.load_state_dict(saved["optimizer"])
        if self.trainer.is_world_process_zero():
            _truncate_history(self._folder() / "history.jsonl", step if saved else -1)

    def _folder(self) -> Path:
        return Path(self.trainer.args.output_dir, "pruning")

    def _remove(self) -> None:
        trainer, optimizer = self.trainer, self.trainer.optimizer
        batch = None if self.batch is None else trainer._prepare_inputs(self.batch)
        groups = list(optimizer.param_groups)
        self.masks.zero_grad()
        report = remove_pruned_(
            trainer.model, self.masks, round_to=self.config.round_to, batch=batch, optimizer=optimizer
        )
        self.masks = self.optimizer = self.batch = None
        self.removed, trainer.pruning_report = True, report
        _follow(trainer.lr_scheduler, groups, optimizer.param_groups)
        trainer.model_wrapped = rewrap(trainer.accelerator, trainer.model_wrapped, trainer.model)
        if trainer.is_world_process_zero():
            report.save(self._folder() / "report.json")
            report.plot(self._folder() / "report.png")
            logger.info(str(report))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """What stands beside a training loss: of the masks, or of the smaller model."""
        masks = self.masks
        if masks is None:
            parameters = sum(p.numel() for p in self.trainer.model.parameters())
            return {"parameters": parameters} if self.removed else {}
        factors = masks.split(masks.layer.estimate())
        steered = isinstance(self.masks.pull, Lagrangian)
        factor = masks.pull.multipliers[0] if steered else masks.pull.lambda_
        if self.config.target_sparsity is None:
            factor = factor * masks.pull.warmup()
        self._note({name: int(factor.count_nonzero()) for name, factor in factors.items()})
        return {
            "prune_penalty": float(masks.penalty()),
            "prune_expected_sparsity": float(masks.expected_sparsity()),
            "prune_sparsity": float(masks.sizes.sparsity({n: (z != 0).double() for n, z in factors.items()})),
            "prune_lambda": float(factor),
        }

    def _note(self, kept: dict[str, int]) -> None:
        """Append the open units of each group to the history."""
        if self.trainer.is_world_process_zero():
            self._folder().mkdir(parents=True, exist_ok=True)
            with (self._folder() / "history.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.trainer.state.global_step, "kept": kept}) + "\n")


def _truncate_history(path: Path, step: int) -> None:
    """Drop what an interrupted run has written after its last checkpoint, or an earlier run altogether.

    What cannot be read, such as a last line that a kill has cut, goes too.
    """
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _follow(scheduler: Any, before: list[dict], after: list[dict]) -> None:
    """Drop what a scheduler keeps for groups of its optimizer that are gone."""
    left = [index for index, group in enumerate(before) if any(group is other for other in after)]
    for name, value in vars(scheduler).items():
        if isinstance(value, list) and len(value) == len(before):
            setattr(scheduler, name, [value[index] for index in left])


def rewrap(accelerator, wrapped: nn.Module, model: nn.Module) -> nn.Module:
    """A wrapper like `wrapped` for a model that has other parameters now; the old one can train no more."""
    if not isinstance(wrapped, DistributedDataParallel):
        return wrapped
    # the hooks of the old reducer on the parameters that stay are removed when it is destroyed
    wrapped.reducer = wrapped.logger = None
    handler = accelerator.ddp_handler
    options = {} if handler is None else handler.to_kwargs()
    new = DistributedDataParallel(model, device_ids=wrapped.device_ids, output_device=wrapped.output_device, **options)
    if handler is not None:
        handler.register_comm_hook(new)
    accelerator._models = [new if known is wrapped else known for known in accelerator._models]
    return new


def cut_like(model: nn.Module, checkpoint: str, state: dict) -> None:
    """Cut a model that was built as before pruning to the shapes of a checkpoint; one that has them stays as it is.

    Raises:
        ValueError: The model was pruned before, and in another way.
    """
    saved, own = state.get("provenance"), provenance_of(model)
    if saved is None:
        try:
            saved = read_provenance(checkpoint)
        except ValueError:
            return
    if own is not None and own != saved:
        raise ValueError(
            f"the model was pruned in another way than the one in {checkpoint}: load the model from this checkpoint "
            f"with from_pretrained, then resume."
        )
    replay_(model, saved)


class PruningTrainer(Trainer):
    """The `Trainer` with a `Pruner`: see `ReZeroTrainer`."""

    step_is_left_out = False  # by `FiniteTrainer`: then the masks take none either

    def __init__(self, *args, pruning: PruningConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.pruning, self.pruning_report = pruning or PruningConfig.from_arguments(self.args), None
        self.pruner = None
        if self.pruning is not None:
            self._check_pruning(self.pruning)
            self.pruner = Pruner(self, self.pruning)
            self.add_callback(self.pruner)

    def _check_pruning(self, config: PruningConfig) -> None:
        args = self.args
        excluded = {
            "torch_compile": args.torch_compile,
            "deepspeed": self.is_deepspeed_enabled,
            "fsdp": self.is_fsdp_enabled or self.is_fsdp_xla_enabled,
            "load_best_model_at_end": args.load_best_model_at_end,
            "auto_find_batch_size": args.auto_find_batch_size,
            "DataParallel (start one process per GPU with torchrun)": args.n_gpu > 1,
        }
        given = [name for name, value in excluded.items() if value]
        if given:
            raise ValueError(
                f"got pruning with {', '.join(given)}: the shapes of the model change in the middle of the run. "
                f"Leave it out, or prune first and train the smaller model with it."
            )
        if args.max_steps > 0:
            config.steps(args.max_steps)
        if MASK_LAYERS[config.method].is_scale and not args.weight_decay and not config.sphere:
            logger.warning(
                "L1 masks without weight_decay: the weights can grow as the masks shrink, and the penalty has no effect "
                "in the limit. Give --weight_decay, or sphere=True."
            )

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, from the first phase on or from that of the checkpoint."""
        if self.pruner is not None:
            self.pruner.reset()
        return super().train(resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights into a model of the shapes that they have.

        Raises:
            ValueError: The checkpoint has masks, and this run has none, or others.
        """
        path = Path(resume_from_checkpoint, "pruning.pt")
        state = load_state(path, "use an earlier checkpoint") if path.exists() else {}
        if self.pruner is not None:
            self.pruner.restore(state, resume_from_checkpoint)
        elif "masks" in state:
            raise ValueError(
                f"{resume_from_checkpoint} was saved while masks were trained: give its --prune_* arguments."
            )
        cut_like(self.model if model is None else model, resume_from_checkpoint, state)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, model: nn.Module, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Train on a batch, with the wrapper of the smaller model where the loop still has the first one."""
        if self.pruner is not None and self.pruner.masks is not None:
            self.pruner.batch = inputs
        if self.pruner is None or not self.pruner.removed or self.model_wrapped is model:
            return super().training_step(model, inputs, num_items_in_batch)
        with nullcontext() if self.accelerator.sync_gradients else self.accelerator.no_sync(self.model_wrapped):
            return super().training_step(self.model_wrapped, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module):
        return super()._clip_grad_norm(self._without_masks(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        return super()._get_grad_norm(self._without_masks(model), grad_norm)

    def _without_masks(self, model: nn.Module):
        """What clipping sees: no masks, of which a large gradient would shrink the step of the weights."""
        if self.pruner is None or self.pruner.masks is None:
            return model
        masks = {id(p) for p in self.pruner.masks.parameters()}
        return SimpleNamespace(parameters=lambda: [p for p in model.parameters() if id(p) not in masks])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model, without masks."""
        if self.pruner is not None and self.pruner.masks is not None:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: t for name, t in state_dict.items() if not name.startswith("pruning_masks.")}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Save a checkpoint; the state of pruning first, as the Trainer ends with the mark of a complete one."""
        if self.pruner is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            with written_whole(folder / "pruning.pt") as temporary:
                torch.save(self.pruner.state(), temporary)
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the state of the masks beside every training loss."""
        if "loss" in logs and self.pruner is not None:
            logs |= self.pruner.metrics()
        super().log(logs, start_time)
