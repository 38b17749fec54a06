"""Files of a corpus from elsewhere: downloads, archives, and the cache."""

import bz2
import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ..files import written_whole


_CHUNK = 1 << 20


def default_cache() -> Path:
    """Where downloads and unpacked corpora are kept: HF_REZERO_CACHE, or below the cache of Hugging Face."""
    if "HF_REZERO_CACHE" in os.environ:
        return Path(os.environ["HF_REZERO_CACHE"]).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", home)).expanduser() / "hf_rezero"


def download(url: str, cache: Path, remedy: str) -> Path:
    """The file behind an address, in the cache.

    Raises:
        ConnectionError: It cannot be fetched, or not whole; `remedy` says what else to do.
    """
    target = cache / f"download-{cache_key(url)}" / (PurePosixPath(urlsplit(url).path).name or "corpus")
    if target.is_file():
        return target
    request = urllib.request.Request(url, headers={"User-Agent": "hf_rezero"})
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as answer,
            written_whole(target) as part,
            part.open("xb") as out,
        ):
            shutil.copyfileobj(answer, out, _CHUNK)
            announced = answer.headers["Content-Length"]
            if announced is not None and out.tell() != int(announced):
                raise OSError(f"{out.tell()} of {announced} bytes arrived")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({error}): {remedy}") from error
    return target


@contextmanager
def _zip_member(path: Path):
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f"{path} holds {len(members)} files, one is needed: unpack it and give the file you want")
        with archive.open(members[0]) as source:
            yield source


OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zip": _zip_member}


def decompressed(path: Path, cache: Path) -> Path:
    """A plain file with the content of a compressed one, in the cache; other files as they are.

    Raises:
        ValueError: The file is damaged, or an archive of another kind.
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
            shutil.copyfileobj(source, out, _CHUNK)
    except (EOFError, OSError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        if getattr(error, "errno", None) is not None:  # a full disk or the like, not the file's fault
            raise
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and fetch it again") from error
    return target


def cache_key(*parts: object) -> str:
    """A short name for what the parts say."""
    return hashlib.sha256(repr(tuple(map(str, parts))).encode()).hexdigest()[:16]
