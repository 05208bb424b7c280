"""Is a checkpoint whole? Its manifest lists every file with size and sha256; damage is named file by file.

    {"format": 1, "files": [{"name": "rank_00000.safetensors", "bytes": 4096, "sha256": "…"}, …]}

A manifest says nothing that is believed unseen: names stay inside the folder, links are refused, and the files that
state.json's number of ranks calls for must all be listed.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from maws import dist
from maws.files import PLAIN_NAME, sha256, try_lock, write_json

NAME = "manifest.json"
FORMAT = 1
MAX_RANKS = 1 << 20  # more than there are GPUs: a number of ranks above it is not one
THREADS = 4  # files a rank hashes at a time: a disk is faster than a core


class Entry(NamedTuple):
    """A file of a checkpoint as it was written."""

    name: str
    bytes: int
    sha256: str


def write(checkpoint: Path, files: list[Entry]) -> None:
    write_json(checkpoint / NAME, {"format": FORMAT, "files": [file._asdict() for file in files]})


def problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty: it is whole.

    All ranks take part (or one process): each reads its share of the files.
    """
    files, found = dist.broadcast(_listed(checkpoint) if dist.rank() == 0 else None)
    with ThreadPoolExecutor(THREADS) as pool:
        mine = list(pool.map(lambda entry: _damage(checkpoint, entry), files[dist.rank() :: dist.world_size()]))
    for lines in dist.gather_objects([line for line in mine if line]):
        found += lines
    return found


def _listed(checkpoint: Path) -> tuple[list[Entry], list[str]]:
    """The files of a manifest, and what is wrong with the manifest itself."""
    path = checkpoint / NAME
    try:
        content = json.loads(path.read_text())
        if content["format"] > FORMAT:
            return [], [f"{path} has format {content['format']}, this version reads up to {FORMAT}"]
        files = [_entry(file) for file in content["files"]]
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            raise ValueError("a file is listed twice")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return [], [f"{path} cannot be used: {e if isinstance(e, (OSError, ValueError)) else repr(e)}"]
    missing = sorted({"state.json", *_rank_files(checkpoint)} - set(names))
    return files, [f"{path} does not list {', '.join(missing[:3])}"] if missing else []


def _rank_files(checkpoint: Path) -> list[str]:
    """What must be listed beside state.json, as that says; nothing when it says nothing, for then its hash is wrong."""
    try:
        ranks = json.loads((checkpoint / "state.json").read_text())["ranks"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    known = isinstance(ranks, int) and 0 < ranks <= MAX_RANKS
    return [f"rank_{rank:05}.safetensors" for rank in range(ranks if known else 1)]


def _entry(file: dict[str, Any]) -> Entry:
    """Raises ValueError, KeyError or TypeError for what no save of ours has written."""
    entry = Entry(file["name"], file["bytes"], file["sha256"])
    if not re.fullmatch(PLAIN_NAME, entry.name):
        raise ValueError(f"{entry.name!r} is not the name of a file in the checkpoint's folder")
    if not isinstance(entry.bytes, int) or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
        raise ValueError(f"size or hash of {entry.name} is not one")
    return entry


def _damage(checkpoint: Path, entry: Entry) -> str:
    """What is wrong with a file; empty: nothing."""
    path = checkpoint / entry.name
    try:
        if path.is_symlink():
            return f"{path} is a link, not the file that was written"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{path} has {path.stat().st_size} bytes, {entry.bytes} were written"
        if sha256(path) != entry.sha256:
            return f"{path} does not have the hash it was written with"
    except OSError as e:
        return f"{path} cannot be read: {e}"
    return ""


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """While inside, no training deletes the checkpoint, not even one in another process.

    A lock of the system, which it drops by itself with the process; on a file system without locks there is none.
    """
    try:
        file = (checkpoint / NAME).open("rb")
    except OSError:  # whoever reads it says what is missing
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def delete(checkpoint: Path) -> bool:
    """Remove a checkpoint, unless somebody reads it: was it removed? A kill leaves no half of it under its name."""
    try:
        with (checkpoint / NAME).open("r+b") as file:
            if not try_lock(file):
                return False
            gone = checkpoint.with_name(f"tmp-old-{checkpoint.name}.{os.getpid()}")
            checkpoint.rename(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True
