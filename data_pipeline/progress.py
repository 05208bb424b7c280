"""Progress on stderr: a bar on a terminal, otherwise a line every few seconds. Steps under two seconds stay silent."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

SILENT: Final = 2.0  # seconds
EVERY: Final = 5.0  # seconds between lines


class Counter:
    """How far a step is."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.start = self.last = time.monotonic()

    def advance(self, number: int) -> None:
        self.done += number
        now = time.monotonic()
        if now - self.start > SILENT and now - self.last > EVERY:
            self.last = now
            sys.stderr.write(self.line() + "\n")

    def finish(self) -> None:
        if time.monotonic() - self.start > SILENT:
            sys.stderr.write(self.line() + "\n")

    def line(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = f"{self.done / seconds:,.0f} {self.unit}/s"
        return f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, {rate}, {seconds:.0f} s"


class _Bar(Counter):
    def __init__(self, name: str, total: int, unit: str) -> None:
        super().__init__(name, total, unit)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(name, total=total, rate="")
        self.bar.start()

    def advance(self, number: int) -> None:
        self.done += number
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        self.bar.update(self.task, completed=self.done, rate=f"{rate:,.0f} {self.unit}/s")

    def finish(self) -> None:
        self.bar.stop()
        super().finish()


@contextlib.contextmanager
def progress(name: str, total: int, unit: str) -> Iterator[Counter]:
    counter = _Bar(name, total, unit) if sys.stderr.isatty() else Counter(name, total, unit)
    try:
        yield counter
    except BaseException:
        if isinstance(counter, _Bar):
            counter.bar.stop()
        raise
    counter.finish()
