"""Train or evaluate a causal language model on raw bytes.

    hf-rezero clm scripts/configs/quickstart.yaml
    hf-rezero clm --train_file text.xz --config_overrides num_hidden_layers=64,hidden_size=256 \
        --output_dir outputs/mine --do_train --do_eval --do_predict --max_steps 1000 --learning_rate 2e-3

The first argument may be a YAML or JSON file of arguments; the command line wins over it. Runs on one process, or on
several through `torchrun` or `accelerate launch`. Beside the checkpoint a finished run leaves `all_results.json`,
`training.png` and `resweights.png`.
"""

from transformers import AutoModelForCausalLM, set_seed

from .. import ReZeroTrainer, ReZeroTrainingArguments, byte_tokenizer
from ..data.windows import ByteDataset, collate_bytes, evaluation_windows
from . import summary
from .entry import run_command
from .running import (
    DataArguments,
    ModelArguments,
    check_output_dir,
    check_purpose,
    evaluate_and_save,
    load_bytes,
    load_model,
    parse_arguments,
    run_and_publish,
    shortened,
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, ReZeroTrainingArguments), summary(__doc__), argv
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
        train_dataset=shortened(ByteDataset(train, block_size), data_args.max_train_samples)
        if training_args.do_train
        else None,
        eval_dataset=shortened(evaluation_windows(validation, block_size, stride), data_args.max_eval_samples)
        if training_args.do_eval or training_args.eval_strategy != "no"
        else None,
        processing_class=byte_tokenizer(model_max_length=block_size),
    )

    def predict() -> dict[str, float]:
        windows = shortened(evaluation_windows(test, block_size, stride), data_args.max_eval_samples)
        return evaluate_and_save(trainer, windows, "test")

    return run_and_publish(
        trainer,
        checkpoint,
        predict,
        tasks="text-generation",
        dataset=data_args.dataset_name or data_args.train_file,
    )


if __name__ == "__main__":
    run_command(main)
