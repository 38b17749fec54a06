"""Train a byte-level BPE tokenizer on a text.

    hf-rezero tokenizer --train_file text.xz --vocab_size 1024 --output_dir outputs/bpe
    hf-rezero clm --tokenizer_name outputs/bpe --train_file text.xz --output_dir outputs/mine --do_train --do_eval

The tokenizer learns from the training part of the text, which is cut as `hf-rezero clm` cuts it. Any UTF-8 text comes
back exactly from its tokens. `AutoTokenizer` loads the folder.
"""

import argparse
from pathlib import Path

from ..data.bpe import train_bpe
from . import summary
from .entry import run_command
from .running import ModelArguments
from .texts import DataArguments, load_text


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer, save it, and print how many bytes its tokens have."""
    defaults = DataArguments()
    parser = argparse.ArgumentParser(prog="hf-rezero tokenizer", description=summary(__doc__))
    parser.add_argument("--train_file", help="any file of UTF-8 text; .xz .gz .bz2 .zip too")
    parser.add_argument("--dataset_name", help="python-stdlib, enwik8, or a `datasets` name with a text column")
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--text_column_name", default=defaults.text_column_name, help="column of the texts, of rows")
    parser.add_argument("--validation_split_percentage", type=float, default=defaults.validation_split_percentage)
    parser.add_argument("--test_split_percentage", type=float, default=defaults.test_split_percentage)
    parser.add_argument("--vocab_size", type=int, default=8192, help="ids in all: special tokens, bytes and merges")
    parser.add_argument("--output_dir", required=True, help="folder for the tokenizer")
    parser.add_argument("--cache_dir", help="where downloads and unpacked corpora are kept")
    args = vars(parser.parse_args(argv))
    vocab_size, folder, cache_dir = args.pop("vocab_size"), Path(args.pop("output_dir")), args.pop("cache_dir")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output_dir={folder} is not empty: choose another, or remove it.")
    text = load_text(DataArguments(**args), ModelArguments(cache_dir=cache_dir)).train
    tokenizer = train_bpe(text, vocab_size, progress=True)
    tokenizer.save_pretrained(folder)
    sample = text[: 1 << 20]
    tokens = len(tokenizer(bytes(sample).decode(errors="ignore"), verbose=False).input_ids)
    print(f"{folder}: {len(tokenizer)} tokens, {len(sample) / tokens:.2f} bytes of the text in each")


if __name__ == "__main__":
    run_command(main)
