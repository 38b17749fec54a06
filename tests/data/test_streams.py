"""Windows of a stream are its texts laid end to end, and never end."""

from itertools import islice

import numpy as np
import pytest
import torch

from hf_rezero import byte_tokenizer, load_corpus
from hf_rezero.data import train_bpe
from hf_rezero.data.streams import MaskedStream, StreamedWindows


TEXTS = [f"text number {n}, déjà vu" * (n % 4) for n in range(150)]


def windows(tokenizer, count, block=16):
    stream = StreamedWindows(lambda epoch: TEXTS[epoch:], tokenizer, block)
    return torch.cat([window["input_ids"] for window in islice(stream, count)]).tolist()


def test_tokens_lie_end_to_end_over_the_passes():
    tokenizer = train_bpe(TEXTS, 300)
    expected = [
        token
        for epoch in (0, 1)
        for text in TEXTS[epoch:]
        for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    ]
    count = len(expected) // 16
    assert windows(tokenizer, count) == expected[: 16 * count]


def test_bytes_have_newlines_between_texts():
    expected = "".join(text + "\n" for text in TEXTS).encode()
    assert bytes(windows(byte_tokenizer(), 50)) == expected[: 50 * 16]


def test_a_stream_that_ends_before_its_first_window_is_an_error():
    with pytest.raises(ValueError, match="ended after 5 tokens, and a window needs 16"):
        next(iter(StreamedWindows(lambda epoch: ["four"], byte_tokenizer(), 16)))


def test_masks_follow_from_the_number_of_the_window():
    stream = StreamedWindows(lambda epoch: TEXTS, byte_tokenizer(), 16)
    first, again = (list(islice(MaskedStream(stream, 0.3, seed=1), 20)) for _ in range(2))
    other = list(islice(MaskedStream(stream, 0.3, seed=2), 20))
    original = list(islice(stream, 20))
    for a, b, window in zip(first, again, original, strict=True):
        asked = a["labels"] != -100
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])
        assert torch.equal(a["labels"][asked], window["input_ids"][asked]) and asked.any()
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))


def test_each_file_of_a_folder_of_texts_is_a_document(tmp_path):
    (tmp_path / "texts").mkdir()
    contents = ["first\nof two lines\n", "second", "third\n\n"]
    for name, content in zip("abc", contents, strict=True):
        (tmp_path / "texts" / f"{name}.txt").write_text(content)
    corpus = load_corpus(tmp_path / "texts", split=(1, 0, 0), cache_dir=tmp_path / "cache")
    assert corpus.train.tobytes().decode() == "\n".join(contents)
    assert corpus.ends["train"].tolist() == (np.cumsum([len(c) + 1 for c in contents]) - 1)[:-1].tolist()
