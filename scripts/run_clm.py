"""Train or evaluate a causal language model on raw bytes.

    python scripts/run_clm.py scripts/configs/quickstart.yaml
    python scripts/run_clm.py --train_file text.xz --config_overrides num_hidden_layers=64,hidden_size=256 \
        --output_dir outputs/mine --do_train --do_eval --do_predict --max_steps 1000 --learning_rate 2e-3

The first argument may be a YAML or JSON file of arguments; the command line wins over it. Runs on one process, or on
several through `torchrun` or `accelerate launch`. Beside the checkpoint a finished run leaves `all_results.json`,
`training.png` and `resweights.png`.
"""

from dataclasses import dataclass, field

from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, set_seed

from hf_rezero import ReZeroTrainer, ReZeroTrainingArguments, byte_tokenizer, load_corpus
from hf_rezero.cli import (
    ModelArguments,
    check_output_dir,
    check_purpose,
    evaluate_and_save,
    load_model,
    parse_arguments,
    run,
)
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows


@dataclass
class DataArguments:
    """The bytes to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "python-stdlib, enwik8, or a `datasets` name with a text column."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "Any file, read as bytes; .xz .gz .bz2 .zip too."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: cut from the training file."})
    test_file: str | None = field(default=None, metadata={"help": "Default: cut from the training file."})
    validation_split_percentage: float = field(default=5, metadata={"help": "Part cut off for validation."})
    test_split_percentage: float = field(default=5, metadata={"help": "Part cut off, at the end, for testing."})
    block_size: int = field(default=512, metadata={"help": "Bytes of a training or evaluation window."})
    eval_stride: int | None = field(
        default=None,
        metadata={"help": "Step between evaluation windows; every byte is scored once. Default: half a window."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training windows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many evaluation windows."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, ReZeroTrainingArguments), __doc__.splitlines()[0], argv
    )
    check_purpose(training_args)
    checkpoint = check_output_dir(training_args)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="reading the corpus"):
        train, validation, test = load_bytes(data_args, model_args.cache_dir)
    model = load_model(model_args, AutoModelForCausalLM, data_args.block_size, is_causal=True)
    block_size, stride = data_args.block_size, data_args.eval_stride
    trainer = ReZeroTrainer(
        model,
        training_args,
        data_collator=collate_bytes,
        train_dataset=first(ByteDataset(train, block_size), data_args.max_train_samples)
        if training_args.do_train
        else None,
        eval_dataset=first(evaluation_windows(validation, block_size, stride), data_args.max_eval_samples)
        if training_args.do_eval or training_args.eval_strategy != "no"
        else None,
        processing_class=byte_tokenizer(model_max_length=block_size),
    )

    def predict() -> dict[str, float]:
        windows = first(evaluation_windows(test, block_size, stride), data_args.max_eval_samples)
        return evaluate_and_save(trainer, windows, "test")

    return run(
        trainer,
        checkpoint,
        predict,
        tasks="text-generation",
        dataset=data_args.dataset_name or data_args.train_file,
    )


def first(dataset: ByteDataset, count: int | None):
    """The first `count` windows, or all."""
    return dataset if count is None else Subset(dataset, range(min(count, len(dataset))))


def load_bytes(args: DataArguments, cache_dir: str | None):
    """The three parts of the corpus; a part with a file of its own is not cut from the training file."""
    if (args.dataset_name is None) == (args.train_file is None):
        raise ValueError("give exactly one of --dataset_name and --train_file.")
    if args.train_file is None:
        corpus = load_corpus(args.dataset_name, config_name=args.dataset_config_name, cache_dir=cache_dir)
        return corpus.train, corpus.validation, corpus.test
    validation = 0 if args.validation_file else args.validation_split_percentage / 100
    test = 0 if args.test_file else args.test_split_percentage / 100
    corpus = load_corpus(args.train_file, split=(1 - validation - test, validation, test), cache_dir=cache_dir)
    parts = [corpus.train, corpus.validation, corpus.test]
    for index, file in ((1, args.validation_file), (2, args.test_file)):
        if file:
            parts[index] = load_corpus(file, split=(1, 0, 0), cache_dir=cache_dir).train
    return parts


if __name__ == "__main__":
    main()
