"""Losses and log-likelihoods, exact for every batch size and every number of processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from ..data.description import DataDescription, describe_data
from ..data.units import BITS_PER_BYTE, BITS_PER_TOKEN, NUM_BYTES, PERPLEXITY, tokens_are_bytes
from ..structure.modules import config_of
from .processes import names_lost_processes


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model generates text and is no encoder-decoder."""
    can_generate = getattr(model, "can_generate", None)
    generates = callable(can_generate) and bool(can_generate())
    return generates and not getattr(model.config, "is_encoder_decoder", False)


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood in nats and number of predicted tokens of each sequence.

    Args:
        logits: (B, T, V); position t predicts label t + 1.
        labels: (B, T), -100 where nothing is to be predicted.

    Returns:
        Two tensors of shape (B,): float32 nats, int64 counts.
    """
    targets = labels[:, 1:]
    nll = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return nll.sum(1), targets.ne(-100).sum(1)


def predicted_items(labels: torch.Tensor, is_causal_lm: bool) -> int:
    """The number of labels over which a loss is a mean: those that are not -100, or samples where labels are no classes.

    Example:
        >>> predicted_items(torch.tensor([[5, 6, -100]]), is_causal_lm=False)
        2
        >>> predicted_items(torch.tensor([[5, 6, -100]]), is_causal_lm=True)
        1
    """
    if labels.is_floating_point():
        return len(labels)
    return int((labels[..., 1:] if is_causal_lm else labels).ne(-100).sum())


@dataclass
class Sums:
    """What one process adds up over an evaluation: losses in nats, and the numbers of items that they are sums over.

    Attributes:
        loss: Of all items.
        items: How many.
        nll: Negative log-likelihoods of the predicted tokens.
        predicted: How many tokens these are.
        located: Of how many of them the data know the bytes.
        num_bytes: The bytes behind those.
    """

    loss: float = 0.0
    items: int = 0
    nll: float = 0.0
    predicted: int = 0
    located: int = 0
    num_bytes: int = 0

    def over_processes(self) -> "Sums":
        """The sums of all processes; those of tensor parallelism, which see the same data, leave the means as they are."""
        gathered = gather_object([self])
        return Sums(*(sum(getattr(part, name) for part in gathered) for name in vars(self)))

    def means(self, tokens_are_bytes: bool) -> dict[str, float]:
        """The loss per item, and the quality of a language model; without items neither.

        The quality is in bits per byte where tokens are bytes, or where the bytes behind every token are known, and in
        bits per token elsewhere. Where tokens are not bytes the perplexity of a token joins it.
        """
        means = {"loss": self.loss / self.items} if self.items else {}
        if self.predicted:
            from ..metrics.bits_per_byte.bits_per_byte import bits_per_byte  # `evaluate` is slow to import

            is_known = self.located == self.predicted and self.num_bytes > 0
            unit = BITS_PER_BYTE if tokens_are_bytes or is_known else BITS_PER_TOKEN
            means[unit.key] = bits_per_byte(self.nll, self.num_bytes if is_known else self.predicted)
            if not tokens_are_bytes:
                means[PERPLEXITY] = math.exp(min(self.nll / self.predicted, 700))  # short of the largest number
        return means


class EvaluatingTrainer(Trainer):
    """The `Trainer`, whose evaluation losses are means over the items of the data set, whoever evaluates which.

    The `Trainer` takes the mean of the means of batches. accelerate fills the last batch of each process with copies of
    the first samples, which are inside of such means, so that its loss depends on the number of processes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._is_causal_lm = is_causal_lm(self.accelerator.unwrap_model(self.model))
        self._sums = Sums()
        self.evaluated: dict[str, DataDescription] = {}  # the data behind each prefix of metrics

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), NUM_BYTES]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch; in evaluation the mean over its own items, not their share of those of all processes."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch if model.training else None)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict one batch, and add its loss and its log-likelihood to the sums of the evaluation."""
        inputs = dict(inputs)
        num_bytes = inputs.pop(NUM_BYTES, None)  # [B], nothing that a model reads
        scores_tokens = self._is_causal_lm and inputs.get("labels") is not None
        loss_only = prediction_loss_only and not scores_tokens
        loss, logits, labels = super().prediction_step(model, inputs, loss_only, ignore_keys)
        size = find_batch_size(inputs)
        if loss is None or size is None:
            return loss, logits, labels
        own, has_copies = self._own_samples(size)
        if scores_tokens:
            nll, predicted = token_nll(logits[0] if isinstance(logits, tuple) else logits, labels)
            self._sums.nll += nll[:own].sum(dtype=torch.float64).item()
            self._sums.predicted += int(predicted[:own].sum())
            if num_bytes is not None:
                self._sums.located += int(predicted[:own].sum())
                self._sums.num_bytes += int(num_bytes[:own].sum())
        exact = loss
        if has_copies:  # every process predicts again, for the collectives of sharded models
            exact, *_ = super().prediction_step(model, _first(inputs, max(own, 1), size), True, ignore_keys)
        self._add_loss(exact, _first(inputs, own, size), own)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def _own_samples(self, size: int) -> tuple[int, bool]:
        """How many samples of this batch are not copies, and whether any process has copies in its batch."""
        alike = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # processes with the same data
        index, count = self.args.process_index // alike, self.args.world_size // alike
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or not 0 < state.remainder < size * count:
            return size, False
        return min(max(state.remainder - index * size, 0), size), True

    def _add_loss(self, loss: torch.Tensor, inputs: Mapping[str, Any], own: int) -> None:
        labels = [inputs[name] for name in self.label_names if inputs.get(name) is not None]
        items = predicted_items(labels[0], self._is_causal_lm) if len(labels) == 1 else own
        if items:
            self._sums.items += items
            self._sums.loss += items * loss.item()

    @names_lost_processes
    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate; the loss is the mean over all items, and the quality of a causal language model joins it, see `Sums`."""
        self._sums = Sums()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.evaluated[metric_key_prefix] = describe_data(getattr(dataloader, "dataset", None))
        model = self.accelerator.unwrap_model(self.model)
        are_bytes = tokens_are_bytes(self.processing_class, getattr(config_of(model), "vocab_size", None))
        means = self._sums.over_processes().means(are_bytes)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})


def _first(inputs: Mapping[str, Any], count: int, size: int) -> dict[str, Any]:
    """The inputs of the first `count` of `size` samples."""
    return {
        name: value[:count] if torch.is_tensor(value) and value.ndim and len(value) == size else value
        for name, value in inputs.items()
    }
