"""The folder of a run: it can be written to, it has room, and no other run is in it."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from platform import node

from transformers.utils import logging

from ..files import process_exists


logger = logging.get_logger(__name__)
LOCK = "run.lock"
_PROBE = b"\0" * 2**16


@dataclass(frozen=True)
class Holder:
    """Who holds the lock of a folder.

    Attributes:
        host: Name of the machine.
        pid: The process there.
        start: When the process started, in clock ticks since its machine did; None where the system does not tell.
        since: When the lock was taken.
    """

    host: str
    pid: int
    start: int | None
    since: str

    @classmethod
    def of_this_process(cls) -> "Holder":
        """This process, now."""
        return cls(node(), os.getpid(), _start_of(os.getpid()), datetime.now(UTC).isoformat(timespec="seconds"))

    def is_this_process(self) -> bool:
        """Whether the lock is our own, from an outer call."""
        return (self.host, self.pid, self.start) == (node(), os.getpid(), _start_of(os.getpid()))

    def is_alive(self) -> bool:
        """Whether the process runs, as far as this machine can tell; another process may have its number by now."""
        if not Path("/proc/self/stat").exists():
            return process_exists(self.pid)
        start = _start_of(self.pid)
        return start is not None and start == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _start_of(pid: int) -> int | None:
    """When a process started; None where it has ended, or where there is no /proc."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
    except OSError:
        return None
    return None if state in "ZX" else int(numbers[18])  # a zombie has ended


@contextmanager
def locked(folder: str | os.PathLike, take_over: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder, by a file `run.lock` in it, until the block ends, also by an error.

    The lock of a process of this machine that has ended is taken over, with a warning. Inside of a block of the same
    process nothing happens.

    Args:
        folder: Made where it does not exist.
        take_over: Take over the lock of another machine too: whether its process runs cannot be told from here.

    Raises:
        ValueError: Another run is in the folder, or seems to be, or the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with locked(folder):
        ...     [path.name for path in folder.iterdir()]
        ['run.lock']
        >>> list(folder.iterdir())
        []
    """
    holder = holder_of(folder)
    if holder is not None and holder.is_this_process():
        yield
        return
    check_writable(folder)
    _take(Path(folder, LOCK), take_over)
    try:
        yield
    finally:
        holder = holder_of(folder)
        if holder is not None and holder.is_this_process():  # or it was taken over, since a person said so
            Path(folder, LOCK).unlink()


def _take(lock: Path, take_over: bool) -> None:
    for _ in range(2):  # the second time, after a stale lock is gone
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(Holder.of_this_process())))
            return
        except FileExistsError:
            holder = check_unlocked(lock.parent, take_over)
        if holder is not None:
            _remove_stale(lock, holder)
    raise ValueError(f"{lock} was taken by another run just now: use another output_dir.")


def _remove_stale(lock: Path, holder: Holder) -> None:
    """Away with the lock of a run that has ended: by moving it, so that of two that see it only one does."""
    moved = lock.with_name(f"{LOCK}.{uuid.uuid4().hex}.tmp")
    try:
        lock.rename(moved)
    except FileNotFoundError:
        return
    if _read(moved) != holder:  # of a run that was quicker, and lives
        moved.rename(lock)
        return
    moved.unlink()
    logger.warning(f"{lock} was left by a run that has ended ({holder}), and is taken over.")


def holder_of(folder: str | os.PathLike) -> Holder | None:
    """Who holds the lock of a folder; None where there is none.

    Raises:
        ValueError: The lock cannot be read.
    """
    lock = Path(folder, LOCK)
    try:
        return _read(lock)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{lock} is damaged: remove it, if no run is in {folder}.") from None


def _read(lock: Path) -> Holder:
    return Holder(**json.loads(lock.read_text(encoding="utf-8")))


def check_unlocked(folder: str | os.PathLike, take_over: bool = False) -> Holder | None:
    """Refuse a folder in which another run is; the holder of a lock that can be taken over, or None, otherwise.

    Raises:
        ValueError: Another run is there, or seems to be.
    """
    holder = holder_of(folder)
    if holder is None or holder.is_this_process():
        return None
    if holder.host != node() and not take_over:
        raise ValueError(
            f"{folder} is in use by {holder}: use another output_dir. If that run has ended, which cannot be told from "
            f"{node()}, give --take_over true."
        )
    if holder.host == node() and holder.is_alive():
        raise ValueError(f"{folder} is in use by {holder}: use another output_dir, or wait until that run has ended.")
    return holder


def check_writable(folder: str | os.PathLike, needed: int = 0) -> None:
    """Write a little into a folder, and refuse it if that fails or if less than `needed` bytes are free.

    Raises:
        ValueError: The folder is read-only, its disk is full, or it is no folder.
    """
    probe = Path(folder, f"probe.{uuid.uuid4().hex}.tmp")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("xb") as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(
            f"output_dir={folder} cannot be written to ({error.strerror or error}): name another, or make room."
        ) from None
    finally:
        _remove(probe)
    if free < needed:
        raise ValueError(
            f"output_dir={folder} has {free / 2**20:,.0f} MiB free, and a checkpoint of this run takes at least "
            f"{needed / 2**20:,.0f} MiB: make room, or name another."
        )


def _remove(probe: Path) -> None:
    with suppress(OSError):  # it cannot be there
        probe.unlink(missing_ok=True)
