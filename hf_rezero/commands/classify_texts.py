"""Train or evaluate a classifier of texts, read as bytes or in the tokens of any tokenizer.

    hf-rezero classify-texts --dataset_name stanfordnlp/sst2 --output_dir outputs/sst2 --do_train --do_eval \
        --config_overrides num_hidden_layers=6,hidden_size=128 --num_train_epochs 3 --learning_rate 1e-3
    hf-rezero classify-texts --train_file train.tsv.xz --validation_file dev.tsv --test_file test.tsv \
        --model_name_or_path outputs/mlm --output_dir outputs/mine --do_train --do_eval --do_predict
    hf-rezero classify-texts --task_name stsb --tokenizer_name outputs/bpe --output_dir outputs/stsb --do_train --do_eval

Files are .tsv, .csv, .json or .jsonl, also compressed, with a column of texts and, but for testing, one of labels: classes,
fractions for a regression, or lists of classes of which a text may have several. `--text_pair_column_name` names a second
text of each row. A new model is a bidirectional encoder; `--model_name_or_path` starts from what `hf-rezero mlm`, `hf-rezero clm` or this script
left. Beside the checkpoint a finished run leaves `all_results.json`, `training.png` and `resweights.png`, and
`--do_predict` leaves `predict_results.txt`, one `index<TAB>label` for every text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

from .. import ReZeroTrainer, ReZeroTrainingArguments
from . import summary
from .entry import run_command
from .labels import Labels, has_labels, labels_of, with_metric, with_names_of
from .lora import AdaptedModelArguments, check_adapters, with_adapters
from .rows import (
    RowArguments,
    check_filled,
    check_has_columns,
    classifying_tokenizer,
    cut_validation,
    first_rows,
    load_tables,
    needed_parts,
)
from .running import (
    check_output_dir,
    check_purpose,
    load_model,
    load_teacher_of,
    names_in_checkpoint,
    parse_arguments,
    predict_and_save,
    run_and_publish,
)


# the columns of texts of each task of GLUE
TASKS = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
GLUE = "nyu-mll/glue"


@dataclass
class TextClassifierArguments(AdaptedModelArguments):
    """The model to train."""

    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new classifier where a checkpoint has other classes."}
    )


@dataclass
class DataArguments(RowArguments):
    """The texts and their labels."""

    task_name: str | None = field(
        default=None, metadata={"help": f"A task of GLUE: {', '.join(TASKS)}; in place of a data set and its columns."}
    )
    text_column_name: str = field(default="sentence", metadata={"help": "Column of the texts."})
    text_pair_column_name: str | None = field(default=None, metadata={"help": "Column of a second text, if any."})
    label_column_name: str = field(
        default="label", metadata={"help": "Column of the labels: numbers or names, fractions, or lists of names."}
    )

    def __post_init__(self):
        if self.task_name is None:
            return
        if self.task_name not in TASKS or self.dataset_name or self.train_file:
            raise ValueError(
                f"got --task_name {self.task_name}: expected one of {', '.join(TASKS)}, and no --dataset_name or --train_file."
            )
        self.dataset_name, self.dataset_config_name = GLUE, self.task_name
        self.text_column_name, self.text_pair_column_name = TASKS[self.task_name]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (TextClassifierArguments, DataArguments, ReZeroTrainingArguments), summary(__doc__), argv
    )
    check_purpose(training_args, model_args)
    check_adapters(model_args, training_args)
    checkpoint = check_output_dir(training_args)
    set_seed(training_args.seed)
    tokenizer = classifying_tokenizer(model_args, data_args.max_seq_length)
    with training_args.main_process_first(desc="reading the texts"):
        tables = load_texts(data_args, model_args.cache_dir, model_args.token)
        labels = labels_of(tables["train"], data_args.label_column_name)
        labels = with_names_of(labels, names_in_checkpoint(model_args))
        tables = cut_validation(tables, data_args.validation_split_percentage)
        parts = {
            part: encode(tables[part], part, data_args, labels, tokenizer)
            for part in needed_parts(training_args, tables)
        }
    model = load_model(
        model_args,
        AutoModelForSequenceClassification,
        data_args.max_seq_length,
        tokenizer,
        is_causal=False,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **labels.config(),
    )
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last token before it
    distillation = load_teacher_of(model, model_args, training_args)
    model = with_adapters(model, model_args, "SEQ_CLS")
    trainer = ReZeroTrainer(
        model,
        training_args,
        data_collator=DataCollatorWithPadding(tokenizer, "max_length" if data_args.pad_to_max_length else "longest"),
        train_dataset=parts.get("train"),
        eval_dataset=parts.get("validation"),
        processing_class=tokenizer,
        compute_metrics=with_metric(labels, data_args.metric_name),
        distillation=distillation,
    )
    return run_and_publish(
        trainer,
        checkpoint,
        predict=lambda: predict_and_save(
            trainer, parts["test"], labels.decode, has_labels="labels" in parts["test"].column_names
        ),
        tasks="text-classification",
        dataset=data_args.dataset_name or data_args.train_file,
    )


def load_texts(args: DataArguments, cache_dir: str | None, token: str | None) -> dict[str, Dataset]:
    """The rows of train, validation and test, as far as there are any, with the columns that were named."""
    tables = load_tables(args, cache_dir, token)
    if args.task_name == "mnli":
        tables |= {part: tables[f"{part}_matched"] for part in ("validation", "test")}
    for part in [part for part in ("train", "validation", "test") if part in tables]:
        check_columns(tables[part], part, args)
    return tables


def check_columns(table: Dataset, part: str, args: DataArguments) -> None:
    """Refuse a table without the columns of texts and labels, or with texts that are none."""
    texts = {"text": args.text_column_name, "text_pair": args.text_pair_column_name}
    texts = {option: name for option, name in texts.items() if name}
    check_has_columns(table, part, {**texts, "label": args.label_column_name})
    for text in texts.values():
        if getattr(table.features[text], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"column {text!r} of the {part} part is not text but {table.features[text]}.")
        check_filled(table, part, text)


def encode(table: Dataset, part: str, args: DataArguments, labels: Labels, tokenizer) -> Dataset:
    """Turn the first rows, as many as asked for, into tokens and the labels that a model learns."""
    table = first_rows(table, part, args)
    label = args.label_column_name
    feature = table.features[label] if has_labels(table, part, label, labels) else None

    def convert(rows):
        seconds = rows[args.text_pair_column_name] if args.text_pair_column_name else None
        encoded = dict(tokenize(rows[args.text_column_name], seconds, tokenizer, args.max_seq_length))
        if feature is not None:
            encoded["labels"] = [labels.encode(feature, value) for value in rows[label]]
        return encoded

    options = {"load_from_cache_file": not args.overwrite_cache, "remove_columns": table.column_names}
    return table.map(convert, batched=True, desc=f"reading {part}", **options)


def tokenize(texts: list[str], seconds: list[str] | None, tokenizer, length: int) -> dict[str, list]:
    """The inputs of texts, or of pairs of them, cut to a length.

    A tokenizer that has a form of its own for pairs gives them that. Without one, as bytes are, the separator or the
    end token stands between the two, the longer of which is cut.
    """
    if seconds is None:
        encoded = tokenizer(texts, truncation=True, max_length=length)
    elif tokenizer.num_special_tokens_to_add(pair=True):
        encoded = tokenizer(texts, seconds, truncation=True, max_length=length)
    else:
        encoded = {"input_ids": list(_joined(texts, seconds, tokenizer, length))}
    if any(not ids for ids in encoded["input_ids"]):  # a text without tokens still needs one
        encoded = {"input_ids": [ids or [tokenizer.all_special_ids[0]] for ids in encoded["input_ids"]]}
    return {name: values for name, values in encoded.items() if name != "attention_mask"}  # which padding makes


def _joined(texts: list[str], seconds: list[str], tokenizer, length: int) -> Iterator[list[int]]:
    separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    if separator is None:
        raise ValueError(f"{type(tokenizer).__name__} has no separator and no end token to put between two texts.")
    for text, second in zip(texts, seconds, strict=True):
        a, b = (tokenizer(one, add_special_tokens=False, verbose=False).input_ids for one in (text, second))
        room = length - 1
        longest = max(room - min(len(a), len(b)), (room + 1) // 2)
        a = a[:longest]
        yield [*a, separator, *b[: room - len(a)]]


if __name__ == "__main__":
    run_command(main)
