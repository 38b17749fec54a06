"""Train or evaluate a masked language model, an encoder, on raw bytes or in the tokens of any tokenizer.

    hf-rezero mlm --dataset_name python-stdlib --output_dir outputs/mlm --do_train --do_eval --do_predict \
        --config_overrides num_hidden_layers=12,hidden_size=256 --max_steps 1000 --learning_rate 2e-3

Arguments, data and what a finished run leaves are those of `hf-rezero clm`. As in BERT (Devlin et al. 2019,
arXiv:1810.04805), a part of the bytes or tokens is to be predicted: 80 % of them are replaced by `<|mask|>`, 10 % by a random
token, 10 % are left as they are. `eval_loss` is nats per predicted byte or token, `eval_perplexity` its exponential, and
`eval_accuracy` the share of right answers, all exact for any batch size and number of processes.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, EvalPrediction, set_seed

from .. import ReZeroTrainer, ReZeroTrainingArguments
from ..data.masking import MaskedBytes
from ..data.streams import MaskedStream
from ..data.windows import collate_bytes
from . import summary
from .entry import run_command
from .lora import AdaptedModelArguments, check_adapters, with_adapters
from .running import (
    check_output_dir,
    check_purpose,
    choose_tokenizer,
    evaluate_and_save,
    load_model,
    load_teacher_of,
    parse_arguments,
    run_and_publish,
)
from .texts import DataArguments, load_windows, shortened, source_of


@dataclass
class MaskedDataArguments(DataArguments):
    """The bytes to train on, and how many of them to mask."""

    # no argument: evaluation windows do not overlap
    eval_stride: None = field(default=None, init=False)  # pyright: ignore[reportIncompatibleVariableOverride]
    mlm_probability: float = field(default=0.15, metadata={"help": "Part of the bytes that is to be predicted."})

    def __post_init__(self):
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"mlm_probability={self.mlm_probability}: choose a part of the bytes, above 0 and up to 1."
            )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (AdaptedModelArguments, MaskedDataArguments, ReZeroTrainingArguments), summary(__doc__), argv
    )
    check_purpose(training_args, model_args)
    check_adapters(model_args, training_args)
    checkpoint = check_output_dir(training_args)
    set_seed(training_args.seed)
    tokenizer = choose_tokenizer(model_args, data_args.block_size)
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} of {len(tokenizer)} tokens has no mask token: name another --tokenizer_name, or "
            f"give it one, tokenizer.add_special_tokens({{'mask_token': '<|mask|>'}}), and save it."
        )
    model = load_model(model_args, AutoModelForMaskedLM, data_args.block_size, tokenizer, is_causal=False)
    distillation = load_teacher_of(model, model_args, training_args)
    model = with_adapters(model, model_args, None)
    with training_args.main_process_first(desc="reading the corpus"):
        texts, stream = load_windows(data_args, model_args, training_args, tokenizer)

    def windows(part: str, count: int | None, fixed: bool = True):
        ids, size = texts[part].ids, data_args.block_size
        return shortened(MaskedBytes(ids, size, data_args.mlm_probability, fixed, tokenizer), count)

    train = MaskedStream(stream, data_args.mlm_probability, training_args.seed) if stream else None
    if "train" in texts:
        train = windows("train", data_args.max_train_samples, fixed=False)
    trainer = ReZeroTrainer(
        model,
        training_args,
        data_collator=collate_bytes,
        train_dataset=train,
        eval_dataset=windows("validation", data_args.max_eval_samples) if "validation" in texts else None,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=score_windows,
        compute_metrics=add_up,
        distillation=distillation,
    )

    def predict() -> dict[str, float]:
        return evaluate_and_save(trainer, windows("test", data_args.max_eval_samples), "test")

    return run_and_publish(trainer, checkpoint, predict, tasks="fill-mask", dataset=source_of(data_args))


def score_windows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, T, V) -> (B, 3): nats, right answers and number of predicted bytes of each window."""
    nll = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    right, asked = logits.argmax(-1).eq(labels), labels.ne(-100)
    return torch.stack((nll.sum(1), right.sum(1).float(), asked.sum(1).float()), dim=1)


def add_up(prediction: EvalPrediction) -> dict[str, float]:
    """Mean over all predicted bytes; `loss` takes the place of the Trainer's mean of batch means."""
    nll, right, asked = prediction.predictions.sum(0, dtype=np.float64)
    perplexity = np.exp(min(nll / asked, 700))  # short of the largest number
    return {"loss": float(nll / asked), "perplexity": float(perplexity), "accuracy": float(right / asked)}


if __name__ == "__main__":
    run_command(main)
