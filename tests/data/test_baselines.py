"""The bigram model against its definition, and xz against the program of that name."""

import math
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from hf_rezero.data.baselines import bigram_bits, xz_bits


def array(text):
    return np.frombuffer(text, dtype=np.uint8)


def test_the_bigram_model_is_its_definition():
    rng = np.random.default_rng(0)
    train, text = (rng.integers(97, 105, n).astype(np.uint8) for n in (3000, 500))
    pairs, firsts = Counter(zip(train[:-1], train[1:], strict=True)), Counter(train[:-1])
    bits = [-math.log2((pairs[a, b] + 1) / (firsts[a] + 256)) for a, b in zip(text[:-1], text[1:], strict=True)]
    assert bigram_bits(train, text) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_what_nothing_was_counted_of_costs_eight_bits():
    assert bigram_bits(array(b"aaaa"), array(b"xyz")) == 8


@pytest.mark.skipif(shutil.which("xz") is None, reason="the program xz is not installed")
def test_xz_is_the_program_of_that_name():
    text = b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(5000))
    sizes = [len(subprocess.run(["xz", "-9"], input=t, capture_output=True).stdout) for t in (text[:60000], text)]
    # the header and the checksum are in both
    assert xz_bits(array(text[:60000]), array(text[60000:])) == pytest.approx(
        8 * (sizes[1] - sizes[0]) / (len(text) - 60000), abs=0.01
    )
