"""Train or evaluate a causal language model, on raw bytes or in the tokens of any tokenizer.

    hf-rezero clm scripts/configs/quickstart.yaml
    hf-rezero clm --train_file text.xz --config_overrides num_hidden_layers=64,hidden_size=256 \
        --output_dir outputs/mine --do_train --do_eval --do_predict --max_steps 1000 --learning_rate 2e-3
    hf-rezero clm --tokenizer_name outputs/bpe --train_file text.xz --output_dir outputs/tokens --do_train --do_eval

The first argument may be a YAML or JSON file of arguments; the command line wins over it. Runs on one process, or on
several through `torchrun` or `accelerate launch`. Beside the checkpoint a finished run leaves `all_results.json`,
`training.png` and `resweights.png`.
"""

from transformers import AutoModelForCausalLM, set_seed

from .. import ReZeroTrainer, ReZeroTrainingArguments
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
from .texts import DataArguments, load_windows, scored_windows, source_of, training_windows


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (AdaptedModelArguments, DataArguments, ReZeroTrainingArguments), summary(__doc__), argv
    )
    check_purpose(training_args, model_args)
    check_adapters(model_args, training_args)
    checkpoint = check_output_dir(training_args)
    set_seed(training_args.seed)
    tokenizer = choose_tokenizer(model_args, data_args.block_size)
    model = load_model(model_args, AutoModelForCausalLM, data_args.block_size, tokenizer, is_causal=True)
    distillation = load_teacher_of(model, model_args, training_args)
    model = with_adapters(model, model_args, "CAUSAL_LM")
    with training_args.main_process_first(desc="reading the corpus"):
        texts, stream = load_windows(data_args, model_args, training_args, tokenizer)
    trainer = ReZeroTrainer(
        model,
        training_args,
        data_collator=collate_bytes,
        train_dataset=training_windows(texts["train"], data_args) if "train" in texts else stream,
        eval_dataset=scored_windows(texts["validation"], data_args) if "validation" in texts else None,
        processing_class=tokenizer,
        distillation=distillation,
    )

    def predict() -> dict[str, float]:
        return evaluate_and_save(trainer, scored_windows(texts["test"], data_args), "test")

    return run_and_publish(trainer, checkpoint, predict, tasks="text-generation", dataset=source_of(data_args))


if __name__ == "__main__":
    run_command(main)
