"""A run folder read while it is written: only what is new since the last look, and little of it kept. No torch.

    run = Followed(Path("runs/mae")); run.look(); run.last("train/loss"), run.state()

A month of metrics has hundreds of thousands of lines, so a curve keeps at most POINTS of them, further apart the longer
the run is.
"""

import json
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from maws.config import ConfigError, Duration

POINTS = 2000  # of a curve that are kept, at least half of it
SILENT = 60.0  # seconds without a line before a run counts as silent, or
LATE = 10  # … as many times its usual distance between lines

Mood = Literal["waiting", "running", "silent", "stopped", "done"]


class Tail:
    """The whole lines of a file that were added since the last look, as JSON objects.

    A file that was replaced or cut (a run that was set back) is read again from its beginning; `was_reset` tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.was_reset = False
        self._offset, self._last = 0, b""

    def look(self) -> Iterator[dict[str, Any]]:
        self.was_reset = False
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:  # not the file that was read before
                self._offset, self._last, self.was_reset = 0, b"", True
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    break
                self._offset += len(line)
                self._last = line
                if entry := _object(line):
                    yield entry


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


@dataclass
class Curve:
    """Values of one metric in the order of steps; when there are too many, every two become their mean."""

    values: list[float] = field(default_factory=list)
    each: int = 1  # logged values that make one of `values`
    _open: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self._open.append(value)
        if len(self._open) < self.each:
            return
        self.values.append(sum(self._open) / len(self._open))
        self._open = []
        if len(self.values) >= POINTS:
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self.each *= 2

    def points(self) -> list[float]:
        return [*self.values, *([sum(self._open) / len(self._open)] if self._open else [])]


class State(NamedTuple):
    """How a run is doing, in a word and in words."""

    mood: Mood
    words: str


class Followed:
    """One run folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics, self._events = Tail(folder / "metrics.jsonl"), Tail(folder / "events.jsonl")
        self._quarantine = Tail(folder / "quarantine.jsonl")
        self.config: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.bad_samples = 0
        self._clear()

    def _clear(self) -> None:
        self.step, self.time = 0, 0.0  # of the newest line
        self.newest: dict[str, float] = {}  # of each metric
        self.curves: dict[str, Curve] = {}
        self._times: deque[float] = deque(maxlen=20)

    def look(self) -> None:
        """Read what is new."""
        if not self.config:
            self.config = self._read_config()
        for line in self._metrics.look():
            if self._metrics.was_reset:
                self._clear()
                self._metrics.was_reset = False
            self._note(line)
        self.events += self._events.look()
        self.bad_samples += sum(1 for _ in self._quarantine.look())

    def _note(self, line: dict[str, Any]) -> None:
        self.step, self.time = line["step"], float(line.get("time", 0.0))
        self._times.append(self.time)
        for name, value in line.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self.newest[name] = value
                self.curves.setdefault(name, Curve()).add(value)

    def _read_config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}

    def last(self, name: str) -> float | None:
        return self.newest.get(name)

    def curve(self, name: str) -> list[float]:
        return self.curves[name].points() if name in self.curves else []

    def total(self) -> int:
        """Steps of the whole run; 0: not known yet."""
        for event in reversed(self.events):
            if event.get("event") == "start" and event.get("of"):
                return int(event["of"])
        try:  # older runs: the length that was asked for
            per_epoch = self.step / self.newest["train/epoch"] if self.newest.get("train/epoch") else 0.0
            length = Duration.parse(self.config["optim"]["length"])
            return round(length.value * per_epoch) if length.unit == "epochs" else length.steps(1)
        except (KeyError, TypeError, ConfigError):
            return 0

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("event") == kind]

    def state(self, now: float | None = None) -> State:
        """Alive, ended, or silent for longer than it usually is."""
        now = time.time() if now is None else now
        if not self.config:
            return State("waiting", "not there yet" if not self.folder.is_dir() else "no config.json yet")
        ends = [e for e in self.events if e.get("event") in ("start", "stop", "done")]
        last = ends[-1] if ends else {}
        at = f"at step {last.get('step', self.step):,}"
        if last.get("event") == "done" or (not self.events and (self.folder / "release" / "config.json").exists()):
            return State("done", "done")
        if last.get("event") == "stop":
            why = {75: "asked to stop and saved, to be requeued", 130: "Ctrl-C, saved"}.get(last.get("code", 0), "")
            return State("stopped", f"stopped {at}" + (f": {why}" if why else ""))
        newest = max(self.time, float(last.get("time", 0.0)))
        silence = max(0.0, now - newest)
        if newest and silence > max(SILENT, LATE * self._usual()):
            return State("silent", f"silent for {ago(silence)}: killed, or hanging")
        return State("running", f"running, last line {ago(silence)} ago" if newest else "starting")

    def _usual(self) -> float:
        """Median seconds between the newest lines."""
        times = list(self._times)
        gaps = [b - a for a, b in pairwise(times)]
        return statistics.median(gaps) if gaps else 0.0


def ago(seconds: float) -> str:
    """`4 s`, `12 min`, `3 h 20 min`, `5 d 3 h`."""
    s = int(seconds)
    if s < 100:
        return f"{s} s"
    if s < 6000:
        return f"{s // 60} min"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
