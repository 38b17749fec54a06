"""Files that are written whole or not at all, folders for the time being, and JSON."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any


_TEMPORARY = re.compile(r"\.(?:([0-9a-f]{12})-(\d+)-[0-9a-f]{12}|[0-9a-f]{32})\.tmp$")  # without a process in 0.1.0
_DAY = 24 * 60 * 60


@contextmanager
def written_whole(target: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write to; it replaces `target` when the block ends, and an error leaves `target` as it was.

    Several processes may write the same file at the same time. What killed ones have left in the folder is removed.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp(), "a.txt")
        >>> with written_whole(target) as path:
        ...     _ = path.write_text("all of it")
        >>> target.read_text()
        'all of it'
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(target.parent)
    temporary = _temporary(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder beside `target`, to make it in; it is gone when the block ends.

    What killed processes have left beside it is removed.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp(), "tokens")
        >>> with temporary_folder(target) as folder:
        ...     _ = Path(folder, "part").write_text("half")
        >>> list(target.parent.iterdir())
        []
    """
    target = Path(target)
    remove_orphans(target.parent)
    folder = _temporary(target)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.{_place()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp")


def remove_orphans(folder: Path) -> None:
    """Remove the temporary files and folders in a folder that nobody writes any more.

    That is so where the process that made one is gone, as this machine can tell of its own, and where nothing was
    written for a day.
    """
    for path in folder.glob("*.tmp"):
        found = _TEMPORARY.search(path.name)
        with suppress(OSError):  # another process may have removed it, or may have to
            if found and (_is_gone(*found.groups()) or time.time() - _last_written(path) > _DAY):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _last_written(path: Path) -> float:
    inside = path.rglob("*") if path.is_dir() else []
    return max(each.lstat().st_mtime for each in [path, *inside])


@cache
def _place() -> str:
    """What has process numbers of its own: a machine since its start, and a container there."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _is_gone(place: str | None, process: str | None) -> bool:
    return process is not None and place == _place() and not process_exists(int(process))


def process_exists(pid: int) -> bool:
    """Whether a process of this machine has this number; True where that cannot be told."""
    if os.name != "posix":  # elsewhere a signal 0 is not harmless
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is not ours, or there can be no such number
        return True
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON whole; numbers that JSON does not have, infinite ones and NaN, become null."""
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict:
    """The JSON object in a file, or nothing where there is none.

    Raises:
        ValueError: The file is damaged, or holds something other than an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or let the run write it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]}, not an object: remove it, or let the run write it again.")
    return content
