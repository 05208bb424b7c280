"""What a build was made from: names, sizes and sha256 of its inputs.

A file, or the images of a folder, of up to WHOLE bytes on this machine is hashed whole. Of more, and of what lies in a
store, only the list of names and sizes is hashed: to read terabytes before the first picture is looked at would cost as
much as the build. Then a changed file of the same name and size is noticed by its time or checksum while a build is
unfinished (`stamps`, kept in its work folder only, so that copies of an input give the same set), and not afterwards;
--hash-input hashes everything on this machine.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from data_pipeline.files import sha256_file
from data_pipeline.progress import progress
from data_pipeline.runners import Call, Runner, run_surely
from data_pipeline.sources import Input
from data_pipeline.sources.location import local

WHOLE: Final = 1 << 30  # bytes of an input; ours: about two seconds of hashing
FILES_PER_CALL: Final = 500
WORTH_A_POOL: Final = 1 << 30  # bytes to hash: less is done before other processes have started


def describe(inputs: Sequence[Input], runner: Runner, *, everything: bool = False) -> list[dict[str, Any]]:
    """An entry of the manifest for each input."""
    whole = [is_whole(one, everything) for one in inputs]
    hashes = iter(_hash([one for one, wanted in zip(inputs, whole, strict=True) if wanted], runner))
    return [_entry(one, next(hashes) if wanted else None) for one, wanted in zip(inputs, whole, strict=True)]


def stamps(inputs: Sequence[Input], *, everything: bool = False) -> dict[str, str]:
    """A digest by name of every input that is not hashed whole; another one after a change."""
    return {
        printable(one.name): _digest([(file.name, file.size, file.stamp) for file in one.files])
        for one in inputs
        if not is_whole(one, everything)
    }


def is_whole(one: Input, everything: bool) -> bool:
    here = all(local(file.url) is not None for file in one.files)
    return here and (everything or sum(file.size for file in one.files) <= WHOLE)


def printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def hash_files(paths: list[str]) -> list[str]:
    """sha256 of each; of one that cannot be read, "unreadable": its record will be dropped for it."""
    return [_sha256(Path(path)) for path in paths]


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError:
        return "unreadable"


def _hash(inputs: Sequence[Input], runner: Runner) -> list[list[str]]:
    paths = [str(local(file.url)) for one in inputs for file in one.files]
    calls = [Call(hash_files, (paths[n : n + FILES_PER_CALL],)) for n in range(0, len(paths), FILES_PER_CALL)]
    found: list[list[str]] = [[] for _ in calls]
    size = sum(file.size for one in inputs for file in one.files)
    results = (
        run_surely(runner, calls) if size > WORTH_A_POOL else ((number, call()) for number, call in enumerate(calls))
    )
    with progress("hashing the input", len(paths), "files") as counter:
        for position, result in results:
            found[position] = result
            counter.advance(len(result))
    flat = iter(digest for part in found for digest in part)
    return [[next(flat) for _ in one.files] for one in inputs]


def _entry(one: Input, hashes: list[str] | None) -> dict[str, Any]:
    """A file by its own sha256, the images of a folder by that of the list of them."""
    entry: dict[str, Any] = {"path": printable(one.name), "bytes": sum(file.size for file in one.files)}
    if one.name.endswith("/"):
        entry["files"] = len(one.files)
    if one.weight != 1:
        entry["weight"] = one.weight
    if hashes is None:
        return entry | {"names_and_sizes_sha256": _digest([(file.name, file.size) for file in one.files])}
    if not one.name.endswith("/"):
        return entry | {"sha256": hashes[0]}
    return entry | {"sha256": _digest([(file.name, file.size, h) for file, h in zip(one.files, hashes, strict=True)])}


def _digest(rows: list[tuple[Any, ...]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in sorted(rows, key=lambda row: row[0]))
    return hashlib.sha256(text.encode()).hexdigest()
