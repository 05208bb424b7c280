"""Files that appear whole or not at all, and files of one JSON object a line that only ever grow."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a file that a list beside it may name: it stays in the folder


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write to a temporary name, sync, rename."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_bytes(content if isinstance(content, bytes) else content.encode())
    sync(tmp)
    tmp.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; none without a file. Half a line of a killed writer is left out, and
    whatever else is no object."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # also for bytes that are no text
            continue
    return [entry for entry in found if isinstance(entry, dict)]


def append(path: Path, *entries: Mapping[str, Any]) -> None:
    """Add a line for each, and return when they are on the disk."""
    with path.open("a") as f:
        f.writelines(json.dumps(entry) + "\n" for entry in entries)
        f.flush()
        os.fsync(f.fileno())


def end_line(path: Path) -> None:
    """Half a line of a killed writer must not swallow the next one."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as f:
            f.write(b"\n")


def try_lock(file: IO[Any]) -> bool:
    """Take the one lock of an open file, which goes with its last descriptor: is it ours, not somebody else's?

    On a file system without locks there is none to wait for.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own name at the end; nothing is left of it after an error, and
    what the folder held before stays.
    """
    tmp, old = folder.with_name(f"tmp-{folder.name}"), folder.with_name(f"tmp-old-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        yield tmp
        sync(tmp)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    tmp.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
