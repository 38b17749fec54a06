"""Corpora are read byte for byte, and evaluation windows predict every byte exactly once."""

import bz2
import csv
import doctest
import gzip
import hashlib
import http.server
import json
import lzma
import pickle
import random
import socket
import subprocess
import sys
import sysconfig
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset

from hf_rezero.data import corpora as data_module
from hf_rezero.data import download, windows
from hf_rezero.data.corpora import load_corpus
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows


torch.set_num_threads(1)

TEXT = bytes(range(256)) * 4 + b"\r\n\x00 end"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def all_bytes(corpus):
    return corpus.train.tobytes() + corpus.validation.tobytes() + corpus.test.tobytes()


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# Files


def test_raw_file_is_mapped_in_place_and_cut_at_floor(tmp_path, cache):
    path = tmp_path / "corpus.txt"
    path.write_bytes(TEXT)
    corpus = load_corpus(path, cache_dir=cache)
    n = len(TEXT)
    assert all_bytes(corpus) == TEXT
    assert (len(corpus.train), len(corpus.train) + len(corpus.validation)) == (n * 90 // 100, n * 95 // 100)
    assert not cache.exists()
    for part in (corpus.train, corpus.validation, corpus.test):
        assert isinstance(part, np.memmap) and part.dtype == np.uint8 and not part.flags.writeable
        assert Path(part.filename) == path


@pytest.mark.parametrize(
    "split, sizes", [((0.7, 0.2, 0.1), (7, 2, 1)), ((1 / 3, 1 / 3, 1 / 3), (3, 3, 4)), ((1, 0, 0), (10, 0, 0))]
)
def test_split_is_exact_arithmetic(tmp_path, split, sizes):
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    corpus = load_corpus(path, split=split)
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == sizes
    assert all_bytes(corpus) == b"0123456789"


@pytest.mark.parametrize("suffix, opener", [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files_are_decompressed_once(tmp_path, cache, suffix, opener):
    path = tmp_path / f"corpus{suffix}"
    with opener(path, "wb") as file:
        file.write(TEXT)
    assert all_bytes(load_corpus(path, cache_dir=cache)) == TEXT
    (cached,) = cache.iterdir()
    first_written = cached.stat().st_mtime_ns
    assert all_bytes(load_corpus(path, cache_dir=cache)) == TEXT
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [first_written]

    with opener(path, "wb") as file:
        file.write(TEXT + b"more")
    assert all_bytes(load_corpus(path, cache_dir=cache)) == TEXT + b"more"


@pytest.mark.parametrize("suffix, opener", [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_truncated_file_leaves_nothing_behind(tmp_path, cache, suffix, opener):
    path = tmp_path / f"corpus{suffix}"
    with opener(path, "wb") as file:
        file.write(random_bytes(50_000).tobytes())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"corpus{suffix} is truncated or corrupt"):
        load_corpus(path, cache_dir=cache)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
def test_file_that_is_not_what_its_suffix_says(tmp_path, cache, suffix):
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(b"plain text, not compressed")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_corpus(path, cache_dir=cache)


def test_an_error_of_the_disk_is_not_blamed_on_the_file(tmp_path, cache, monkeypatch):
    path = tmp_path / "corpus.gz"
    path.write_bytes(gzip.compress(TEXT))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "copy_bounded", full_disk)
    with pytest.raises(OSError, match="No space left"):
        load_corpus(path, cache_dir=cache)
    assert not list(cache.iterdir())


def test_zip_holds_exactly_one_file(tmp_path, cache):
    one = zipped(tmp_path / "one.zip", {"folder/": b"", "folder/corpus": TEXT})
    assert all_bytes(load_corpus(one, cache_dir=cache)) == TEXT
    two = zipped(tmp_path / "two.zip", {"a": b"1", "b": b"2"})
    with pytest.raises(ValueError, match="two.zip holds 2 files, one is needed"):
        load_corpus(two, cache_dir=cache)


def test_decompression_needs_little_memory(tmp_path, cache):
    path = tmp_path / "zeros.gz"
    size = 48 << 20
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(48):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    corpus = load_corpus(path, cache_dir=cache)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(corpus.train) == size * 90 // 100
    assert peak < 8 << 20


@pytest.mark.parametrize("name, content", [("corpus.txt", b""), ("corpus.gz", gzip.compress(b"", mtime=0))])
def test_empty_corpus(tmp_path, cache, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(tmp_path / name, cache_dir=cache)


@pytest.mark.parametrize("split", [(0.9, 0.05, 0.06), (0.9, 0.1), (1.1, -0.05, -0.05)])
def test_wrong_split(tmp_path, split):
    (tmp_path / "a").write_bytes(TEXT)
    with pytest.raises(ValueError, match="sum to 1"):
        load_corpus(tmp_path / "a", split=split)


@pytest.mark.parametrize("name", ["missing.txt", "missing.xz", "./missing", "/no/such/file", "a/b/c", "missing.jsonl"])
def test_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        load_corpus(name)


def test_archive_of_an_unknown_kind_is_not_read_as_text(tmp_path):
    (tmp_path / "corpus.zst").write_bytes(TEXT)
    with pytest.raises(ValueError, match="unpack it"):
        load_corpus(tmp_path / "corpus.zst")


def test_expected_md5(tmp_path):
    path = tmp_path / "corpus.bin"
    path.write_bytes(TEXT)
    digest = hashlib.md5(TEXT).hexdigest()
    assert all_bytes(load_corpus(path, expected_md5=digest)) == TEXT
    with pytest.raises(ValueError, match=f"{len(TEXT)} bytes with md5 {digest}, expected md5 {'0' * 32}"):
        load_corpus(path, expected_md5="0" * 32)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"HF_REZERO_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hf_rezero"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hf_rezero"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hf_rezero"),
    ],
)
def test_default_cache(monkeypatch, variables, expected):
    for name in ("HF_REZERO_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert download.default_cache() == Path(expected)


# The named corpora


def test_python_stdlib_is_the_sorted_text_of_this_python(cache):
    corpus = load_corpus("python-stdlib", cache_dir=cache)
    root = Path(sysconfig.get_paths()["stdlib"])
    content = all_bytes(corpus)
    content.decode()
    assert 0 not in content
    # Files that every installation has, in the order of their paths, each once.
    present = ["argparse.py", "json/decoder.py", "os.py", "xml/sax/handler.py", "zipfile", "zoneinfo/_common.py"]
    sources = [(root / name).read_bytes() for name in present if (root / name).is_file()]
    positions = [content.find(source) for source in sources]
    assert -1 not in positions and positions == sorted(positions)
    assert [content.count(source) for source in sources] == [1] * len(sources)
    for unwanted in ("test/test_grammar.py", "unittest/test/test_case.py", "site-packages/pip/__init__.py"):
        if (root / unwanted).is_file():
            assert (root / unwanted).read_bytes() not in content

    (cached,) = cache.iterdir()
    first_written = cached.stat().st_mtime_ns
    assert all_bytes(load_corpus("python-stdlib", cache_dir=cache)) == content
    assert cached.stat().st_mtime_ns == first_written


def test_python_stdlib_skips_what_is_not_text_and_notices_changes(tmp_path, cache, monkeypatch):
    root = tmp_path / "lib"
    files = {
        "b.py": b"b\r\n",
        "a/c.rst": b"\xc3\xa9",
        "a.py": b"a",
        "latin.py": b"\xe9",
        "nul.txt": b"a\0b",
        "a/icon.png": b"png",
        "a/tests/t.py": b"test",
        "site-packages/p.py": b"package",
        "_sysconfigdata_x.py": b"built here",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(data_module.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    assert all_bytes(load_corpus("python-stdlib", cache_dir=cache)) == b"a" + b"\xc3\xa9" + b"b\r\n"
    (root / "z.md").write_bytes(b"new")
    assert all_bytes(load_corpus("python-stdlib", cache_dir=cache)).endswith(b"b\r\nnew")


@pytest.fixture
def small_enwik8(monkeypatch):
    """Lets 1,000 bytes pass for enwik8, and forbids the download."""
    content = random_bytes(1000).tobytes()
    monkeypatch.setattr(data_module, "ENWIK8_MD5", hashlib.md5(content).hexdigest())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(data_module, "ENWIK8_URL", f"http://127.0.0.1:{port}/dc/enwik8.zip")
    return content


def test_enwik8_from_a_local_file(tmp_path, cache, monkeypatch, small_enwik8):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enwik8").write_bytes(small_enwik8)
    corpus = load_corpus("enwik8", cache_dir=cache)
    assert all_bytes(corpus) == small_enwik8
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (900, 50, 50)


def test_enwik8_from_the_cache(tmp_path, cache, monkeypatch, small_enwik8):
    monkeypatch.chdir(tmp_path)
    cache.mkdir()
    zipped(cache / "enwik8.zip", {"enwik8": small_enwik8})
    assert all_bytes(load_corpus("enwik8", cache_dir=cache)) == small_enwik8


@pytest.mark.parametrize("name", ["enwik8", "enwik8.zip", "enwik8.gz"])
def test_a_file_called_enwik8_must_be_enwik8(tmp_path, cache, name):
    path, content = tmp_path / name, b"some other text"
    if name.endswith(".zip"):
        zipped(path, {"enwik8": content})
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError) as caught:
        load_corpus(path, cache_dir=cache)
    assert hashlib.md5(content).hexdigest() in str(caught.value)
    assert "a1fa5ffddb56f4953e226637dabbb36a" in str(caught.value)


def test_failed_download_says_where_to_put_the_file(tmp_path, cache, monkeypatch, small_enwik8):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=f"put enwik8 or enwik8.zip into {cache} by hand"):
        load_corpus("enwik8", cache_dir=cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.fixture
def server():
    """An HTTP server of {path: (content, announced length)} that counts its answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, announced = self.server.files[self.path]
            self.server.answers += 1
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.files, httpd.answers = {}, 0
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def test_url_is_downloaded_once(cache, server):
    content = gzip.compress(TEXT)
    server.files["/corpora/a.gz?version=1"] = (content, len(content))
    for _ in range(2):
        assert all_bytes(load_corpus(f"{server.url}/corpora/a.gz?version=1", cache_dir=cache)) == TEXT
    assert server.answers == 1


def test_download_cut_short_is_not_kept(cache, server):
    server.files["/a.txt"] = (TEXT, len(TEXT) + 10)
    with pytest.raises(ConnectionError, match=f"{len(TEXT)} of {len(TEXT) + 10} bytes arrived"):
        load_corpus(f"{server.url}/a.txt", cache_dir=cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_downloaded_enwik8_is_checked(tmp_path, cache, monkeypatch, server, small_enwik8):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_module, "ENWIK8_URL", f"{server.url}/dc/enwik8.zip")
    content = zipped(tmp_path / "good.zip", {"enwik8": small_enwik8}).read_bytes()
    server.files["/dc/enwik8.zip"] = (content, len(content))
    assert all_bytes(load_corpus("enwik8", cache_dir=cache)) == small_enwik8
    content = zipped(tmp_path / "bad.zip", {"enwik8": small_enwik8[::-1]}).read_bytes()
    server.files["/dc/enwik8.zip"] = (content, len(content))
    with pytest.raises(ValueError, match="expected md5"):
        load_corpus("enwik8", cache_dir=tmp_path / "other")


# Tables, read by `datasets`

ROWS = ["first\r\nline", "", "ünï\U0001f600", "last"]


def write_jsonl(path, rows, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)))
    return path


def test_jsonl_rows_are_joined_by_newlines(tmp_path, cache):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS * 600)
    content = "\n".join(ROWS * 600).encode()
    corpus = load_corpus(path, cache_dir=cache)
    assert all_bytes(corpus) == content
    assert len(corpus.train) == len(content) * 90 // 100
    (cached,) = cache.glob("dataset-*")

    # The cache key is the same in another process, and different for another column or content.
    code = f"from hf_rezero.data import load_corpus; load_corpus({str(path)!r}, cache_dir={str(cache)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert list(cache.glob("dataset-*")) == [cached]
    write_jsonl(path, ["other"])
    assert all_bytes(load_corpus(path, cache_dir=cache)) == b"other"


def test_csv_with_another_column_and_empty_cells(tmp_path, cache):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["n", "sentence"], [1, "a,b"], [2, ""], [3, "c"]])
    assert all_bytes(load_corpus(path, cache_dir=cache, text_column="sentence")) == b"a,b\n\nc"
    for column in ("text", "n"):
        with pytest.raises(ValueError, match=f"text_column '{column}' is not a column of text"):
            load_corpus(path, cache_dir=cache, text_column=column)


def test_splits_of_a_data_set_are_kept_and_missing_ones_cut_from_train(tmp_path, cache):
    folder = tmp_path / "tables"
    write_jsonl(folder / "train.jsonl", ["t" * 1000])
    write_jsonl(folder / "test.jsonl", ["the test"])
    corpus = load_corpus(folder, cache_dir=cache, split=(0.8, 0.15, 0.05))
    assert (len(corpus.train), len(corpus.validation)) == (850, 150)
    assert corpus.test.tobytes() == b"the test"
    digest = hashlib.md5(b"t" * 1000 + b"the test").hexdigest()
    load_corpus(folder, cache_dir=cache, expected_md5=digest)


def test_data_set_without_training_split(tmp_path, cache):
    write_jsonl(tmp_path / "tables" / "test.jsonl", ["the test"])
    with pytest.raises(ValueError, match="has the splits test: one called train is needed"):
        load_corpus(tmp_path / "tables", cache_dir=cache)


def test_broken_table(tmp_path, cache):
    (tmp_path / "rows.jsonl").write_text("{not json")
    with pytest.raises(ValueError, match="rows.jsonl is empty, or cannot be read as .jsonl: JSON parse error"):
        load_corpus(tmp_path / "rows.jsonl", cache_dir=cache)


# Windows


@pytest.mark.parametrize("size, block", [(8, 8), (9, 8), (14, 8), (15, 8), (22, 8), (23, 8), (1000, 7), (1000, 2)])
def test_training_windows_tile_the_data_in_every_epoch(size, block):
    data = random_bytes(size)
    dataset = ByteDataset(data, block)
    length = len(dataset)
    assert length == max(1, (size - block + 1) // block)
    phases = set()
    for epoch in range(50):
        dataset.set_epoch(epoch)
        assert len(dataset) == length
        windows = torch.stack([item["input_ids"] for item in dataset]).flatten().numpy()
        starts = [p for p in range(min(block, size)) if np.array_equal(data[p : p + len(windows)], windows)]
        assert len(windows) == length * block and starts
        phases.add(starts[0])
        assert epoch or starts[0] == 0
    assert len(phases) == min(block, size - length * block + 1)


def test_successive_phases_are_spread_evenly():
    dataset = ByteDataset(random_bytes(4096), 256)
    phases = []
    for epoch in range(16):
        dataset.set_epoch(epoch)
        phases.append(dataset._phase)
    gaps = np.diff(sorted(phases) + [256])
    assert gaps.max() <= 2 * 256 / 16 and gaps.min() >= 256 / 16 / 2


def test_training_batches_equal_slices():
    data = random_bytes(10_000)
    dataset = ByteDataset(data, 32)
    dataset.set_epoch(3)
    loader = DataLoader(dataset, batch_size=8, sampler=RandomSampler(dataset), collate_fn=collate_bytes)
    seen = []
    for batch in loader:
        assert batch["input_ids"].dtype == torch.int64 and batch["labels"] is batch["input_ids"]
        seen += batch["input_ids"].tolist()
    phase = dataset._phase
    expected = [data[phase + i * 32 : phase + (i + 1) * 32].tolist() for i in range(len(dataset))]
    assert phase > 0 and sorted(seen) == sorted(expected)


def predictions(dataset):
    """[(window start, absolute position, label)] of each prediction that a causal model's shifted loss would score."""
    size, block = len(dataset.data), dataset.block_size
    found = []
    for row in range(len(dataset)):
        item = dataset[row]
        width = min(block, size)
        start = min(row * dataset.stride, size - width)
        assert item["input_ids"].tolist() == dataset.data[start : start + width].tolist()
        scored = item["labels"][1:].tolist()
        found += [(start, start + 1 + j, label) for j, label in enumerate(scored) if label != -100]
        assert item["labels"][0] == -100
    return found


def test_every_byte_but_the_first_is_predicted_exactly_once():
    rng = random.Random(0)
    cases = [(rng.randint(2, 200), rng.randint(2, 40)) for _ in range(150)]
    for size, block in [*cases, (2, 2), (40, 40), (41, 40), (39, 40), (3, 2)]:
        for stride in {1, block - 1, max(1, block // 2), rng.randint(1, block - 1)}:
            data = random_bytes(size, seed=size)
            found = predictions(evaluation_windows(data, block, stride))
            assert sorted(position for _, position, _ in found) == list(range(1, size)), (size, block, stride)
            assert all(label == data[position] for _, position, label in found)
            assert all(position - start >= block - stride for start, position, _ in found if start > 0)


def test_cheapest_stride_needs_the_fewest_windows():
    assert len(evaluation_windows(bytes(1 + 7 * 31), 32, 31)) == 7
    assert len(evaluation_windows(bytes(2 + 7 * 31), 32, 31)) == 8
    assert len(evaluation_windows(bytes(20), 32)) == 1
    assert evaluation_windows(bytes(100), 32).stride == 16


def test_bits_per_byte_of_a_bigram_model_does_not_depend_on_the_windows():
    data = random_bytes(3000) % 7
    log_p = torch.log_softmax(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    expected = -log_p[data[:-1].astype(int), data[1:].astype(int)].sum()
    for block, stride in ((64, None), (64, 63), (50, 7), (4096, None)):
        loader = DataLoader(evaluation_windows(data, block, stride), batch_size=8, collate_fn=collate_bytes)
        total = 0.0
        for batch in loader:
            logits, labels = log_p[batch["input_ids"]][:, :-1], batch["labels"][:, 1:]
            total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


def test_evaluation_windows_do_not_move():
    dataset = evaluation_windows(random_bytes(100), 16)
    before = [item["labels"].tolist() for item in dataset]
    dataset.set_epoch(5)
    assert [item["labels"].tolist() for item in dataset] == before


def test_items_and_gathered_batches_agree():
    for dataset in (ByteDataset(random_bytes(500), 16), evaluation_windows(random_bytes(500), 16, 5)):
        rows = [3, 0, len(dataset) - 1]
        gathered = collate_bytes(dataset.__getitems__(rows))
        stacked = collate_bytes([dataset[row] for row in rows])
        through_subset = collate_bytes(Subset(dataset, rows).__getitems__([0, 1, 2]))
        for key in ("input_ids", "labels"):
            assert torch.equal(gathered[key], stacked[key]) and torch.equal(gathered[key], through_subset[key])
        assert collate_bytes(gathered) is gathered
        one = collate_bytes([dataset[3]])
        assert one["input_ids"].shape == (1, 16) and torch.equal(one["labels"], gathered["labels"][:1])
        assert torch.equal(dataset[-1]["labels"], gathered["labels"][2])
        for rows in ([len(dataset)], [0, -1]):
            with pytest.raises(IndexError):
                dataset.__getitems__(rows)


def test_batches_survive_the_column_filter_of_trainer():
    from transformers.trainer_utils import RemoveColumnsCollator

    dataset = ByteDataset(random_bytes(500), 16)
    collate = RemoveColumnsCollator(collate_bytes, signature_columns=["input_ids", "labels"])
    (batch,) = DataLoader(Subset(dataset, range(4)), batch_size=4, collate_fn=collate)
    assert torch.equal(batch["input_ids"], torch.stack([dataset[i]["input_ids"] for i in range(4)]))
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize("offset", [0, 4096, 5000])
def test_a_mapped_part_is_pickled_as_a_reference_to_its_file(tmp_path, offset):
    path = tmp_path / "corpus.bin"
    content = random_bytes(1_000_000)
    content.tofile(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=offset)
    dataset = ByteDataset(mapped[700_001:][: 200_000 - offset], 128)
    dataset.set_epoch(2)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert isinstance(copy.data, np.memmap) and np.array_equal(copy.data, dataset.data)
    assert copy.data[0] == content[offset + 700_001]
    assert torch.equal(copy[5]["input_ids"], dataset[5]["input_ids"])
    assert [len(copy), copy.block_size, copy.stride] == [len(dataset), 128, None]


def test_bytes_in_memory_are_pickled_by_value(tmp_path):
    path = tmp_path / "corpus.bin"
    random_bytes(1000).tofile(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    for data in (random_bytes(1000), TEXT, mapped[::2], mapped.copy()):
        dataset = evaluation_windows(data, 16, 7)
        copy = pickle.loads(pickle.dumps(dataset))
        assert np.array_equal(copy.data, dataset.data) and torch.equal(copy[3]["labels"], dataset[3]["labels"])


@pytest.mark.parametrize("workers, context", [(2, None), (1, "spawn")])
def test_workers_read_the_same_batches(tmp_path, workers, context):
    path = tmp_path / "corpus.bin"
    random_bytes(20_000).tofile(path)
    dataset = ByteDataset(np.memmap(path, dtype=np.uint8, mode="r")[1000:], 64)
    dataset.set_epoch(1)
    options = {"batch_size": 16, "collate_fn": collate_bytes}
    here = [batch["input_ids"] for batch in DataLoader(dataset, **options)]
    loader = DataLoader(dataset, num_workers=workers, multiprocessing_context=context, **options)
    there = [batch["input_ids"] for batch in loader]
    assert len(here) == len(there) and all(map(torch.equal, here, there))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((b"a", 2), "data has 1 bytes"),
        ((bytes(100), 1), "block_size is 1"),
        ((bytes(100), 256), "the training part has 100 bytes, one block needs 256: use a longer corpus or a smaller"),
        ((bytes(100), 16, 0), "stride is 0: with block_size 16 it must be 1 ... 15"),
        ((bytes(100), 16, 16), "stride is 16"),
        ((np.zeros(100, dtype=np.int64), 16), "data is int64 of shape"),
        ((np.zeros((10, 10), dtype=np.uint8), 16), "one-dimensional array of bytes"),
    ],
)
def test_windows_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        ByteDataset(*arguments)


def test_examples_in_docstrings(monkeypatch, cache):
    monkeypatch.setenv("HF_REZERO_CACHE", str(cache))
    results = [doctest.testmod(module) for module in (data_module, download, windows)]
    assert sum(r.attempted for r in results) >= 8 and not any(r.failed for r in results)
