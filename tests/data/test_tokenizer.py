"""The tokenizer's ids are the bytes of the text, also after a trip through AutoTokenizer."""

import doctest
import json
import random
import subprocess
import sys

import pytest

from hf_rezero.data import tokenizer as tokenization
from hf_rezero.data.tokenizer import byte_tokenizer


EDGE_CASES = [
    "",
    " ",
    " leading and trailing ",
    "\r\n\r\n\n\t",
    "\x00\x01\x7f\x80\u009f\u00a0\u00ad",
    "\ufeffbyte order mark, \ufffd, \u2028\u2029\u200b",
    "e\u0301 is not \u00e9, \u212b is not \u00c5",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "don't , do n't . ' s",
    "<|eos|><|mask|> <|pad|",
    "a" * 5000,
    "Ġ Ċ ▁ ##",
]


def random_texts(count):
    rng = random.Random(0)
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_ids_are_bytes_and_decoding_is_exact(tokenizer):
    texts = [*EDGE_CASES, *random_texts(3000)]
    encoded = tokenizer(texts, split_special_tokens=True).input_ids
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_every_byte_has_its_value_as_id(tokenizer):
    for byte in range(128):
        assert tokenizer(chr(byte)).input_ids == [byte]
    lead_and_continuation = {byte for text in random_texts(3000) for byte in tokenizer(text).input_ids}
    # 0xC0, 0xC1 and 0xF5 ... 0xFF never occur in UTF-8.
    assert lead_and_continuation == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert len(tokenizer) == 262 and sorted(tokenizer.get_vocab().values()) == list(range(262))


def test_special_tokens_follow_the_bytes(tokenizer):
    roles = ["bos", "eos", "sep", "pad", "cls", "mask"]
    assert [getattr(tokenizer, f"{role}_token_id") for role in roles] == list(range(256, 262))
    assert [getattr(tokenizer, f"{role}_token") for role in roles] == [f"<|{role}|>" for role in roles]
    assert tokenizer("<|eos|>").input_ids == [257]
    assert tokenizer.decode([256, 104, 105, 257], skip_special_tokens=True) == "hi"


def test_mask_token_is_found_without_touching_its_surroundings(tokenizer):
    ids = tokenizer("a <|mask|> b").input_ids
    assert ids == [97, 32, tokenizer.mask_token_id, 32, 98]
    assert tokenizer.decode(ids) == "a <|mask|> b"


@pytest.mark.parametrize(
    "ids, text",
    [([0xFF, 65], "\ufffdA"), ([0xC3], "\ufffd"), ([65, 0xE2, 0x82, 66], "A\ufffdB"), ([0xED, 0xA0, 0x80], None)],
)
def test_invalid_utf8_decodes(tokenizer, ids, text):
    assert tokenizer.decode(ids) == (bytes(ids).decode(errors="replace") if text is None else text)


def test_any_ids_decode(tokenizer):
    rng = random.Random(1)
    for _ in range(500):
        assert isinstance(tokenizer.decode([rng.randrange(262) for _ in range(30)]), str)


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["abc", "d"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.input_ids == [[97, 98, 99], [259, 259, 100]]
    assert batch.attention_mask == [[1, 1, 1], [0, 0, 1]]


def test_model_max_length_truncates():
    assert byte_tokenizer(4)("abcdef", truncation=True).input_ids == [97, 98, 99, 100]
    assert len(byte_tokenizer()("a" * 10_000, truncation=True).input_ids) == 10_000


def test_auto_tokenizer_loads_it_in_a_fresh_process(tmp_path):
    byte_tokenizer(512).save_pretrained(tmp_path / "tokenizer")
    texts = [*EDGE_CASES, *random_texts(200)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
assert not any(name.startswith("hf_rezero") for name in sys.modules)
tokenizer = AutoTokenizer.from_pretrained("tokenizer")
texts = json.loads(Path("texts.json").read_text())
for text in texts:
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text, text
names = ["bos", "eos", "sep", "pad", "cls", "mask"]
assert [getattr(tokenizer, f"{name}_token_id") for name in names] == list(range(256, 262))
assert tokenizer("a<|mask|>b").input_ids == [97, 261, 98]
assert (tokenizer.padding_side, tokenizer.model_max_length, len(tokenizer)) == ("left", 512, 262)
assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
print("checked", len(texts))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"checked {len(texts)}"


def test_examples_in_docstrings():
    result = doctest.testmod(tokenization)
    assert result.attempted == 3 and result.failed == 0
