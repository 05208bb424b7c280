"""Progress on stderr, only for what takes longer than two seconds."""

import sys
import time
from types import TracebackType
from typing import Final, TextIO

QUIET: Final = 2.0  # seconds before the first line
EVERY: Final = {True: 0.5, False: 10.0}  # seconds between lines: rewritten on a terminal, one after another in a log


class Progress:
    """with Progress("features", 2172) as progress: progress.add(64)"""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.stream = stream or sys.stderr
        self.start = time.monotonic()
        self.terminal = self.stream.isatty()
        self.next = self.start + QUIET
        self.shown = False
        self.more = ""  # to say in every line

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.shown:
            self._show("\n")

    def add(self, count: int) -> None:
        self.done = min(self.total, self.done + count)
        if time.monotonic() >= self.next:
            self._show("" if self.terminal else "\n")
            self.next = time.monotonic() + EVERY[self.terminal]

    def _show(self, end: str) -> None:
        self.shown = True
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        left = f", {(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else f", {seconds:.0f} s"
        start = "\r\033[K" if self.terminal else ""
        self.stream.write(f"{start}{self.what}: {self.done:,} of {self.total:,}, {rate:.0f}/s{left}{self.more}{end}")
        self.stream.flush()
