"""The folder of a run: one run at a time, and what cannot be written is found before work begins."""

import errno
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.training import make_trainer
from transformers import TrainerCallback

from hf_rezero import ReZeroForCausalLM
from hf_rezero.trainer.checkpoints import last_checkpoint
from hf_rezero.trainer.folder import LOCK, Holder, check_unlocked, check_writable, holder_of, locked


def lock_of(folder, holder):
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))


@pytest.fixture
def other():
    """A process that lives until the test ends, as the holder of a lock."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    yield Holder(platform.node(), process.pid, start, "2026-01-01T00:00:00+00:00")
    process.communicate()


def test_a_lock_is_there_inside_of_the_block_alone(tmp_path):
    with locked(tmp_path / "run"):
        holder = holder_of(tmp_path / "run")
        assert (holder.host, holder.pid) == (platform.node(), os.getpid()) and holder.is_alive()
        with locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK).exists(), "the inner block has released the lock of the outer"
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        raise KeyError
    assert not list((tmp_path / "run").iterdir())


def test_a_second_run_is_refused(make_config, arguments, other):
    args = arguments()
    lock_of(Path(args.output_dir), other)
    with pytest.raises(
        ValueError, match=rf"run is in use by process {other.pid} on .*, since 2026-01-01T.*: use another"
    ):
        make_trainer(ReZeroForCausalLM(make_config()), args).train()
    assert holder_of(args.output_dir) == other
    with pytest.raises(ValueError, match="is in use by"), locked(args.output_dir, take_over=True):
        pass


def test_the_lock_of_a_run_that_has_ended_is_taken_over(tmp_path, other, caplog):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    ended = replace(other, pid=int(process.stdout))
    reused = replace(other, start=other.start - 1)  # its number belongs to a later process by now
    for stale in (ended, reused):
        caplog.clear()
        lock_of(tmp_path, stale)
        assert check_unlocked(tmp_path) == stale
        with locked(tmp_path):
            assert holder_of(tmp_path).pid == os.getpid()
        assert f"was left by a run that has ended (process {stale.pid} on {platform.node()}" in caplog.text
        assert not list(tmp_path.iterdir())


def test_a_zombie_has_ended(tmp_path):
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its parent has not asked yet
    start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    assert not Holder(platform.node(), pid, start, "").is_alive()
    os.waitpid(pid, 0)


def test_the_lock_of_another_machine_is_taken_over_on_request(tmp_path, other):
    lock_of(tmp_path, replace(other, host="node17"))
    with pytest.raises(ValueError, match=rf"process {other.pid} on node17.* --take_over true"), locked(tmp_path):
        pass
    with locked(tmp_path, take_over=True):
        assert holder_of(tmp_path).host == platform.node()


@pytest.mark.parametrize("content", [b"", b"\xff", b"null", b"[]", b"{}", b'{"host": 1'])
def test_a_damaged_lock_is_named(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with pytest.raises(ValueError, match=r"run.lock is damaged: remove it, if no run is in"), locked(tmp_path):
        pass


def test_of_two_that_see_a_stale_lock_one_gets_it(tmp_path, other, monkeypatch):
    ended = replace(other, start=1)
    lock_of(tmp_path, ended)
    rename = Path.rename

    def late(path, target):
        if json.loads(path.read_text())["start"] == 1:
            lock_of(tmp_path, other)  # meanwhile the other has taken it over, and runs
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ValueError, match="is in use by"), locked(tmp_path):
        pass
    assert holder_of(tmp_path) == other and len(list(tmp_path.iterdir())) == 1


def test_the_lock_of_a_training_goes_also_by_an_error(make_config, arguments):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert holder_of(args.output_dir).pid == os.getpid()
            raise KeyError("no")

    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(), callbacks=[Fails()])
    with pytest.raises(KeyError):
        trainer.train()
    assert holder_of(trainer.args.output_dir) is None


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(make_config, arguments, monkeypatch, code):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments())
    before, fsync = trainer.state.global_step, os.fsync

    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(
        ValueError, match=rf"output_dir=.*run cannot be written to \({os.strerror(code)}\): name another"
    ):
        trainer.train()
    monkeypatch.setattr(os, "fsync", fsync)
    assert trainer.state.global_step == before and not list(Path(trainer.args.output_dir).glob("*"))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written to"):
        check_writable(tmp_path / "run")


def test_room_for_a_checkpoint_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"MiB free, and a checkpoint of this run takes at least 953,674,316 MiB"):
        check_writable(tmp_path, needed=10**15)


@pytest.fixture(params=["size=64k", "ro"])
def small_disk(request, tmp_path):
    """A file system of 64 kB that is full, or one that is read-only; only root can make them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"file systems cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_and_a_read_only_disk_are_found_at_the_start(make_config, arguments, small_disk):
    if os.access(small_disk, os.W_OK):
        (small_disk / "old").write_bytes(bytes(40_000))
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(output_dir=str(small_disk)))
    with pytest.raises(ValueError, match=r"cannot be written to \((No space left on device|Read-only file system)\)"):
        trainer.train()
    assert not list(small_disk.glob("probe*")) and not list(small_disk.glob("run*"))


UNWRITTEN = {
    "Python": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
}


@pytest.mark.parametrize("writer", UNWRITTEN)
@pytest.mark.parametrize("place", ["_save_optimizer_and_scheduler", "_save"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(make_config, arguments, writer, place):
    args = arguments(save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer = make_trainer(ReZeroForCausalLM(make_config()), args)
    write = getattr(trainer, place)

    def fails_later(*values, **named):
        if trainer.state.global_step > 2:
            raise UNWRITTEN[writer]
        return write(*values, **named)

    setattr(trainer, place, fails_later)
    with pytest.raises(OSError, match=r"checkpoint-4 was not written \(.*\). The checkpoints from before are whole"):
        trainer.train()
    assert last_checkpoint(args.output_dir) == str(Path(args.output_dir, "checkpoint-2"))


def test_another_error_of_a_save_stays_what_it_is(make_config, arguments):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments())

    def fails(*args):
        raise RuntimeError("CUDA error")

    trainer._save = fails
    with pytest.raises(RuntimeError, match="^CUDA error$"):
        trainer.save_model()


def test_a_disk_that_fills_up_leaves_the_older_checkpoint_whole(make_config, arguments, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"file systems cannot be mounted here: {made.stderr.strip()}")
    try:
        args = arguments(output_dir=str(folder / "run"), save_strategy="steps", save_steps=2)
        trainer = make_trainer(ReZeroForCausalLM(make_config()), args)
        with pytest.raises(OSError, match="checkpoint-4 was not written"):
            trainer.train()
        assert last_checkpoint(args.output_dir) == str(Path(args.output_dir, "checkpoint-2"))
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # the error holds a file open


def test_fp16_on_a_cpu_is_refused(arguments):
    with pytest.raises(ValueError, match="got fp16 on a CPU"):
        arguments(fp16=True)
