"""No secret of the arguments gets into anything that a run writes or prints."""

import http.server
import sys
import threading
import zipfile

import numpy as np
import pytest

from hf_rezero.commands import __main__ as commands
from hf_rezero.data import load_corpus
from hf_rezero.data.addresses import shown
from hf_rezero.publish.redact import clean_name, command_line, redact


CANARIES = "canaryuser", "canarypassword", "canarysignature", "canaryfragment", "canarytoken"
SHAPE = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,resweight_init=0.5"


class _Signed(http.server.BaseHTTPRequestHandler):
    """Gives the text to those who have user, password and signature."""

    def do_GET(self):
        is_signed = "sig=canarysignature" in self.path and "Basic " in self.headers.get("Authorization", "")
        self.send_response(200 if is_signed and "/text.txt" in self.path else 403)
        content = self.server.content if is_signed else b"no"
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def address():
    with http.server.HTTPServer(("127.0.0.1", 0), _Signed) as server:
        server.content = np.random.default_rng(0).integers(97, 105, 3050).astype(np.uint8).tobytes()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        where = f"127.0.0.1:{server.server_port}/text.txt"
        yield f"http://canaryuser:canarypassword@{where}?sig=canarysignature&a=1,2#canaryfragment"
        server.shutdown()


def _found(folder, *texts):
    """Which canaries stand in the files below a folder, also packed ones, and in the texts."""
    contents = {"printed": "\n".join(texts).encode()}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        contents[str(path)] = path.read_bytes()
        contents[f"{path}'s name"] = str(path.relative_to(folder)).encode()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                contents[f"{path} inside"] = b"".join(map(packed.read, packed.namelist()))
    return {
        (where, canary) for where, content in contents.items() for canary in CANARIES if canary.encode() in content
    }


@pytest.fixture
def clm(address, tmp_path, capfd, monkeypatch):
    """Runs `hf-rezero clm` with secrets in its arguments, and gives what it printed and the error that ended it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])

    def run(**extra):
        values = {
            "train_file": address,
            "output_dir": tmp_path / "run",
            "cache_dir": tmp_path / "cache",
            "token": "canarytoken",
            "hub_token": "canarytoken",
            "config_overrides": SHAPE,
            "block_size": 32,
            "max_steps": 2,
            "logging_steps": 1,
            "save_steps": 1,
            "do_train": True,
            "do_eval": True,
            "use_cpu": True,
            **extra,
        }
        words = [word for name, value in values.items() if value for word in (f"--{name}", str(value))]
        error = None
        try:
            commands.main(["clm", *words])
        except SystemExit as end:
            error = str(end)
        return error, "".join(capfd.readouterr())

    return run


def test_nothing_that_a_run_leaves_holds_a_secret_of_its_arguments(clm, tmp_path):
    error, printed = clm()
    assert error is None
    assert (tmp_path / "run" / "run.json").is_file() and "127.0.0.1" in (tmp_path / "run" / "README.md").read_text()
    assert not _found(tmp_path, printed)


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("text.txt", "gone.txt"),
        lambda url: url.replace("sig=", "sgi="),
        lambda url: url.replace("127.0.0.1", "127.0.0.1.invalid"),
        lambda url: url.replace("127.0.0.1:", "127.0.0.1:x"),
        lambda url: url.replace("http", "ftp"),
        lambda url: url.replace("text.txt", "a text.txt"),
    ],
)
def test_no_error_shows_a_secret(address, change, tmp_path):
    with pytest.raises((ConnectionError, ValueError)) as error:
        load_corpus(change(address), cache_dir=tmp_path)
    causes, cause = [], error.value
    while cause is not None:
        causes.append(f"{cause!r} {cause}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    assert not _found(tmp_path, *causes)


@pytest.mark.parametrize("option", ["train_file", "validation_file", "model_name_or_path", "config_name"])
def test_a_failed_command_shows_no_secret(address, clm, option, tmp_path):
    shape = SHAPE if option.endswith("_file") else None
    error, printed = clm(**{"config_overrides": shape, option: address.replace("text", "gone")})
    assert error and "hf-rezero: error: " in error.replace("hf-rezero clm", "hf-rezero")
    assert not _found(tmp_path, printed, error)


def test_a_corpus_and_its_record_have_the_address_alone(address, tmp_path):
    corpus = load_corpus(address, cache_dir=tmp_path)
    assert corpus.name == address.replace("canaryuser:canarypassword@", "").partition("?")[0]
    assert clean_name(address) == corpus.name
    for text in (
        redact(f"a=1,b={address}"),
        command_line(argv=["x.py", "--train_file", address]),
        shown(f"({address})"),
    ):
        assert corpus.name in text and not any(canary in text for canary in CANARIES)
