"""The short form of `make soak`: a few attacks of each kind, none of which loses anything, and what is judged as a failure."""

import json
import os
import subprocess
import sys

import pytest
from support.launch import SCRIPTS

from common.forks import KILLED, Outcome
from reliability import soak


SHORT = {"kills": 7, "files": 1, "ranks": 0, "inputs": 0, "names": "adamw"}


def test_a_short_attack_loses_nothing(tmp_path):
    path = tmp_path / "soak.json"
    options = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, SCRIPTS / "reproduce" / "run.py", "soak", *options, "--output", path]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    results = json.loads(path.read_text())
    rows = results["rows"]
    assert not results["failures"]
    assert sum(counts["attacks"] for row, counts in rows.items() if row.startswith(("kill", "signal"))) == 7
    assert rows["damaged checkpoint"]["attacks"] == rows["damaged state of GradInit"]["attacks"] == 5
    assert rows["NaN or infinity in one step"]["attacks"] == rows["NaN or infinity to the end"]["attacks"] == 4
    table = soak.table(results)
    assert table[0][:3] == ["attack", "number", "same weights"] and len(table) == len(rows) + 1


@pytest.mark.parametrize(
    ("status", "text", "written", "verdict"),
    [
        (0, "", b"right", "same weights"),
        (0, "", b"wrong", "other weights"),
        (0, "", None, "other weights"),
        (1, "hf-rezero clm: error: no", b"right", "lost"),
        (1, "Traceback (most recent call last):", b"right", "tracebacks"),
        (KILLED, "", b"right", "hung"),
    ],
)
def test_what_counts_as_a_failure(tmp_path, status, text, written, verdict):
    if written is not None:
        (tmp_path / "model.safetensors").write_bytes(written)
    assert soak.judge(Outcome(status, text), tmp_path, b"right") == verdict


def test_failures_are_kept_with_their_log(tmp_path):
    results = {"rows": {}, "failures": []}
    tally = soak.Tally(tmp_path / "soak.json", results)
    tally.add("kill, training", "same weights")
    tally.add("kill, training", "lost", log="step 3\nno checkpoint")
    saved = json.loads((tmp_path / "soak.json").read_text())
    assert saved["failures"] == ["kill, training: lost: step 3 no checkpoint"]
    assert saved["rows"]["kill, training"] == {
        **dict.fromkeys(soak.KEYS, 0),
        "attacks": 2,
        "same weights": 1,
        "lost": 1,
    }
