"""Train or evaluate a classifier of texts, read as bytes.

    hf-rezero classify-texts --dataset_name stanfordnlp/sst2 --output_dir outputs/sst2 --do_train --do_eval \
        --config_overrides num_hidden_layers=6,hidden_size=128 --num_train_epochs 3 --learning_rate 1e-3
    hf-rezero classify-texts --train_file train.tsv.xz --validation_file dev.tsv --test_file test.tsv \
        --model_name_or_path outputs/mlm --output_dir outputs/mine --do_train --do_eval --do_predict

Files are .tsv, .csv, .json or .jsonl, also compressed, with a column of texts and, but for testing, one of labels. A
new model is a bidirectional encoder; `--model_name_or_path` starts from what `hf-rezero mlm`, `hf-rezero clm` or this script
left. Beside the checkpoint a finished run leaves `all_results.json`, `training.png` and `resweights.png`, and
`--do_predict` leaves `predict_results.txt`, one `index<TAB>label` for every text.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

from .. import ReZeroTrainer, ReZeroTrainingArguments
from ..data.tables import load_table
from . import summary
from .entry import run_command
from .running import (
    ModelArguments,
    accuracy,
    check_output_dir,
    check_purpose,
    choose_tokenizer,
    load_model,
    parse_arguments,
    predict_and_save,
    run_and_publish,
)


# tsv as GLUE has it: a quotation mark is a character like any other
READERS = {
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
COMPRESSED = (".xz", ".gz", ".bz2", ".zip")
NO_LABEL = {-1, None, ""}  # -1 is what GLUE writes in place of the labels of its test sets
SPLIT_SEED = 0


@dataclass
class DataArguments:
    """The texts and their labels."""

    dataset_name: str | None = field(default=None, metadata={"help": "A `datasets` name or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": ".tsv .csv .json .jsonl, also .xz .gz .bz2 .zip."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: cut from the training rows."})
    test_file: str | None = field(default=None, metadata={"help": "Texts for --do_predict; labels are optional."})
    validation_split_percentage: float = field(
        default=5,
        metadata={
            "help": f"Part of the training rows cut off if there are no others, by the fixed seed {SPLIT_SEED}."
        },
    )
    text_column_name: str = field(default="sentence", metadata={"help": "Column of the texts."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels, numbers or names."})
    max_seq_length: int = field(default=512, metadata={"help": "Texts are cut after so many bytes."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every batch to --max_seq_length, not to its longest text."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many evaluation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use the first so many test rows."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, ReZeroTrainingArguments), summary(__doc__), argv
    )
    check_purpose(training_args)
    checkpoint = check_output_dir(training_args)
    set_seed(training_args.seed)
    tokenizer = choose_tokenizer(model_args, data_args.max_seq_length)
    tokenizer.padding_side = "right"  # so that positions count from the first byte of a text
    with training_args.main_process_first(desc="reading the texts"):
        tables = load_tables(data_args, model_args.cache_dir, model_args.token)
        labels = label_names(tables["train"], data_args.label_column_name)
        tables = cut_validation(tables, data_args.validation_split_percentage)
        parts = {
            part: encode(tables[part], part, data_args, labels, tokenizer)
            for part in needed_parts(training_args, tables)
        }
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    trainer = ReZeroTrainer(
        load_model(
            model_args,
            AutoModelForSequenceClassification,
            data_args.max_seq_length,
            tokenizer,
            is_causal=False,
            **names,
        ),
        training_args,
        data_collator=DataCollatorWithPadding(tokenizer, "max_length" if data_args.pad_to_max_length else "longest"),
        train_dataset=parts.get("train"),
        eval_dataset=parts.get("validation"),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    return run_and_publish(
        trainer,
        checkpoint,
        predict=lambda: predict_and_save(
            trainer, parts["test"], labels, has_labels="labels" in parts["test"].column_names
        ),
        tasks="text-classification",
        dataset=data_args.dataset_name or data_args.train_file,
    )


def load_tables(args: DataArguments, cache_dir: str | None, token: str | None) -> dict[str, Dataset]:
    """The rows of train, validation and test, as far as there are any; a part that has a file is read from it."""
    if (args.dataset_name is None) == (args.train_file is None):
        raise ValueError("give exactly one of --dataset_name and --train_file.")
    tables = {}
    if args.dataset_name:
        tables |= load_table(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir, token=token)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    tables |= {part: read_file(file, cache_dir) for part, file in files.items() if file}
    if "train" not in tables:
        raise ValueError(f"{args.dataset_name} has the parts {', '.join(tables)}: one called train is needed.")
    for part in [part for part in files if part in tables]:
        check_columns(tables[part], part, args)
    return tables


def read_file(path: str, cache_dir: str | None) -> Dataset:
    """The rows of one file, by its ending."""
    kind = next((suffix for suffix in reversed(Path(path).suffixes) if suffix not in COMPRESSED), "none")
    if kind not in READERS:
        raise ValueError(f"{path} is of type {kind}: use {', '.join(READERS)}, or one of these compressed.")
    reader, options = READERS[kind]
    return load_table(reader, data_files={"train": path}, split="train", cache_dir=cache_dir, **options)


def check_columns(table: Dataset, part: str, args: DataArguments) -> None:
    """Refuse a table without the columns of texts and labels, or with texts that are none."""
    text, label = args.text_column_name, args.label_column_name
    for option, name in (("text", text), ("label", label)):
        if name not in table.column_names and (part, option) != ("test", "label"):
            raise ValueError(
                f"the {part} part has no column {name!r}, only {', '.join(table.column_names)}: "
                f"name the right one with --{option}_column_name."
            )
    if getattr(table.features[text], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"column {text!r} of the {part} part is not text but {table.features[text]}.")
    missing = table.data.column(text).null_count
    if missing:
        raise ValueError(f"{missing} rows of the {part} part have no text in column {text!r}: remove or fill them.")


def label_names(table: Dataset, column: str) -> list[str]:
    """The names of the classes, in the order of their ids: the sorted order of what the column holds."""
    feature = table.features[column]
    if not getattr(feature, "dtype", "").startswith(("int", "uint", "bool", "string", "large_string")):
        raise ValueError(f"column {column!r} holds {feature}: labels are whole numbers or names.")
    values = table.unique(column)
    if None in values or "" in values:
        raise ValueError(f"some training rows have no label in column {column!r}: remove or fill them.")
    if len(values) < 2:
        raise ValueError(f"column {column!r} holds {len(values)} label, {values}: two are needed to tell apart.")
    return [label_name(feature, value) for value in sorted(values)]


def label_name(feature, value) -> str:
    """The name of one label, by which parts of different origin understand each other."""
    named = isinstance(feature, ClassLabel) and value not in NO_LABEL
    return str(feature.int2str(value) if named else value)


def cut_validation(tables: dict[str, Dataset], percentage: float) -> dict[str, Dataset]:
    """Cut a validation part from the training rows if there is none, the same rows for every `--seed`."""
    if "validation" in tables or not percentage:
        return tables
    halves = tables["train"].train_test_split(percentage / 100, seed=SPLIT_SEED)
    return {**tables, "train": halves["train"], "validation": halves["test"]}


def needed_parts(args: ReZeroTrainingArguments, tables: dict[str, Dataset]) -> list[str]:
    """The parts that the run needs."""
    evaluates = args.do_eval or args.eval_strategy != "no"
    needs = {"train": args.do_train, "validation": evaluates, "test": args.do_predict}
    for part, needed in needs.items():
        if needed and part not in tables:
            raise ValueError(f"there are no rows for {part}: give --{part}_file.")
    return [part for part, needed in needs.items() if needed]


def encode(table: Dataset, part: str, args: DataArguments, labels: list[str], tokenizer) -> Dataset:
    """Turn the first rows, as many as asked for, into bytes and the ids of their labels."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    if limits[part] is not None:
        table = table.select(range(min(limits[part], len(table))))
    if not len(table):
        raise ValueError(f"the {part} part has no rows.")
    text, label = args.text_column_name, args.label_column_name
    feature = table.features[label] if has_labels(table, part, label, labels) else None

    def convert(rows):
        # a text without bytes still needs one token
        ids = [ids or [tokenizer.bos_token_id] for ids in tokenizer(rows[text], truncation=True).input_ids]
        encoded = {"input_ids": ids}
        if feature is not None:
            encoded["labels"] = [labels.index(label_name(feature, value)) for value in rows[label]]
        return encoded

    return table.map(convert, batched=True, remove_columns=table.column_names, desc=f"reading {part}")


def has_labels(table: Dataset, part: str, column: str, labels: list[str]) -> bool:
    """Whether the rows have labels; those of a test part may be missing or hidden."""
    if column not in table.column_names:
        return False
    values = table.unique(column)
    unknown = {label_name(table.features[column], value) for value in values} - set(labels)
    if unknown and part == "test" and NO_LABEL.issuperset(values):
        return False
    if unknown:
        raise ValueError(
            f"the {part} part has the labels {', '.join(sorted(unknown))}, which the training rows do not have: "
            f"those are {', '.join(labels)}."
        )
    return True


if __name__ == "__main__":
    run_command(main)
