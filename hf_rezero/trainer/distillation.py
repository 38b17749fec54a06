"""Learning from the outputs of another model, beside the labels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from .evaluation import is_causal_lm
from .flags import option, read_flags


NO_TEACHER = "none"
AUTO_CLASSES = (
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
    (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
    (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoModelForTokenClassification),
    (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
)


@dataclass
class DistillationConfig:
    """From whom `ReZeroTrainer` lets the model learn, and how much; see `soft_target_loss` and `hidden_state_loss`.

    The loss of a step is (1 - weight) H + weight T^2 D + hidden_weight M: the loss on the labels, the divergence from the
    teacher at temperature T, and the distance of the hidden states. An evaluation has the loss on the labels alone.
    """

    teacher: str | nn.Module | None = option(
        None, help="Folder or Hub name of a model with the same outputs to learn from; none for no teacher.", flag="from", read=str
    )  # fmt: skip
    temperature: float = option(2.0, help="Temperature T that softens the outputs of both models.")
    weight: float = option(0.5, help="Share of the teacher in the loss, 0 to 1; the labels have the rest.")
    hidden_weight: float = option(
        0.0,
        help="Factor of the distance between the hidden states, for models of equal width; 0: they are not compared.",
    )

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"got distill_temperature={self.temperature}: expected more than 0.")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"got distill_weight={self.weight}: expected a share from 0 to 1.")
        if self.hidden_weight < 0:
            raise ValueError(f"got distill_hidden_weight={self.hidden_weight}: expected at least 0.")

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "DistillationConfig | None":
        """The config that `--distill_*` asks for; None without `--distill_from`."""
        return None if args.distill_from in (None, NO_TEACHER) else cls(**read_flags(cls, "distill_", args))


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 sum_i q_i (log q_i - log p_i), with q and p the softmax of v_i / T and z_i / T, for each row.

    Hinton et al. 2015 ("Distilling the Knowledge in a Neural Network", arXiv:1503.02531), section 2: z are the logits
    of the student and v those of the teacher. The cross-entropy of equation 2 has the same gradient, and is not 0 where
    both agree. The gradients of soft targets shrink as 1 / T^2, which the factor makes up for.

    Args:
        student: (..., C) logits.
        teacher: (..., C) logits of the other model.
        temperature: T.

    Returns:
        A tensor of shape (...), float32 or more.

    Raises:
        ValueError: The two have different shapes.

    Example:
        >>> import torch
        >>> z, v = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> soft_target_loss(v, v), soft_target_loss(z, v, temperature=1.0)
        (tensor([0.]), tensor([0.3278]))
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"got logits of shape {tuple(student.shape)}, and of shape {tuple(teacher.shape)} from the teacher: expected "
            f"a teacher with the same vocabulary or classes."
        )
    student, teacher = (logits.float() if logits.dtype.itemsize < 4 else logits for logits in (student, teacher))
    log_p = (student / temperature).log_softmax(-1)
    log_q = (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)


def hidden_state_loss(student: list[Tensor], teacher: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """The mean over layers l of sum |s_l - t_l|^2 / sum |t_l|^2; layer l of L meets layer round(l L_teacher / L).

    Romero et al. 2015 (arXiv:1412.6550), equation 3, without a regressor and relative to the size of the teacher's
    states. The first entry of each list is the output of the embeddings.

    Args:
        student: (B, ..., D) states.
        teacher: Likewise.
        mask: (B, ...), 0 where a state does not count.

    Raises:
        ValueError: The states have different shapes.

    Example:
        >>> import torch
        >>> hidden_state_loss([torch.ones(1, 2, 3)] * 3, [torch.full((1, 2, 3), 2.0)] * 5)
        tensor(0.2500)
    """
    depth, distances = len(student) - 1, []
    for layer, own in enumerate(student):
        other = teacher[round(layer * (len(teacher) - 1) / max(depth, 1))]
        if own.shape != other.shape:
            raise ValueError(
                f"got hidden states of shape {tuple(own.shape)}, and of shape {tuple(other.shape)} from the teacher: "
                f"expected the same width, or distill_hidden_weight=0."
            )
        counts = 1.0 if mask is None else mask[..., None].to(other)
        distances.append(((own - other).square() * counts).sum() / (other.square() * counts).sum())
    return torch.stack(distances).mean()


def predicted(logits: Tensor, labels: Tensor | None, shifts: bool) -> Tensor:
    """The rows (N, C) of logits (..., C) that have a label: not -100, and for `shifts` that of the next position.

    Raises:
        ValueError: The labels are no classes.
    """
    if labels is None:
        return logits.flatten(0, -2)
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"got labels of shape {tuple(labels.shape)} and type {labels.dtype} for logits of shape {tuple(logits.shape)}: "
            f"only classes can be distilled, with one label for each row of logits."
        )
    if shifts:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    return logits[labels != -100]


def load_teacher(name: str, student: nn.Module, **options: Any) -> PreTrainedModel:
    """The model of a folder or Hub name, in the class of the student's task.

    Args:
        name: The folder or Hub name.
        student: Whose outputs the teacher has.
        options: Arguments for `from_pretrained`, such as `trust_remote_code`.

    Raises:
        ValueError: The Auto classes do not know the student.
    """
    for mapping, auto_class in AUTO_CLASSES:
        known = mapping.get(type(getattr(student, "config", None)), ())
        if isinstance(student, known):
            return auto_class.from_pretrained(name, **options)
    raise ValueError(
        f"no Auto class knows the task of {type(student).__name__}: load the teacher yourself and pass it on, "
        f"DistillationConfig(teacher=model)."
    )


class DistillingTrainer(Trainer):
    """The `Trainer` with a teacher: see `ReZeroTrainer`."""

    def __init__(self, *args, distillation: DistillationConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.distillation = distillation or DistillationConfig.from_arguments(self.args)
        self.teacher: nn.Module | None = None
        self._distances: list[Tensor] = []
        if self.distillation is None:
            return
        student, teacher = self.accelerator.unwrap_model(self.model), self.distillation.teacher
        if teacher is None:
            raise ValueError("got a DistillationConfig without teacher: from whom shall the model learn?")
        self._shifts = is_causal_lm(student)
        self.teacher = load_teacher(teacher, student) if isinstance(teacher, str) else teacher
        self.teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The loss on the labels; in training with what the teacher says of the batch, see `DistillationConfig`."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {"output_hidden_states": True} if self.distillation.hidden_weight else {}
        given = {name: value for name, value in inputs.items() if name not in ("labels", "skip_logits")}
        loss, outputs = super().compute_loss(model, {**inputs, **asked}, True, num_items_in_batch)
        with torch.no_grad():
            taught = self.teacher(**given, **asked)
        distance, share = self._distance(inputs, outputs, taught, num_items_in_batch)
        self._distances.append(distance.detach())
        loss = (1 - self.distillation.weight) * loss + share * distance
        return (loss, outputs) if return_outputs else loss

    def _distance(self, inputs: dict, outputs: Any, taught: Any, num_items_in_batch) -> tuple[Tensor, float | Tensor]:
        """weight T^2 D + hidden_weight M, means over the positions that count, and the share of these in the step."""
        config, labels = self.distillation, inputs.get("labels")
        own, other = (predicted(o.logits, labels, self._shifts) for o in (outputs, taught))
        distance = config.weight * soft_target_loss(own, other, config.temperature).sum() / max(len(own), 1)
        if config.hidden_weight:
            mask = inputs.get("attention_mask")
            distance = distance + config.hidden_weight * hidden_state_loss(
                list(outputs.hidden_states), list(taught.hidden_states), mask
            )
        return distance, self._share_of_step(len(own), num_items_in_batch)

    def _share_of_step(self, count: int, num_items_in_batch) -> float | Tensor:
        """What part of a step `count` predictions are, as the Trainer weighs the loss on the labels."""
        if num_items_in_batch is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return 1.0
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return count * processes / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean distance from the teacher since the last log beside every training loss."""
        if "loss" in logs and self._distances:
            logs["distill_loss"] = torch.stack(self._distances).mean().item()
            self._distances.clear()
        super().log(logs, start_time)
