"""The trained tokenizer gives back every text, also after a trip through AutoTokenizer; bytes become whole texts."""

import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_rezero.commands import tokenizer as command
from hf_rezero.data.bpe import train_bpe
from hf_rezero.data.documents import decode, pieces
from hf_rezero.data.tokenizer import SPECIAL_TOKENS


PROSE = "The rain in Spain — déjà vu — falls mainly on the plain.\r\n\tNot 3.14 miles; 東京 is far.\n" * 40


def texts_of(data, size=1 << 16):
    return [decode(data, piece) for piece in pieces(data, size=size)]


def random_texts(count, seed=0):
    rng = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_bytes(PROSE.encode())
    command.main(["--train_file", f"{folder}/text.txt", "--vocab_size", "300", "--output_dir", f"{folder}/bpe"])
    return AutoTokenizer.from_pretrained(folder / "bpe")


def test_the_command_leaves_a_tokenizer_of_the_size_that_was_asked_for(saved, tmp_path):
    assert len(saved) == 300 and max(saved.get_vocab().values()) == 299
    assert {role: getattr(saved, role) for role in SPECIAL_TOKENS} == SPECIAL_TOKENS
    assert len(saved(PROSE).input_ids) < len(PROSE.encode()) / 2
    assert saved("plain").input_ids == saved("plain", add_special_tokens=True).input_ids
    (tmp_path / "precious.txt").write_text("results of a week")
    with pytest.raises(ValueError, match="is not empty: choose another"):
        command.main(["--train_file", "text.txt", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("text", ["", " ", " a  b ", "don't , do n't . ' s", "\r\n\x00\x01", PROSE, *random_texts(60)])
def test_any_text_comes_back_from_its_tokens(saved, text):
    assert saved.decode(saved(text).input_ids) == text


def test_a_tokenizer_from_bytes_is_the_tokenizer_of_their_text():
    data = np.frombuffer(PROSE.encode(), np.uint8)
    assert train_bpe(data, 300).get_vocab() == train_bpe([PROSE], 300).get_vocab()


def test_bytes_that_are_no_text_and_vocabularies_too_small_are_refused():
    with pytest.raises(ValueError, match="byte 3 of the text is not UTF-8"):
        train_bpe(np.frombuffer(b"abc\xffdef", np.uint8), 300)
    with pytest.raises(ValueError, match="got vocab_size=200: at least 262 are needed"):
        train_bpe(["text"], 200)


@pytest.mark.parametrize("size", [4, 7, 64, 1 << 16])
def test_pieces_hold_every_character_once(size):
    data = np.frombuffer(PROSE.encode(), np.uint8)
    cut = texts_of(data, size)
    assert "".join(cut) == PROSE
    assert max(len(piece.encode()) for piece in cut) <= size
    for text in random_texts(30, seed=1):
        assert "".join(texts_of(np.frombuffer(text.encode(), np.uint8), size)) == text


def test_half_characters_at_the_ends_of_a_part_are_left_out():
    text = "東京"  # three bytes each
    whole = np.frombuffer(text.encode(), np.uint8)
    found = {(i, j): "".join(texts_of(whole[i:j])) for i in range(4) for j in range(4, 7)}
    assert {text for (i, j), text in found.items() if i == 0 and j == 6} == {text}
    assert (
        found[0, 4] == found[0, 5] == "東" and found[1, 6] == found[3, 6] == "京" and found[1, 4] == found[2, 5] == ""
    )
