"""Train or evaluate a model that tags the words of a text, such as the names in it, read as bytes or in any tokens.

    hf-rezero classify-tokens --train_file train.jsonl --validation_file dev.jsonl --output_dir outputs/names \
        --do_train --do_eval --config_overrides num_hidden_layers=6,hidden_size=128 --learning_rate 1e-3
    hf-rezero classify-tokens --dataset_name eriktks/conll2003 --model_name_or_path google-bert/bert-base-cased \
        --output_dir outputs/conll --do_train --do_eval --metric_name seqeval

A row has the words of a text and one tag for each: lists in .json, .jsonl, .parquet and data sets, texts with a space between
two words or tags in .csv and .tsv. The words are read with a space between them. The first token of a word, or its first
byte, carries the tag; `--label_all_tokens` puts one on its others too. The metrics are the accuracy over the words and the F1
of the tags, averaged over them; `--metric_name seqeval` scores whole entities. `--do_predict` leaves `predict_results.txt`,
with the tags of the words of each text, and `_` for a word that was not read.
"""

from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    set_seed,
)

from .. import ReZeroTrainer, ReZeroTrainingArguments
from . import summary
from .classify_texts import TextClassifierArguments
from .entry import run_command
from .labels import IGNORED, Tags, has_labels, items_of, tags_of, with_metric, with_names_of
from .lora import check_adapters, with_adapters
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


UNREAD = "_"  # in place of the tag of a word that has no token
FIRST_TOKENS = "first_tokens"  # of each word of a row, -1 where it has none


@dataclass
class DataArguments(RowArguments):
    """The words and their tags."""

    task_name: str = field(default="ner", metadata={"help": "Names the column of tags, such as ner_tags or pos_tags."})
    text_column_name: str = field(default="tokens", metadata={"help": "Column of the words."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the tags; default: --task_name with _tags behind it."}
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Tags on all tokens of a word, where B- is followed by I-."}
    )
    return_entity_level_metrics: bool = field(
        default=False, metadata={"help": "What --metric_name finds for each kind of entity, too."}
    )

    @property
    def tags(self) -> str:
        """The column of the tags."""
        return self.label_column_name or f"{self.task_name.lower()}_tags"


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (TextClassifierArguments, DataArguments, ReZeroTrainingArguments), summary(__doc__), argv
    )
    check_purpose(training_args, model_args)
    check_adapters(model_args, training_args)
    check_metric(data_args)
    checkpoint = check_output_dir(training_args)
    set_seed(training_args.seed)
    tokenizer = aligned_tokenizer(model_args, data_args.max_seq_length)
    with training_args.main_process_first(desc="reading the words"):
        tables = load_tables(data_args, model_args.cache_dir, model_args.token)
        for part in [part for part in ("train", "validation", "test") if part in tables]:
            check_columns(tables[part], part, data_args)
        tags = tags_of(tables["train"], data_args.tags)
        tags = with_names_of(tags, names_in_checkpoint(model_args))
        tables = cut_validation(tables, data_args.validation_split_percentage)
        encoded = {
            part: encode(tables[part], part, data_args, tags, tokenizer)
            for part in needed_parts(training_args, tables)
        }
    parts = {part: rows.remove_columns(FIRST_TOKENS) for part, rows in encoded.items()}
    model = load_model(
        model_args,
        AutoModelForTokenClassification,
        data_args.max_seq_length,
        tokenizer,
        is_causal=False,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **tags.config(),
    )
    trainer = ReZeroTrainer(
        with_adapters(model, model_args, "TOKEN_CLS"),
        training_args,
        data_collator=DataCollatorForTokenClassification(
            tokenizer,
            padding="max_length" if data_args.pad_to_max_length else "longest",
            max_length=data_args.max_seq_length,
        ),
        train_dataset=parts.get("train"),
        eval_dataset=parts.get("validation"),
        processing_class=tokenizer,
        compute_metrics=with_metric(tags, data_args.metric_name, each_entity=data_args.return_entity_level_metrics),
        distillation=load_teacher_of(model, model_args, training_args),
    )
    return run_and_publish(
        trainer,
        checkpoint,
        predict=lambda: predict_and_save(
            trainer,
            parts["test"],
            lambda logits: tags_of_words(logits, encoded["test"][FIRST_TOKENS], tags),
            has_labels="labels" in parts["test"].column_names,
        ),
        tasks="token-classification",
        dataset=data_args.dataset_name or data_args.train_file,
    )


def check_metric(args: DataArguments) -> None:
    """Refuse to tell entities apart without a module that does.

    Raises:
        ValueError: `--return_entity_level_metrics` without `--metric_name`.
    """
    if args.return_entity_level_metrics and not args.metric_name:
        raise ValueError(
            "--return_entity_level_metrics needs what scores entities: give --metric_name seqeval too, after "
            "`pip install seqeval`."
        )


def aligned_tokenizer(args: TextClassifierArguments, length: int) -> PreTrainedTokenizerBase:
    """The tokenizer of the run, which tells from where in a text its tokens are.

    Raises:
        ValueError: It cannot tell, or whatever `classifying_tokenizer` raises.
    """
    tokenizer = classifying_tokenizer(args, length)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is written in Python and does not tell from where its tokens are: name one of "
            f"the `tokenizers` library with --tokenizer_name, and leave out --use_fast_tokenizer false."
        )
    return tokenizer


def check_columns(table: Dataset, part: str, args: DataArguments) -> None:
    """Refuse a table without the columns of words and tags, or with words that are none."""
    check_has_columns(table, part, {"text": args.text_column_name, "label": args.tags})
    feature = table.features[args.text_column_name]
    if getattr(getattr(feature, "feature", feature), "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"column {args.text_column_name!r} of the {part} part holds {feature}: expected words.")
    check_filled(table, part, args.text_column_name)


def encode(table: Dataset, part: str, args: DataArguments, tags: Tags, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Turn the first rows, as many as asked for, into tokens, the tags that a model learns, and `FIRST_TOKENS`.

    Raises:
        ValueError: A row has no words, or not one tag for each.
    """
    table = first_rows(table, part, args)
    feature = table.features[args.tags] if has_labels(table, part, args.tags, tags) else None
    inside = inside_tags(tags.names) if args.label_all_tokens else None

    def convert(row, index):
        words = items_of(row[args.text_column_name])
        given = tags.encode(feature, row[args.tags] or []) if feature is not None else None
        if not words or None in words or given is not None and len(given) != len(words):
            told = "" if given is None else f" and {len(given)} tags"
            raise ValueError(f"row {index} of the {part} part has {len(words)} words{told}: expected one tag a word.")
        ids, word_of_token = tokenize_words(words, tokenizer, args.max_seq_length)
        firsts = [word_of_token.index(n) if n in word_of_token else -1 for n in range(len(words))]
        labels = {} if given is None else {"labels": aligned(word_of_token, given, inside)}
        return {"input_ids": ids, **labels, FIRST_TOKENS: firsts}

    options = {"load_from_cache_file": not args.overwrite_cache, "remove_columns": table.column_names}
    encoded = table.map(convert, with_indices=True, desc=f"reading {part}", **options)
    unread = sum(first < 0 for firsts in encoded[FIRST_TOKENS] for first in firsts)
    if unread:
        print(
            f"{unread} words of the {part} part have no token: most are behind --max_seq_length {args.max_seq_length}."
        )
    return encoded


def tokenize_words(words: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[int], list[int]]:
    """The ids of words with a space between them, and of each the word in which it starts, -1 where it is in none.

    Example:
        >>> from hf_rezero import byte_tokenizer
        >>> tokenize_words(["to", "be"], byte_tokenizer(), 512)
        ([116, 111, 32, 98, 101], [0, 0, -1, 1, 1])
    """
    encoded = tokenizer(" ".join(words), truncation=True, max_length=length, return_offsets_mapping=True)
    of_character = [n for n, word in enumerate(words) for n in [*[n] * len(word), -1]]
    spans = (of_character[start:stop] for start, stop in encoded["offset_mapping"])
    return encoded["input_ids"], [next((n for n in span if n >= 0), -1) for span in spans]


def aligned(word_of_token: list[int], given: list[int], inside: list[int] | None) -> list[int]:
    """The tags of tokens: that of its word for the first of each, and of the others those of `inside`, or none.

    Example:
        >>> aligned([-1, 0, 0, 1], [3, 5], None)
        [-100, 3, -100, 5]
        >>> aligned([-1, 0, 0, 1], [3, 5], [0, 1, 2, 4, 4, 5])
        [-100, 3, 4, 5]
    """
    labels, before = [], -1
    for word in word_of_token:
        if word < 0:
            labels.append(IGNORED)
        elif word > before:
            labels.append(given[word])
        else:
            labels.append(IGNORED if inside is None else inside[given[word]])
        before = max(before, word)
    return labels


def inside_tags(names: list[str]) -> list[int]:
    """The tag of the later tokens of a word for each tag of a word: I- follows B-, where there is such a tag.

    Example:
        >>> inside_tags(["B-PER", "I-PER", "O", "B-X"])
        [1, 1, 2, 3]
    """
    later = ["I-" + name.removeprefix("B-") if name.startswith("B-") else name for name in names]
    return [names.index(name) if name in names else n for n, name in enumerate(later)]


def tags_of_words(logits: np.ndarray, first_tokens: list[list[int]], tags: Tags) -> list[str]:
    """The tags of the words of each text, from logits (N, T, C) at their first tokens."""
    return [
        " ".join(tags.names[row[first].argmax()] if first >= 0 else UNREAD for first in firsts)
        for row, firsts in zip(logits, first_tokens, strict=True)
    ]


if __name__ == "__main__":
    run_command(main)
