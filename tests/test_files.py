"""Files that are written whole, and what killed writers leave behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hf_rezero.files import remove_orphans, temporary_folder, write_text, written_whole


WRITES = """
import sys, time
from hf_rezero.files import written_whole
with written_whole(sys.argv[1]) as path:
    path.write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing `a.txt`."""
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path / "a.txt")], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_file_of_a_killed_writer_goes_and_that_of_a_live_one_stays(tmp_path, writer):
    write_text(tmp_path / "b.txt", "all")
    (half,) = tmp_path.glob("*.tmp")
    assert half.read_text() == "half"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    write_text(tmp_path / "b.txt", "again")
    assert not list(tmp_path.glob("*.tmp")) and (tmp_path / "b.txt").read_text() == "again"


def test_a_file_of_our_own_stays_while_it_is_written(tmp_path):
    with written_whole(tmp_path / "a.txt") as first:
        first.write_text("first")
        write_text(tmp_path / "b.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"


@pytest.mark.parametrize(
    "name, days, stays",
    [
        ("a.txt." + "0" * 32 + ".tmp", 0, True),  # of a release that did not name the process
        ("a.txt." + "0" * 32 + ".tmp", 2, False),
        (f"a.txt.{'1' * 12}-999999999-{'2' * 12}.tmp", 0, True),  # of another machine
        (f"a.txt.{'1' * 12}-999999999-{'2' * 12}.tmp", 2, False),
        ("notes.tmp", 900, True),  # of somebody else
        ("a.txt.tmp", 900, True),
    ],
)
def test_what_this_machine_cannot_tell_goes_after_a_day(tmp_path, name, days, stays):
    path = tmp_path / name
    path.write_text("half")
    then = time.time() - days * 24 * 60 * 60
    os.utime(path, (then, then))
    remove_orphans(tmp_path)
    assert path.exists() == stays


FILLS = """
import sys, time
from hf_rezero.files import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    (folder / "part").write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_process_goes_and_that_of_a_live_one_stays(tmp_path):
    command = [sys.executable, "-c", FILLS, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with temporary_folder(tmp_path / "a") as ours:
            (theirs,) = [path for path in tmp_path.iterdir() if path != ours]
        assert (theirs / "part").read_text() == "half" and not ours.exists()
        process.kill()
        process.wait()
    with temporary_folder(tmp_path / "b") as ours:
        assert list(tmp_path.iterdir()) == [ours]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("days", [0, 2])
def test_a_folder_of_another_machine_stays_while_something_in_it_is_written(tmp_path, days):
    path = tmp_path / f"a.{'1' * 12}-999999999-{'2' * 12}.tmp"
    path.mkdir()
    (path / "part").write_text("half")
    then = time.time() - 2 * 24 * 60 * 60
    os.utime(path / "part", (time.time() - days * 24 * 60 * 60,) * 2)
    os.utime(path, (then, then))
    remove_orphans(tmp_path)
    assert path.exists() == (days == 0)
