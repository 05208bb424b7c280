"""Processes of this machine, from /proc."""

from collections.abc import Iterator
from pathlib import Path


def status(process: int) -> tuple[str, int]:
    """State letter and parent."""
    try:
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def is_alive(process: int) -> bool:
    return status(process)[0] not in "XZ"


def processes() -> Iterator[int]:
    yield from (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def children(parent: int) -> list[int]:
    return [process for process in processes() if status(process)[1] == parent]
