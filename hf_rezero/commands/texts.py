"""The texts of a language model: which to read, in which tokens, and in which windows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from ..data.corpora import Corpus, load_corpus, reader_of
from ..data.download import MAX_CORPUS_BYTES
from ..data.streams import StreamedWindows
from ..data.tables import load_table
from ..data.tokens import Tokens, load_tokens
from ..data.units import tokens_are_bytes
from ..data.windows import ByteDataset, evaluation_windows
from ..trainer.arguments import ReZeroTrainingArguments
from .running import ModelArguments


BYTES_OF_A_TOKEN = 16  # more than any usual tokenizer has on average


@dataclass
class DataArguments:
    """The text to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "python-stdlib, enwik8, a folder, or a `datasets` name with a text column."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Any file, read as it is; .xz .gz .bz2 .zip too; the rows of a .parquet, .jsonl, .json or .csv."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Default: cut from the training file."})
    test_file: str | None = field(default=None, metadata={"help": "Default: cut from the training file."})
    text_column_name: str = field(default="text", metadata={"help": "Column of the texts, where they are rows."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line ends of a file of plain text."})
    validation_split_percentage: float = field(default=5, metadata={"help": "Part cut off for validation."})
    test_split_percentage: float = field(default=5, metadata={"help": "Part cut off, at the end, for testing."})
    block_size: int = field(
        default=512, metadata={"help": "Bytes or tokens of a training or evaluation window; the tokenizer says which."}
    )
    eval_stride: int | None = field(
        default=None,
        metadata={"help": "Step between evaluation windows; every token is scored once. Default: half a window."},
    )
    max_corpus_bytes: int = field(
        default=MAX_CORPUS_BYTES,
        metadata={"help": "Stop a download, and the unpacking of an archive, that is larger."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training windows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many evaluation windows."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; default: one, with the threads of `tokenizers`."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the rows of a data set as they come, for --max_steps, and keep none."}
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Rows of a stream that are held to be shuffled; 0: in their own order."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, whatever the cache holds."})


def needed_parts(args: ReZeroTrainingArguments) -> list[str]:
    """The parts of the corpus that a run reads."""
    evaluates = args.do_eval or args.eval_strategy != "no"
    needs = {"train": args.do_train, "validation": evaluates, "test": args.do_predict}
    return [part for part, is_needed in needs.items() if is_needed]


def load_text(args: DataArguments, model_args: ModelArguments) -> Corpus:
    """The bytes of the corpus; a part with a file of its own is not cut from the training file.

    Raises:
        ValueError: No corpus, or two, and whatever `load_corpus` raises.
    """
    if args.dataset_name and args.train_file or not (args.dataset_name or args.train_file or args.validation_file):
        raise ValueError("give exactly one of --dataset_name and --train_file, or --validation_file alone.")
    options: dict[str, Any] = {"cache_dir": model_args.cache_dir, "text_column": args.text_column_name}
    options |= {"max_bytes": args.max_corpus_bytes}
    if args.dataset_name:
        corpus = load_corpus(args.dataset_name, config_name=args.dataset_config_name, **options)
    elif args.train_file:
        validation = 0 if args.validation_file else args.validation_split_percentage / 100
        test = 0 if args.test_file else args.test_split_percentage / 100
        corpus = load_corpus(args.train_file, split=(1 - validation - test, validation, test), **options)
    else:
        corpus = Corpus("", *[np.empty(0, np.uint8)] * 3)
    for part, file in (("validation", args.validation_file), ("test", args.test_file)):
        if file:
            own = load_corpus(file, split=(1, 0, 0), **options)
            ends = {name: positions for name, positions in corpus.ends.items() if name != part}
            ends |= {part: own.ends["train"]} if own.ends else {}
            corpus = replace(corpus, **{part: own.train}, ends=ends)
    return corpus if args.keep_linebreaks else _without_linebreaks(corpus)


def _without_linebreaks(corpus: Corpus) -> Corpus:
    parts = {part: getattr(corpus, part) for part in ("train", "validation", "test") if part not in corpus.ends}
    return replace(corpus, **{part: data[(data != 10) & (data != 13)] for part, data in parts.items()})


def load_texts(
    args: DataArguments,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    needed: Iterable[str],
    *,
    progress: bool = False,
) -> dict[str, Tokens]:
    """The parts of the corpus that are needed, in the tokens of the tokenizer; those of the byte tokenizer are bytes.

    Raises:
        ValueError: A part is empty, and whatever `load_text` and `load_tokens` raise.
    """
    corpus, texts = load_text(args, model_args), {}
    for part in needed:
        data: np.ndarray = getattr(corpus, part)
        if not len(data):
            raise ValueError(
                f"the {part} part of the text is empty: give --{part}_file"
                + ("." if part == "train" else f", or a larger --{part}_split_percentage.")
            )
        if tokens_are_bytes(tokenizer):
            texts[part] = Tokens(data, None)
            continue
        texts[part] = load_tokens(
            data,
            tokenizer,
            ends=corpus.ends.get(part),
            num_workers=args.preprocessing_num_workers,
            cache_dir=model_args.cache_dir,
            overwrite_cache=args.overwrite_cache,
            progress=progress,
        )
    return texts


def load_windows(
    args: DataArguments,
    model_args: ModelArguments,
    training_args: ReZeroTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Tokens], StreamedWindows | None]:
    """The parts that a run reads, and in place of the training part a stream where one is asked for.

    Raises:
        ValueError: As `load_texts` and `open_stream`.
    """
    needed, progress = needed_parts(training_args), not training_args.disable_tqdm
    if not args.streaming:
        return load_texts(args, model_args, tokenizer, needed, progress=progress), None
    if training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("a stream has no known end: give --max_steps with --streaming.")
    stream = open_stream(args, model_args, tokenizer, training_args.seed) if "train" in needed else None
    scored = {part: read_part(part, args, model_args, tokenizer) for part in needed if part != "train"}
    return scored, stream


def open_stream(
    args: DataArguments, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> StreamedWindows:
    """The windows of the training rows, shuffled within a buffer, by the seed and the number of the pass.

    Raises:
        ValueError: There is no such data set, part or column.
    """
    rows, size = rows_of("train", args, model_args), args.shuffle_buffer_size
    if size:
        rows = rows.shuffle(seed=seed, buffer_size=size)
    column = args.text_column_name

    def texts(epoch: int) -> Iterator[str]:
        rows.set_epoch(epoch)
        return (row[column] or "" for row in rows)

    return StreamedWindows(texts, tokenizer, args.block_size)


def rows_of(part: str, args: DataArguments, model_args: ModelArguments) -> Any:
    """The rows of one part of a data set or file, as they come.

    Raises:
        ValueError: There is no such data set, part or column of text.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    options = {"streaming": True, "cache_dir": model_args.cache_dir}
    file = files[part]
    if file:
        kind = reader_of(file)
        if kind is None:
            raise ValueError(f"{file} has no rows to stream: a .jsonl, .json, .csv or .parquet is needed.")
        tables, name = {part: load_table(kind, data_files={"train": file}, split="train", **options)}, file
    elif args.dataset_name:
        name = args.dataset_name
        tables = load_table(name, args.dataset_config_name, token=model_args.token, **options)
    else:
        raise ValueError(f"there are no rows for {part} to stream: give --dataset_name or --{part}_file.")
    if part not in tables:
        raise ValueError(
            f"{name} has the splits {', '.join(tables)} and none called {part}, which cannot be cut from a stream: "
            f"give --{part}_file, or leave out --streaming."
        )
    columns = list(next(iter(tables[part].take(1)), {}))
    if args.text_column_name not in columns:
        raise ValueError(
            f"the {part} rows of {name} have no column {args.text_column_name!r}, but {', '.join(columns) or 'are none'}: "
            f"name the right one with --text_column_name."
        )
    return tables[part]


def read_part(
    part: str, args: DataArguments, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> Tokens:
    """The tokens of the rows of a part for evaluation, as many as are asked for."""
    enough = (
        float("inf") if args.max_eval_samples is None else args.max_eval_samples * args.block_size * BYTES_OF_A_TOKEN
    )
    texts, size = [], 0
    for row in rows_of(part, args, model_args):
        texts.append((row[args.text_column_name] or "").encode())
        size += len(texts[-1]) + 1
        if size > enough:
            break
    data = np.frombuffer(b"\n".join(texts), np.uint8)
    if tokens_are_bytes(tokenizer):
        return Tokens(data, None)
    ends = np.cumsum([len(text) + 1 for text in texts])[:-1] - 1
    return load_tokens(
        data, tokenizer, ends=ends, cache_dir=model_args.cache_dir, overwrite_cache=args.overwrite_cache
    )


def training_windows(tokens: Tokens, args: DataArguments) -> Dataset:
    """The windows of the training part, as many as are asked for."""
    windows = ByteDataset(tokens.ids, args.block_size, token_bytes=tokens.num_bytes)
    return shortened(windows, args.max_train_samples)


def scored_windows(tokens: Tokens, args: DataArguments) -> Dataset:
    """The windows that predict every token of a part once, as many as are asked for."""
    windows = evaluation_windows(tokens.ids, args.block_size, args.eval_stride, tokens.num_bytes)
    return shortened(windows, args.max_eval_samples)


def shortened(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` windows, or all."""
    return dataset if count is None else Subset(dataset, range(min(count, len(dataset))))


def source_of(args: DataArguments) -> str | None:
    """The name of the data, for the card."""
    return args.dataset_name or args.train_file or args.validation_file
