"""Where input lies: paths, globs, braces and URLs, all opened in one way.

photos/   shards/{00000..00127}.tar   s3://bucket/**/*.parquet   gs://…   memory://…   file:///…   anything fsspec knows

S3 and Google Cloud Storage need nothing more installed: pyarrow has both. Every other protocol is fsspec's, and fsspec
says what to install for it. A read that fails in the network is repeated at the place where it stopped.
"""

import contextlib
import functools
import glob
import io
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from data_pipeline.errors import DataError, UsageError

PAUSES: Final = (0.5, 2.0, 8.0)  # seconds before a failed request is made again; ours
BUFFER: Final = 1 << 20  # bytes of one request
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_LOCAL: Final = re.compile(r"(file|local)://", re.IGNORECASE)
_HTTP: Final = re.compile(r"(.*::)?https?://", re.IGNORECASE)

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """How inputs are read, as asked for."""

    storage: str = field(
        default="{}", repr=False
    )  # JSON, for the file system; may hold secrets, so it is never written
    caption_column: str | None = None
    image_column: str | None = None
    allow_http: bool = False


@dataclass(frozen=True)
class File:
    """One file of an input."""

    name: str  # in keys and in the manifest
    url: str  # a plain path here, else a URL
    size: int
    stamp: str = ""  # another one after a change: time, checksum, whatever the file system has; never in a shard set


class TooLargeError(OSError):
    """More bytes than were allowed."""


# ---------------------------------------------------------------------------------------------------------------- names


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def local(url: str) -> Path | None:
    """The path of what lies on this machine."""
    if not is_url(url):
        return Path(url)
    return Path(_LOCAL.sub("", url)) if _LOCAL.match(url) else None


def printable(url: str) -> str:
    """Without a user name and password, and without what a signed link adds."""
    url = re.sub(r"(://)[^/@]*@", r"\1", url)
    return url.split("?")[0] if _HTTP.match(url) else url


def child(url: str, relative: str) -> str:
    here = local(url)
    return str(here / relative) if here is not None else f"{url.rstrip('/')}/{relative}"


def parent(url: str) -> str:
    here = local(url)
    return str(here.parent) if here is not None else url.rstrip("/").rsplit("/", 1)[0]


def last_name(url: str) -> str:
    """Of a file or folder, for keys."""
    here = local(url)
    return here.resolve().name if here is not None else printable(url).rstrip("/").rsplit("/", 1)[-1]


# --------------------------------------------------------------------------------------------------------- file systems


def file_system(url: str, reading: Reading) -> tuple[Any, str]:
    """What opens the URL, and the path in it."""
    if _HTTP.match(url) and not reading.allow_http:
        raise DataError(
            f"{printable(url)}: nothing is fetched over HTTP unless --allow-http is given; a download may differ each "
            "time, so better fetch first (img2dataset does) and build from the files"
        )
    protocol = url.split("://", 1)[0].lower()
    try:
        from data_pipeline.sources.stores import open_store  # here: a tenth of a second that only stores pay

        return open_store(url, protocol, storage_options(reading.storage))
    except (ImportError, ValueError, TypeError, OSError) as error:
        raise DataError(f"cannot open {printable(url)}: {error}") from None


@functools.lru_cache(maxsize=8)
def storage_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UsageError(f'--storage-options is not JSON ({error}): write \'{{"endpoint_url": "…"}}\'') from None
    if not isinstance(options, dict):
        raise UsageError("--storage-options must be a JSON object, such as '{\"anon\": true}'")
    return options


# ------------------------------------------------------------------------------------------------------------- looking


def expand(text: str, reading: Reading) -> list[str]:
    """The places an input names: itself, or what its braces and wild cards stand for, in their order."""
    if not is_url(text) and os.path.lexists(text):
        return [text]
    found: list[str] = []
    for pattern in _braces(text):
        matches = _glob(pattern, reading) if glob.has_magic(pattern) and not _is_literal(pattern) else [pattern]
        if not matches:
            raise DataError(f"--input {printable(text)}: nothing matches {printable(pattern)}")
        found += matches
    return list(dict.fromkeys(found))


def _braces(text: str) -> list[str]:
    if "{" not in text:
        return [text]
    import braceexpand

    try:
        return list(braceexpand.braceexpand(text))
    except (ValueError, IndexError) as error:  # UnbalancedBracesError is a ValueError
        raise UsageError(f"--input {text}: the braces do not close ({error})") from None


def _is_literal(pattern: str) -> bool:
    return not is_url(pattern) and os.path.lexists(pattern)


def _glob(pattern: str, reading: Reading) -> list[str]:
    here = local(pattern)
    if here is not None:
        return sorted(glob.glob(str(here), recursive=True))
    system, path = file_system(pattern, reading)
    prefix = _prefix(pattern, path)
    return [prefix + name for name in sorted(steadily(system.glob, path))]


def _prefix(url: str, path: str) -> str:
    """What stands before the path that the file system knows: s3://bucket/x is bucket/x there."""
    url = url.rstrip("/")
    return url[: len(url) - len(path)] if url.endswith(path) else ""


def look(url: str, name: str, reading: Reading) -> File | None:
    """The file at this place; None for a folder. FileNotFoundError if there is neither."""
    here = local(url)
    if here is not None:
        status = here.stat()
        if stat.S_ISDIR(status.st_mode):
            return None
        return File(name, str(here.resolve()), status.st_size, str(status.st_mtime_ns))
    system, path = file_system(url, reading)
    info = steadily(system.info, path)
    return None if info["type"] == "directory" else File(name, url, int(info["size"] or 0), _stamp(info))


def walk(root: str, reading: Reading, without: Path | None = None) -> Iterator[File]:
    """Files below a folder, named relative to it, sorted; hidden ones and the folder `without` are passed over."""
    here = local(root)
    if here is not None:
        yield from _walk_here(here, "", without)
        return
    system, path = file_system(root, reading)
    yield from _walk_there(system, path, "", _prefix(root, path))


def _walk_here(folder: Path, before: str, without: Path | None) -> Iterator[File]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if path.resolve() != without:
                yield from _walk_here(path, f"{before}{entry.name}/", without)
            continue
        try:
            status = path.stat()  # a link that points at itself is no file
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            yield File(before + entry.name, str(path.absolute()), status.st_size, str(status.st_mtime_ns))


def _walk_there(system: Any, path: str, before: str, prefix: str) -> Iterator[File]:
    try:
        entries = steadily(system.ls, path, detail=True)
    except FileNotFoundError:
        entries = []
    for info in sorted(entries, key=lambda info: info["name"]):
        name = info["name"].rstrip("/").rsplit("/", 1)[-1]
        if name.startswith(".") or not name or info["name"].rstrip("/") == path.rstrip("/"):
            continue
        if info["type"] == "directory":
            yield from _walk_there(system, info["name"].rstrip("/"), f"{before}{name}/", prefix)
        else:
            yield File(before + name, prefix + info["name"], int(info["size"] or 0), _stamp(info))


def _stamp(info: dict[str, Any]) -> str:
    """Checksum or time, under the names that file systems use."""
    names = ("ETag", "etag", "md5Hash", "checksum", "sha256", "mtime", "LastModified", "last_modified", "updated")
    return "|".join(f"{name}={info[name]}" for name in (*names, "created") if info.get(name) is not None)


# ------------------------------------------------------------------------------------------------------------- reading


def steadily(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """A request, made again after a pause when the network fails it."""
    for pause in (*PAUSES, None):
        try:
            return call(*arguments, **options)
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, TooLargeError):
            raise
        except Exception as error:  # file systems raise what their clients raise
            if pause is None:
                raise DataError(f"{type(error).__name__}: {error}; the same command continues") from None
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def open_at(file: File, reading: Reading) -> BinaryIO:
    """Bytes, read forwards or by position."""
    here = local(file.url)
    if here is not None:
        return here.open("rb")
    return io.BufferedReader(_Steady(file, reading), BUFFER)  # pyright: ignore[reportReturnType]


def read_at(url: str, limit: int, reading: Reading) -> bytes:
    """All of a small file; TooLargeError when it has more bytes, OSError when it is no ordinary file."""
    here = local(url)
    if here is not None:
        status = here.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{here} is not an ordinary file")
        if status.st_size > limit:
            raise TooLargeError(f"{status.st_size:,} bytes")
        return here.read_bytes()
    system, path = file_system(url, reading)
    return steadily(_read_there, system, path, limit)


def _read_there(system: Any, path: str, limit: int) -> bytes:
    with system.open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise TooLargeError(f"more than {limit:,} bytes")
    return data


class _Steady(io.RawIOBase):
    """A file far away that is opened again where it was when the network fails."""

    def __init__(self, file: File, reading: Reading) -> None:
        self._file, self._reading = file, reading
        self._open: Any = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = steadily(self._read, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            if self._open is None:
                system, path = file_system(self._file.url, self._reading)
                self._open = system.open(path, "rb")
            if self._position >= self._file.size:
                return b""
            if self._open.tell() != self._position:
                self._open.seek(self._position)
            return self._open.read(min(size, self._file.size - self._position))
        except Exception:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._open is not None:
            with contextlib.suppress(Exception):  # it failed before; what counts is the error that led here
                self._open.close()
            self._open = None

    def close(self) -> None:
        self._drop()
        super().close()
