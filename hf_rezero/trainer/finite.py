"""Numbers that are not finite: such a step is not taken, such weights are not saved, and a run of them ends."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.utils import logging

from ..files import read_json, write_json, written_whole
from ..structure.parameters import whole


logger = logging.get_logger(__name__)
BATCH = "nonfinite_batch.pt"
NOT_FINITE = "not_finite"  # in logs how many values were not, in result files which


class NonFiniteError(RuntimeError):
    """Gradients or weights are infinite or NaN, and going on or saving would lose the run."""


def save_batch(trainer: Trainer, inputs: dict[str, Any]) -> None:
    """Write the tensors of a batch to `output_dir/nonfinite_batch.pt`, for a look at what broke the run."""
    if trainer.is_world_process_zero():
        with written_whole(Path(trainer.args.output_dir, BATCH)) as path:
            torch.save({name: value for name, value in inputs.items() if torch.is_tensor(value)}, path)


def nonfinite(tensors: dict[str, torch.Tensor | None], at_most: int = 5) -> list[str]:
    """The names of the first tensors with an entry that is infinite or NaN."""
    found = []
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local is not None and local.is_floating_point() and not torch.isfinite(local).all():
            found.append(name)
        if len(found) == at_most:
            break
    return found


class FiniteTrainer(Trainer):
    """The `Trainer`, which leaves out steps whose gradient is not finite.

    Such a step changes no weight; the log counts them as `skipped_steps`. After `max_bad_steps` in a row, or when a
    checkpoint would hold weights that are not finite, the run ends with `NonFiniteError`; the last batch is then in
    `output_dir/nonfinite_batch.pt`, and the checkpoints from before are untouched.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skipped_steps, self._bad_in_a_row = 0, 0
        self.step_is_left_out = False
        self._last_inputs: dict[str, Any] = {}
        self._norms: dict[str, torch.Tensor] = {}

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        """One forward and backward pass, whose batch is remembered."""
        self._last_inputs = inputs
        return super().training_step(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module):
        """Clip, after the norm of each gradient is taken: a total norm of NaN makes all of them NaN."""
        gradients = {n: p.grad for n, p in self.model.named_parameters() if type(p.grad) is torch.Tensor}
        norms = torch._foreach_norm(list(gradients.values())) if gradients else []
        self._norms = dict(zip(gradients, norms, strict=True))
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        value = whole(norm) if torch.is_tensor(norm) else norm
        self.step_is_left_out = value is not None and not torch.isfinite(torch.as_tensor(value)).all()
        if self.step_is_left_out:
            self._skip()
        else:
            self._bad_in_a_row = 0
        return norm

    def _skip(self) -> None:
        self.skipped_steps += 1
        self._bad_in_a_row += 1
        found = self._named(self._norms or {name: p.grad for name, p in self.model.named_parameters()})
        step = self.state.global_step + 1
        if self._bad_in_a_row >= self.args.max_bad_steps:
            save_batch(self, self._last_inputs)
            raise NonFiniteError(
                f"the gradients of {self._bad_in_a_row} steps in a row are not finite, up to step {step}, first of "
                f"{', '.join(found)}: lower the learning rate, look at the batch in {BATCH}, or train in bf16 or fp32."
            )
        logger.warning(f"step {step} is left out: its gradient is not finite, first of {', '.join(found)}.")
        if self.accelerator.scaler is None:  # a gradient scaler leaves the step out itself, and needs the gradients
            for parameter in self.model.parameters():
                parameter.grad = None

    def _named(self, tensors: dict[str, torch.Tensor | None]) -> list[str]:
        """The names of tensors that are not finite, of all processes where each sees only its shards."""
        found = nonfinite(tensors)
        if any(isinstance(p, DTensor) for p in self.model.parameters()):
            found = list(dict.fromkeys(gather_object(found)))
        return found

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Save a checkpoint of weights that are finite; the rotation of older ones comes after."""
        self._check_weights(f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model if its weights are finite."""
        self._check_weights(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _check_weights(self, target: str) -> None:
        found = self._named(dict(self.accelerator.unwrap_model(self.model).named_parameters()))
        if found:
            save_batch(self, self._last_inputs)
            raise NonFiniteError(
                f"{target} was not written: the weights are not finite, first {', '.join(found)}. Go on from an earlier "
                f"checkpoint with a lower learning rate."
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Whether the last evaluation was the best so far; one that is NaN or infinite never is."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if name in metrics and not math.isfinite(metrics[name]):
            return False
        return super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what is finite, the number of values that are not, and the number of steps that were left out."""
        logs |= {"skipped_steps": self.skipped_steps} if "loss" in logs and self.skipped_steps else {}
        bad = _not_finite(logs)
        if bad:
            logs = {name: value for name, value in logs.items() if name not in bad} | {NOT_FINITE: len(bad)}
        super().log(logs, start_time)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `{split}_results.json` and `all_results.json`, whole, and as JSON that every reader takes.

        A metric that is NaN or infinite is null there, and named in `not_finite`. An `all_results.json` that cannot be
        read, as a run leaves it that is killed while an earlier release writes it, starts anew.
        """
        if not self.is_world_process_zero():
            return
        bad = _not_finite(metrics)
        if bad:
            logger.warning(f"the metrics {', '.join(bad)} are not finite, and null in {split}_results.json.")
        folder = Path(self.args.output_dir)
        write_json(folder / f"{split}_results.json", _sorted(metrics | ({NOT_FINITE: bad} if bad else {})))
        if combined:
            known = readable(folder / "all_results.json")
            bad += [name for name in known.pop(NOT_FINITE, []) if name not in metrics]
            write_json(folder / "all_results.json", _sorted(known | metrics | ({NOT_FINITE: bad} if bad else {})))


def _not_finite(values: dict[str, Any]) -> list[str]:
    return [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]


def _sorted(values: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(values.items()))


def readable(path: Path) -> dict[str, Any]:
    """The JSON object in a file; with a warning nothing, where it is damaged."""
    try:
        return read_json(path)
    except ValueError as error:
        logger.warning(f"{error} It is written anew.")
        return {}
