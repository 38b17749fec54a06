"""The rows of a table that a classifier learns from: files or data sets, their parts, and who tokenizes them."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .. import ReZeroTrainingArguments
from ..data.tables import load_table
from .running import TextModelArguments, choose_tokenizer


# tsv as GLUE has it: a quotation mark is a character like any other
READERS = {
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
COMPRESSED = (".xz", ".gz", ".bz2", ".zip")
SPLIT_SEED = 0


@dataclass
class RowArguments:
    """The rows to train on, evaluate on and predict."""

    dataset_name: str | None = field(default=None, metadata={"help": "A `datasets` name or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None, metadata={"help": ".tsv .csv .json .jsonl, also .xz .gz .bz2 .zip; .parquet."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Default: cut from the training rows."})
    test_file: str | None = field(default=None, metadata={"help": "Texts for --do_predict; labels are optional."})
    validation_split_percentage: float = field(
        default=5,
        metadata={
            "help": f"Part of the training rows cut off if there are no others, by the fixed seed {SPLIT_SEED}."
        },
    )
    metric_name: str | None = field(
        default=None,
        metadata={"help": "A module of `evaluate` to score with, beside our own metrics: a name or path."},
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, whatever the cache holds."})
    max_seq_length: int = field(default=512, metadata={"help": "Texts are cut after so many bytes or tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every batch to --max_seq_length, not to its longest text."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many evaluation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use the first so many test rows."})


def classifying_tokenizer(args: TextModelArguments, length: int) -> PreTrainedTokenizerBase:
    """The tokenizer of the run, which pads on the right, so that positions count from the first token of a text.

    Raises:
        ValueError: It has nothing to pad with.
    """
    tokenizer = choose_tokenizer(args, length)
    tokenizer.model_max_length, tokenizer.padding_side = length, "right"
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} of {len(tokenizer)} tokens has neither a padding nor an end token: set "
            f"tokenizer.pad_token, and save it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tables(args: RowArguments, cache_dir: str | None, token: str | None) -> dict[str, Dataset]:
    """The rows of the parts that there are; a part that has a file is read from it.

    Raises:
        ValueError: Both or none of a data set and a training file, what cannot be read, or no part called train.
    """
    if (args.dataset_name is None) == (args.train_file is None):
        raise ValueError("give exactly one of --dataset_name and --train_file.")
    tables = {}
    if args.dataset_name:
        tables |= load_table(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir, token=token)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    tables |= {part: read_file(file, cache_dir) for part, file in files.items() if file}
    if "train" not in tables:
        raise ValueError(f"{args.dataset_name} has the parts {', '.join(tables)}: one called train is needed.")
    return tables


def read_file(path: str, cache_dir: str | None) -> Dataset:
    """The rows of one file, by its ending."""
    kind = next((suffix for suffix in reversed(Path(path).suffixes) if suffix not in COMPRESSED), "none")
    if kind not in READERS:
        raise ValueError(f"{path} is of type {kind}: use {', '.join(READERS)}, or one of these compressed.")
    reader, options = READERS[kind]
    return load_table(reader, data_files={"train": path}, split="train", cache_dir=cache_dir, **options)


def check_has_columns(table: Dataset, part: str, columns: dict[str, str]) -> None:
    """Refuse a table without some columns; a test part needs no labels.

    Args:
        table: The rows.
        part: Which they are.
        columns: The name of each, by the option that gives it, `{"text": "sentence", "label": "label"}`.

    Raises:
        ValueError: It names the column and the option.
    """
    for option, name in columns.items():
        if name not in table.column_names and (part, option) != ("test", "label"):
            raise ValueError(
                f"the {part} part has no column {name!r}, only {', '.join(table.column_names)}: "
                f"name the right one with --{option}_column_name."
            )


def check_filled(table: Dataset, part: str, column: str) -> None:
    """Refuse rows that have nothing in a column of texts.

    Raises:
        ValueError: There are some.
    """
    missing = table.data.column(column).null_count
    if missing:
        raise ValueError(f"{missing} rows of the {part} part have no text in column {column!r}: remove or fill them.")


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


def first_rows(table: Dataset, part: str, args: RowArguments) -> Dataset:
    """As many rows of a part as were asked for.

    Raises:
        ValueError: There are none.
    """
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    if limits[part] is not None:
        table = table.select(range(min(limits[part], len(table))))
    if not len(table):
        raise ValueError(f"the {part} part has no rows.")
    return table
