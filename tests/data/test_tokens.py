"""Tokens of a corpus: those of the tokenizer alone, with the bytes behind each; the cache is whole, or not there."""

import json
import os
import pickle
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_rezero import byte_tokenizer, load_corpus
from hf_rezero.data import collate_bytes, documents, evaluation_windows, load_tokens, train_bpe
from hf_rezero.data import tokens as tokens_module
from hf_rezero.data.masking import MaskedBytes
from hf_rezero.data.windows import ByteDataset


PROSE = "The rain in Spain — déjà vu — falls mainly on the plain.\r\n\tNot 3.14 miles; 東京 is far.\n" * 60


def as_bytes(text):
    return np.frombuffer(text.encode(), np.uint8)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([PROSE], 320)


@pytest.fixture(scope="module")
def word_pieces():
    """A tokenizer that loses accents, capitals and spaces."""
    words = ["[UNK]", "[SEP]", *sorted({*"abcdefghijklmnopqrstuvwxyz.,;—", "the", "rain", "in"})]
    continued = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words + continued)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")


def test_ids_are_those_of_the_tokenizer_and_bytes_add_up(bpe, tmp_path):
    data = as_bytes(PROSE)
    tokens = load_tokens(data, bpe, cache_dir=tmp_path)
    assert tokens.ids.tolist() == bpe(PROSE).input_ids
    assert tokens.ids.dtype == np.uint16 and tokens.num_bytes.dtype == np.uint8 and isinstance(tokens.ids, np.memmap)
    widths = [
        len(bpe.backend_tokenizer.decoder.decode([token]).encode()) for token in bpe.convert_ids_to_tokens(tokens.ids)
    ]
    ascii_only = [all(part < 0x80 for part in data[a:b]) for a, b in _spans(widths)]
    assert all(n == w for n, w, plain in zip(tokens.num_bytes, widths, ascii_only, strict=True) if plain)
    assert tokens.num_bytes.sum() == len(data)


def _spans(widths):
    ends = np.cumsum(widths)
    return zip(ends - widths, ends, strict=True)


def test_characters_cut_into_several_tokens_count_once(bpe, tmp_path):
    tokens = load_tokens(as_bytes("a京ab"), byte_tokenizer(), cache_dir=tmp_path)
    assert tokens.ids.dtype == np.uint16 and tokens.ids.tolist() == list("a京ab".encode())
    assert tokens.num_bytes.tolist() == [1, 3, 0, 0, 1, 1]


def test_a_tokenizer_that_loses_text_still_accounts_for_every_byte(word_pieces, tmp_path):
    tokens = load_tokens(as_bytes(PROSE), word_pieces, cache_dir=tmp_path)
    assert len(tokens.ids) > 100 and tokens.num_bytes.sum() == len(PROSE.encode())
    # "The", " rain", " in", each with what stands before it
    assert tokens.num_bytes[:3].tolist() == [3, 5, 3]
    assert word_pieces.backend_tokenizer.truncation and word_pieces.backend_tokenizer.padding  # as they were


def test_a_tokenizer_in_python_does_not_know_its_bytes(tmp_path):
    tokens = load_tokens(as_bytes(PROSE), ByT5Tokenizer(), cache_dir=tmp_path)
    assert tokens.num_bytes is None and len(tokens.ids) == len(PROSE.encode())


@pytest.mark.parametrize("piece", [50, 1 << 16])
def test_workers_give_the_tokens_of_one_process(bpe, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tokens_module, "PIECES_OF_A_TASK", 3)
    monkeypatch.setattr(tokens_module, "pieces", partial(documents.pieces, size=piece))
    data, ends = as_bytes(PROSE), np.flatnonzero(as_bytes(PROSE) == 10)[1::2]
    one, two = (load_tokens(data, bpe, ends=ends, num_workers=n, cache_dir=tmp_path / str(n)) for n in (None, 2))
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.num_bytes, two.num_bytes)


def test_rows_are_documents_with_an_end_token_in_place_of_the_newline(bpe, tmp_path):
    rows = ["one row", "", "two\nlines", "déjà vu"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = load_corpus(tmp_path / "rows.jsonl", split=(1, 0, 0), cache_dir=tmp_path)
    assert corpus.train.tobytes().decode() == "\n".join(rows) and corpus.ends["train"].tolist() == [7, 8, 18]
    tokens = load_tokens(corpus.train, bpe, ends=corpus.ends["train"], cache_dir=tmp_path)
    expected = []
    for row in rows:
        expected += [*bpe(row).input_ids, bpe.eos_token_id]
    assert tokens.ids.tolist() == expected[:-1]
    assert tokens.num_bytes.sum() == len(corpus.train)


@pytest.mark.parametrize("cut", [1, 9, 11, 12, 14, 20, 36])
def test_a_cut_through_rows_and_characters_loses_no_end(bpe, tmp_path, cut):
    rows = ["ab", "", "cé", "京京", "", "f"] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    size = len("\n".join(rows).encode())
    share = cut / 40
    corpus = load_corpus(tmp_path / "rows.jsonl", split=(share, 1 - share, 0), cache_dir=tmp_path)
    parts = {"train": corpus.train, "validation": corpus.validation}
    for name, part in parts.items():
        assert (part[corpus.ends[name]] == 10).all()
    assert sum(len(ends) for ends in corpus.ends.values()) == len(rows) - 1
    whole = 0
    for name, part in parts.items():
        if len(part):
            tokens = load_tokens(part, bpe, ends=corpus.ends[name], cache_dir=tmp_path)
            assert bpe.decode(tokens.ids).replace("<|eos|>", "\n") in bytes(part).decode(errors="ignore")
            whole += tokens.num_bytes.sum()
    assert size - 3 <= whole <= size  # up to one character of three bytes at the cut


def test_the_cache_goes_by_text_and_tokenizer(bpe, tmp_path, monkeypatch):
    data = as_bytes(PROSE)
    first = load_tokens(data, bpe, cache_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    encode = tokens_module.Encoder.encode_pieces
    calls = []
    monkeypatch.setattr(tokens_module.Encoder, "encode_pieces", lambda *a: calls.append(1) or encode(*a))
    assert np.array_equal(load_tokens(data, bpe, cache_dir=tmp_path).ids, first.ids) and not calls
    load_tokens(data, bpe, cache_dir=tmp_path, overwrite_cache=True)
    assert calls and sorted(tmp_path.iterdir()) == files
    load_tokens(data[:-1], bpe, cache_dir=tmp_path)
    load_tokens(data, train_bpe([PROSE], 300), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_an_error_in_the_middle_leaves_no_cache(bpe, tmp_path):
    broken = np.concatenate([as_bytes(PROSE * 30), np.array([0xFF, 65, 66, 67, 68], np.uint8)])
    for workers in (1, 2):
        with pytest.raises(ValueError, match=f"byte {len(broken) - 5:,} of the text is not UTF-8"):
            load_tokens(broken, bpe, cache_dir=tmp_path, num_workers=workers)
        assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import numpy as np
from hf_rezero.data import tokens, train_bpe

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

tokens._save = die
data = np.fromfile(sys.argv[1], np.uint8)
tokens.load_tokens(data, train_bpe(data, 320), cache_dir=sys.argv[2])
"""


def test_a_killed_call_leaves_nothing_that_is_taken_for_tokens(bpe, tmp_path):
    (tmp_path / "text").write_bytes(PROSE.encode())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "text"), str(tmp_path / "cache")]
    assert subprocess.run(command, env={**os.environ}).returncode == -signal.SIGKILL
    assert not list((tmp_path / "cache").glob("*.npy")) and list((tmp_path / "cache").iterdir())
    tokens = load_tokens(as_bytes(PROSE), bpe, cache_dir=tmp_path / "cache")
    assert tokens.ids.tolist() == bpe(PROSE).input_ids
    assert all(path.suffix == ".npy" for path in (tmp_path / "cache").iterdir())


def test_documents_need_an_end_token_and_a_text_needs_tokens(word_pieces, tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    with pytest.raises(ValueError, match="neither an end token nor a separator to put between documents"):
        load_tokens(as_bytes("a\na"), bare, ends=np.array([1]), cache_dir=tmp_path)
    assert load_tokens(as_bytes("a\na"), bare, cache_dir=tmp_path).ids.tolist() == [0, 0]
    with pytest.raises(ValueError, match="the text has no tokens"):
        load_tokens(as_bytes("  \n"), bare, cache_dir=tmp_path)
    sep = load_tokens(as_bytes("a\nb"), word_pieces, ends=np.array([1]), cache_dir=tmp_path)
    assert sep.ids[1] == word_pieces.sep_token_id


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_windows_predict_every_token_once_and_carry_its_bytes(bpe, tmp_path, stride):
    tokens = load_tokens(as_bytes(PROSE), bpe, cache_dir=tmp_path)
    windows = evaluation_windows(tokens.ids, 16, stride, tokens.num_bytes)
    batch = collate_bytes(windows.__getitems__(range(len(windows))))
    predicted = batch["labels"] != -100
    assert int(predicted.sum()) == len(tokens.ids) - 1
    assert int(batch["num_bytes"].sum()) == len(PROSE.encode()) - int(tokens.num_bytes[0])
    one = windows[3]
    assert one["num_bytes"].item() == batch["num_bytes"][3] and one["input_ids"].dtype == torch.int64
    assert torch.equal(one["input_ids"], torch.tensor(tokens.ids[3 * stride :][:16].astype(np.int64)))
    again = pickle.loads(pickle.dumps(windows))
    assert len(pickle.dumps(windows)) < 1000
    assert all(torch.equal(again[5][key], windows[5][key]) for key in again[5])


def test_training_windows_of_tokens_are_those_of_bytes(bpe, tmp_path):
    tokens = load_tokens(as_bytes(PROSE), bpe, cache_dir=tmp_path)
    windows, bytes_ = (
        ByteDataset(tokens.ids, 16, token_bytes=tokens.num_bytes),
        ByteDataset(as_bytes(PROSE)[: len(tokens.ids)], 16),
    )
    for dataset in (windows, bytes_):
        dataset.set_epoch(3)
    assert (
        len(windows) == len(bytes_) and windows._phase == bytes_._phase and set(windows[0]) == {"input_ids", "labels"}
    )
    assert windows.describe().to_dict() == {
        "examples": len(windows),
        "bytes": len(PROSE.encode()),
        "tokens": len(tokens.ids),
        "block_size": 16,
        "stride": 16,
    }
    with pytest.raises(ValueError, match="one for each"):
        ByteDataset(tokens.ids, 16, token_bytes=tokens.num_bytes[1:])
    with pytest.raises(ValueError, match="data is int64"):
        ByteDataset(tokens.ids.astype(np.int64), 16)


def test_masks_leave_special_tokens_alone(bpe):
    ids = np.tile(np.array([bpe.eos_token_id, 100, 270], np.uint16), 200)
    windows = MaskedBytes(ids, 30, 0.5, fixed=True, tokenizer=bpe)
    labels = torch.stack([windows[i]["labels"] for i in range(len(windows))])
    original = torch.from_numpy(ids[: labels.numel()].astype(np.int64)).view_as(labels)
    assert (labels[original == bpe.eos_token_id] == -100).all()
    asked = labels != -100
    assert 0.4 < asked[original != bpe.eos_token_id].float().mean() < 0.6
    assert torch.equal(labels[asked], original[asked])
    shown = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])[asked]
    assert 0.7 < (shown == bpe.mask_token_id).float().mean() < 0.9
