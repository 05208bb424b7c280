"""Things that go wrong inside a worker process. A module of its own: workers import what they are sent by name."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline import watch
from data_pipeline.job import LeftOut
from data_pipeline.schema import SOURCE

Mishaps = Mapping[int, str]  # record -> what befalls it


def happen(mishap: str) -> None:
    if mishap == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mishap == "segfault":
        ctypes.string_at(0)
    elif mishap == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while True:
            time.sleep(60)
    elif mishap == "memory":
        bytearray(1 << 40)
    elif mishap == "exit":
        os._exit(3)
    elif mishap == "bug":
        raise ZeroDivisionError("a bug of ours")
    elif mishap.startswith("once:"):  # only if this file does not exist yet
        path = Path(mishap.removeprefix("once:"))
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def total(numbers: list[int], mishaps: Mishaps, out: Path, left_out: LeftOut) -> dict[str, Any]:
    """A task over records: their sum, into a file and as counts."""
    kept = visit(numbers, mishaps, 0, len(numbers), left_out)
    out.write_text(str(sum(kept)))
    watch.between_records()
    if -1 in mishaps:
        happen(mishaps[-1])
    return {
        "read": len(numbers),
        "sum": sum(kept),
        "dropped": dict.fromkeys(sorted(one["reason"] for one in left_out.values()), 1),
    }


def probe(numbers: list[int], mishaps: Mishaps, out: Path, start: int, stop: int) -> None:
    visit(numbers, mishaps, start, stop, {})


def describe(numbers: list[int], mishaps: Mishaps, out: Path, position: int) -> dict[str, Any]:
    return {"key": f"n{numbers[position]}"}


def visit(numbers: list[int], mishaps: Mishaps, start: int, stop: int, left_out: LeftOut) -> list[int]:
    kept = []
    for position in range(start, stop):
        if position in left_out:
            continue
        watch.record(position)
        if position in mishaps:
            happen(mishaps[position])
        kept.append(numbers[position])
    return kept


def quietly(numbers: list[int], mishaps: Mishaps, out: Path, left_out: LeftOut) -> dict[str, Any]:
    """The same, without ever saying which record it is at: as when a file of records is opened."""
    kept = [n for at, n in enumerate(numbers) if at not in left_out]
    for at in mishaps:
        if at not in left_out:
            happen(mishaps[at])
    out.write_text(str(sum(kept)))
    return {"read": len(numbers), "sum": sum(kept)}


def quiet_probe(numbers: list[int], mishaps: Mishaps, out: Path, start: int, stop: int) -> None:
    for at in mishaps:
        if start <= at < stop:
            happen(mishaps[at])


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def refuse(kind: type[BaseException], *arguments: str) -> None:
    raise kind(*arguments)


class Particular(Exception):
    """Cannot be made again from its arguments alone, as pickle would."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class DeadlyPiece:
    """A piece of a source in which one row kills whoever reads it."""

    images: tuple[bytes, ...]
    deadly: int
    mishap: str
    first: int = 0

    @property
    def rows(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> "DeadlyPiece":
        return replace(self, images=self.images[start:stop], deadly=self.deadly - start, first=self.first + start)

    def read(self) -> Iterator[pa.Table]:
        for position, image in enumerate(self.images):
            if position == self.deadly:
                happen(self.mishap)
            number = self.first + position
            row = {"row": number, "key": f"k{number:03d}", "image": image, "caption": "#dog #snow", "source": "web"}
            yield pa.Table.from_pylist([row], schema=SOURCE)
