"""What is small on a disk and large in memory stops at a stated limit, and what fits needs no more than it is."""

import bz2
import contextlib
import gzip
import http.server
import io
import json
import lzma
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

from hf_rezero.data import load_corpus
from hf_rezero.data.download import TooLargeError
from hf_rezero.data.images import read_images


LIMIT = 1_000_000
MESSAGE = f"holds more than {LIMIT} bytes: if it is what you want, allow more with --max_corpus_bytes"


def _zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "suffix, compress", [("xz", lzma.compress), ("gz", gzip.compress), ("bz2", bz2.compress), ("zip", _zipped)]
)
def test_an_archive_stops_at_the_limit(tmp_path, suffix, compress):
    path, cache = tmp_path / f"a.{suffix}", tmp_path / "cache"
    path.write_bytes(compress(bytes(LIMIT + 1)))
    with pytest.raises(TooLargeError, match=MESSAGE):
        load_corpus(path, cache_dir=cache, max_bytes=LIMIT)
    assert not [each for each in cache.rglob("*") if each.is_file()]
    assert len(load_corpus(path, split=(1, 0, 0), cache_dir=cache, max_bytes=LIMIT + 1).train) == LIMIT + 1


@pytest.fixture
def endless():
    """A server of an endless file, of a page, and of a file that says how long it is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if self.path == "/announced":
                self.send_header("Content-Length", str(LIMIT + 1))
            self.send_header("Content-Type", "text/html" if self.path == "/page" else "application/octet-stream")
            self.end_headers()
            if self.path in ("/page", "/untold"):
                return self.wfile.write(b"\n<!DOCTYPE html><p>Please log in." if self.path == "/untold" else b"Log in")
            with contextlib.suppress(OSError):  # the reader has had enough
                while True:
                    self.wfile.write(b"again " * 10_000)
                    self.server.sent += 60_000

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sent, server.daemon_threads = 0, True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ["endless", "announced"])
def test_a_download_stops_at_the_limit(endless, name, tmp_path):
    with pytest.raises(TooLargeError, match=MESSAGE):
        load_corpus(f"http://127.0.0.1:{endless.server_port}/{name}", cache_dir=tmp_path, max_bytes=LIMIT)
    assert endless.sent < 30 * LIMIT  # what the kernel takes before it knows that nobody reads
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


@pytest.mark.parametrize("name", ["page", "untold"])
def test_a_page_is_no_corpus(endless, name, tmp_path):
    with pytest.raises(ConnectionError, match="a page of HTML came instead of a file.*: fetch it by hand"):
        load_corpus(f"http://127.0.0.1:{endless.server_port}/{name}", cache_dir=tmp_path)
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def _idx(shape, values):
    return b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, dtype=">u4").tobytes() + values


def test_idx_files_stop_at_the_limit_and_at_what_they_promise(tmp_path):
    pictures, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(_idx([2], bytes(2)))
    for shape, message in (
        ([2, 1000, 1000], MESSAGE),
        ([2**32 - 1] * 3, MESSAGE),
        ([2, 10, 10], "promises 200 values and holds more: download it again"),
    ):
        pictures.write_bytes(gzip.compress(_idx(shape, bytes(10 * LIMIT))))
        with pytest.raises(ValueError, match=message):
            read_images(tmp_path, max_bytes=LIMIT)


def test_npz_files_stop_at_the_limit(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, train_x=np.zeros((2, 1000, 1000), np.uint8), train_y=[0, 1], other=np.zeros(10**7))
    with pytest.raises(TooLargeError, match=MESSAGE):
        read_images(path, max_bytes=LIMIT)
    assert read_images(path, max_bytes=2 * LIMIT + 16)["train"][0].shape == (2, 1000, 1000, 1)


MEASURED = """
import json, sys
from pathlib import Path
from hf_rezero.data import load_corpus
from hf_rezero.data.images import read_images

def memory(name):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

def read(path):
    return load_corpus(path, cache_dir=sys.argv[1]) if path.suffix == ".xz" else read_images(path)

peaks = {}
for path in map(Path, sys.argv[2:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    try:
        read(path)
    except ValueError as error:
        print(error, file=sys.stderr)
    peaks[path.stem] = memory("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of the memory of a process")
def test_memory_stays_below_twice_the_data(tmp_path):
    size = 60_000_000
    given = {name: tmp_path / name for name in ("first.npz", "honest", "lying", "pictures.npz", "text.xz")}
    np.savez(
        given["first.npz"], train_x=np.zeros((1, 4, 4), np.uint8), train_y=[0]
    )  # what is imported late is in by then
    np.savez_compressed(given["pictures.npz"], train_x=np.zeros((6, 1000, 10_000), np.uint8), train_y=np.arange(6))
    given["text.xz"].write_bytes(lzma.compress(bytes(size), preset=0))
    for name, promised in (("honest", [6, 1000, 10_000]), ("lying", [19, 10_000, 10_000])):
        given[name].mkdir()
        (given[name] / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(promised, bytes(size)), 1))
        (given[name] / "train-labels-idx1-ubyte").write_bytes(_idx([promised[0]], bytes(promised[0])))
    words = [sys.executable, "-c", MEASURED, tmp_path / "cache", *given.values()]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert "promises 1900000000 values and holds 60000000" in done.stderr
    peaks = json.loads(done.stdout)
    assert all(peaks[name] < 2 * size for name in ("honest", "lying", "pictures", "text")), peaks
    assert peaks["honest"] > size / 2  # the measure sees what is read
