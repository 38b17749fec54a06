"""Files of a corpus from elsewhere: downloads, archives, and the cache."""

import base64
import bz2
import gzip
import hashlib
import http.client
import lzma
import os
import re
import struct
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import SplitResult, unquote, urlsplit

from ..files import written_whole
from .addresses import shown


MAX_CORPUS_BYTES = 2_000_000_000  # enwik9 twice; what is larger is unpacked by hand, or asked for
_CHUNK = 1 << 20
_PAGES = (b"<!doctype html", b"<html")


def default_cache() -> Path:
    """Where downloads and unpacked corpora are kept: HF_REZERO_CACHE, or below the cache of Hugging Face."""
    if "HF_REZERO_CACHE" in os.environ:
        return Path(os.environ["HF_REZERO_CACHE"]).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", home)).expanduser() / "hf_rezero"


def download(url: str, cache: Path, remedy: str, max_bytes: int = MAX_CORPUS_BYTES) -> Path:
    """The file behind an address, in the cache; a user and a password in it are sent to its host alone.

    Args:
        url: An http(s) address.
        cache: The folder of the cache.
        remedy: What else to do, for the message of an error.
        max_bytes: Where to stop.

    Raises:
        ConnectionError: It cannot be fetched, or not whole, or a page of HTML comes instead.
        TooLargeError: It is larger than `max_bytes`.
    """
    name = shown(re.sub(r"\s", "%20", url))
    target = cache / f"download-{cache_key(url)}" / _file_name(url)
    if target.is_file():
        return target
    try:
        with urllib.request.urlopen(_request(url), timeout=60) as answer:
            announced = answer.length
            check_size(announced or 0, max_bytes, name)
            first = answer.read(_CHUNK)
            if answer.headers.get_content_type() == "text/html" or first.lstrip().lower().startswith(_PAGES):
                raise OSError("a page of HTML came instead of a file")
            with written_whole(target) as part, part.open("xb") as out:
                out.write(first)
                copy_bounded(answer, out, max_bytes, name)
                if announced is not None and out.tell() != announced:
                    raise OSError(f"{out.tell()} of {announced} bytes arrived")
    except (OSError, http.client.HTTPException) as error:
        # the cause may say the address in full
        raise ConnectionError(f"cannot download {name} ({shown(error)}): {remedy}") from None
    return target


def _file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name or "corpus"


def _request(url: str) -> urllib.request.Request:
    if re.search(r"[\x00-\x20\x7f]", url):
        raise OSError("an address has no blanks: write %20")
    address = urlsplit(url)
    host = address.netloc.rpartition("@")[2]
    request = urllib.request.Request(address._replace(netloc=host).geturl(), headers={"User-Agent": "hf_rezero"})
    if address.username is not None:
        # "unredirected": a host that the answer points to does not get it
        request.add_unredirected_header("Authorization", f"Basic {_credentials(address)}")
    return request


def _credentials(address: SplitResult) -> str:
    return base64.b64encode(f"{unquote(address.username or '')}:{unquote(address.password or '')}".encode()).decode()


class TooLargeError(ValueError):
    """A file holds more than was allowed."""


def check_size(num_bytes: int, max_bytes: int, what: object) -> None:
    """Refuse more bytes than are allowed.

    Raises:
        TooLargeError: There are more.

    Example:
        >>> check_size(5, 4, "a.xz")
        Traceback (most recent call last):
        ...
        hf_rezero.data.download.TooLargeError: a.xz holds more than 4 bytes: if it is what you want, allow more with --max_corpus_bytes, or max_bytes in Python.
    """
    if num_bytes > max_bytes:
        raise TooLargeError(
            f"{what} holds more than {max_bytes} bytes: if it is what you want, allow more with --max_corpus_bytes, or "
            f"max_bytes in Python."
        )


def copy_bounded(source: BinaryIO, out: BinaryIO, max_bytes: int, what: object) -> None:
    """Copy the rest of a file behind what `out` holds, a megabyte at a time.

    Raises:
        TooLargeError: `out` would hold more than `max_bytes`.
    """
    while chunk := source.read(_CHUNK):
        check_size(out.tell() + len(chunk), max_bytes, what)
        out.write(chunk)


@contextmanager
def _zip_member(path: Path):
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f"{path} holds {len(members)} files, one is needed: unpack it and give the file you want")
        with archive.open(members[0]) as source:
            yield source


OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zip": _zip_member}
# what the readers of archives raise for damaged ones; a full disk is an OSError too, with a number
DAMAGES = (EOFError, OSError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, struct.error)


def decompressed(path: Path, cache: Path, max_bytes: int = MAX_CORPUS_BYTES) -> Path:
    """A plain file with the content of a compressed one, in the cache; other files as they are.

    Args:
        path: The file.
        cache: The folder of the cache.
        max_bytes: Where to stop.

    Raises:
        ValueError: The file is damaged, an archive of another kind, or, as a `TooLargeError`, its content is larger than
            `max_bytes`.
    """
    if path.suffix in {".zst", ".lz4", ".7z", ".rar", ".tar", ".tgz"}:
        raise ValueError(
            f"{path} is an archive of a kind not read here: unpack it, or use one of {', '.join(OPENERS)}"
        )
    if path.suffix not in OPENERS:
        return path
    stat = path.stat()
    target = cache / f"{path.stem}-{cache_key(path.resolve(), stat.st_size, stat.st_mtime_ns)}"
    if target.is_file():
        return target
    try:
        with OPENERS[path.suffix](path) as source, written_whole(target) as part, part.open("xb") as out:
            copy_bounded(source, out, max_bytes, path)
    except DAMAGES as error:
        if getattr(error, "errno", None) is not None:  # a full disk or the like, not the file's fault
            raise
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and fetch it again") from error
    return target


def cache_key(*parts: object) -> str:
    """A short name for what the parts say."""
    return hashlib.sha256(repr(tuple(map(str, parts))).encode()).hexdigest()[:16]
