"""Which record this process is working on, told to whoever watches it, and how long it may take.

A worker that dies cannot say what killed it. So it writes the position of each record into eight bytes that it shares
with its parent, and sets the system's alarm clock, which ends the process even inside a decoder that never returns.
Outside a worker `record` does nothing.
"""

import contextlib
import mmap
import resource
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SIZE: Final = 8  # bytes shared with the parent
NONE: Final = -1  # between records: opening, reading ahead, writing the tables
BETWEEN: Final = 10  # times the limit of a record, for a stretch without any


@dataclass(frozen=True)
class Limits:
    """What a record of strangers may cost; 0 is no limit."""

    seconds: float = 60.0  # ours: the largest picture allowed takes about two
    memory: int = 4 << 30  # bytes on top of what the worker holds; ours: ten times the largest picture allowed


class _Watched:
    shared: mmap.mmap | None = None
    seconds: float = 0.0


def share(descriptor: int) -> None:
    """Write positions into this file from now on."""
    _Watched.shared = mmap.mmap(descriptor, SIZE)
    _write(NONE)


def record(position: int) -> None:
    """From now on this process works on the record at `position` of its task."""
    if _Watched.shared is not None:
        _write(position)
        if _Watched.seconds:
            signal.setitimer(signal.ITIMER_REAL, _Watched.seconds)


def between_records() -> None:
    """What comes now is no single record's: reading ahead, writing tables."""
    if _Watched.shared is not None:
        _write(NONE)
        if _Watched.seconds:
            signal.setitimer(signal.ITIMER_REAL, BETWEEN * _Watched.seconds)


def where(shared: mmap.mmap | None = None) -> int:
    """The position last written, by this process or by the worker that shares these bytes."""
    shared = shared or _Watched.shared
    return struct.unpack_from("q", shared)[0] if shared is not None else NONE


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """The block ends this process when a record takes too long, and gets a MemoryError when it asks for too much."""
    old = resource.getrlimit(resource.RLIMIT_DATA)
    if limits.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (_capped(_data() + limits.memory, old[1]), old[1]))
    _Watched.seconds = limits.seconds
    try:
        between_records()
        yield
    finally:
        _Watched.seconds = 0.0
        _write(NONE)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, old)


def _write(position: int) -> None:
    if _Watched.shared is not None:
        struct.pack_into("q", _Watched.shared, 0, position)


def _data() -> int:
    """Bytes this process has reserved for data: Arrow reserves a gigabyte ahead that it never touches."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    return 0


def _capped(wanted: int, hard: int) -> int:
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
