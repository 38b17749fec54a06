"""What a shell sees of a command: its exit status, one line for an error of its user, a traceback for a defect."""

import runpy
import sys

import pytest
from support.launch import SCRIPTS

from hf_rezero.commands import __main__ as program
from hf_rezero.commands.entry import run_command
from hf_rezero.publish.push import PushError
from hf_rezero.trainer.finite import NonFiniteError


def called(monkeypatch, error, *arguments):
    """How a process with these arguments ends whose command raises the error."""

    def main(argv):
        seen.append(argv)
        raise error

    seen = []
    monkeypatch.setattr(sys, "argv", ["/somewhere/hf-rezero clm", *arguments])
    with pytest.raises((SystemExit, type(error))) as end:
        run_command(main)
    return end.value, seen[0]


@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError, NonFiniteError, PushError])
def test_an_error_of_the_user_is_one_line_and_status_1(monkeypatch, kind):
    end, argv = called(monkeypatch, kind("got 3:\n   expected 4"), "--seed", "1")
    assert (end.code, argv) == ("hf-rezero clm: error: got 3: expected 4", ["--seed", "1"])


def test_debug_shows_the_traceback_and_is_not_seen_by_the_command(monkeypatch):
    error = ValueError("wrong")
    assert called(monkeypatch, error, "outputs/mine", "--debug") == (error, ["outputs/mine"])


def test_the_trainers_own_debug_is_left_to_it(monkeypatch):
    end, argv = called(monkeypatch, ValueError("wrong"), "--debug", "underflow_overflow")
    assert end.code == "hf-rezero clm: error: wrong" and argv == ["--debug", "underflow_overflow"]


def test_a_defect_keeps_its_traceback(monkeypatch):
    error = TypeError("defect")
    assert called(monkeypatch, error)[0] is error


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("hf-rezero grow", lambda words: program.main(["grow", *words])),
        ("grow.py", lambda words: runpy.run_path(str(SCRIPTS / "grow.py"), run_name="__main__")),
        ("grow.py", lambda words: runpy.run_module("hf_rezero.commands.grow", run_name="__main__", alter_sys=True)),
    ],
    ids=["program", "script", "module"],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy's, of a module imported before
def test_every_way_to_start_a_command_ends_the_same_way(name, start, tmp_path, monkeypatch):
    (tmp_path / "precious.txt").touch()
    words = ["outputs/none", str(tmp_path), "--num_layers", "1"]
    monkeypatch.setattr(sys, "argv", ["grow.py", *words])
    with pytest.raises(SystemExit) as end:
        start(words)
    assert end.value.code == f"{name}: error: {tmp_path} is not empty: choose another, or remove it."
