"""What happened to a run: RUN/events.jsonl, one line for each start, save, rewind and stop. Only ever appended to.

    {"event": "start", "step": 0, "time": 1763800000.0, "ranks": 2}
    {"event": "rewind", "step": 480, "to": 400, "keys": [...], "why": "loss is nan", "lr_factor": 0.5, "lr_until": 500}

A later start of the run must know of its rewinds: which steps are left out, and where the learning rate is lower. What
the events say about a run as a whole (goodput, restarts, lost steps) are functions of them and of its metrics.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maws import dist
from maws.files import append, end_line, json_lines

Event = dict[str, Any]


class History:
    """The events of one run, the same on all ranks; rank 0 writes."""

    def __init__(self, run: Path) -> None:
        self.path = run / "events.jsonl"
        found: tuple[list[Event], int] = ([], 0)
        if dist.rank() == 0:
            end_line(self.path)
            found = read(self.path), max((line["step"] for line in read_metrics(run)), default=0)
        self.events, self.reached = dist.broadcast(found)  # reached: by the last start, as far as it was logged

    def start(self, step: int, **facts: Any) -> None:
        """This process begins with `step`; all ranks call it, before the metrics are cut back to that step."""
        self.add("start", step, reached=max(step, self.reached), **facts)

    def add(self, event: str, step: int, **facts: Any) -> None:
        """All ranks call this with the same values."""
        entry = {"event": event, "step": step, "time": round(time.time(), 3), **facts}
        self.events.append(entry)
        if dist.rank() == 0:
            append(self.path, entry)

    def note(self, event: str, step: int, **facts: Any) -> None:
        """What happened to this rank alone: it writes by itself, and the others do not know."""
        append(self.path, {"event": event, "step": step, "time": round(time.time(), 3), "rank": dist.rank(), **facts})

    def rewinds(self) -> list[Event]:
        return [e for e in self.events if e["event"] == "rewind"]

    def skips(self, step: int) -> bool:
        """Is this step left out, because its batch made the loss not finite?"""
        return any(e["step"] == step for e in self.rewinds())

    def updates(self, step: int) -> int:
        """How often the optimizer has run when `step` steps are done: AdamW counts for itself, and a step that is left
        out is none of its."""
        return step - len({e["step"] for e in self.rewinds() if e["step"] < step})

    def lr_factor(self, step: int) -> float:
        """What the learning rate of this step is multiplied with, after rewinds."""
        factor = 1.0
        for e in self.rewinds():
            if e["to"] <= step < e["lr_until"]:
                factor *= e["lr_factor"]
        return factor


def read(path: Path) -> list[Event]:
    """The events of a file; half a line of a killed writer, and whatever else is no event, is left out."""
    return [e for e in json_lines(path) if isinstance(e.get("event"), str) and _numbers(e, "step", "time")]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl that are whole."""
    return [line for line in json_lines(run / "metrics.jsonl") if _numbers(line, "step")]


def goodput(events: Sequence[Event], metrics: Iterable[Mapping[str, Any]], now: float | None = None) -> float:
    """Share (0 to 1) of the wall time since the run's first start that went into optimizer steps that count.

    The numerator is the time of all steps that are still in the run's metrics: for each line that has it, its
    `train/step_ms` times the steps since the line before, without those that are left out. A step's time includes
    waiting for its batch. Not in it are steps that were taken again after a kill or rewind (their lines are dropped),
    start-up after the first, saves as far as training waits for them, probes, and the time in which nothing ran.
    The denominator ends at `now` (seconds since 1970), or with the newest event or line. 0 before the first line.
    """
    lines = [line for line in metrics if _numbers(line, "step", "train/step_ms")]
    starts = [e["time"] for e in events if e["event"] == "start"]
    if not starts or not lines:
        return 0.0
    useful = useful_seconds(events, lines)
    end = now or max([e["time"] for e in events] + [line.get("time", 0.0) for line in lines])
    return min(1.0, useful / max(end - min(starts), useful, 1e-9))


def useful_seconds(events: Sequence[Event], metrics: Iterable[Mapping[str, Any]]) -> float:
    """Time of the steps that count: the numerator of `goodput`."""
    left_out = {e["step"] for e in events if e["event"] == "rewind"}
    useful, before = 0.0, 0
    for line in metrics:
        if not _numbers(line, "step", "train/step_ms"):
            continue
        steps = line["step"] - before - sum(before <= s < line["step"] for s in left_out)
        useful += max(0, steps) * line["train/step_ms"] / 1000
        before = max(before, line["step"])
    return useful


def restarts(events: Sequence[Event]) -> int:
    """How often the run was started again."""
    return max(0, sum(e["event"] == "start" for e in events) - 1)


def lost_steps(events: Sequence[Event]) -> int:
    """Steps that were taken and do not count: those after the checkpoint or snapshot that the run went back to, when it
    was started again (as far as they had been logged) or rewound (with the step that was the reason)."""
    rewound = sum(e["step"] + 1 - e["to"] for e in events if e["event"] == "rewind" and "to" in e)
    return rewound + sum(max(0, e.get("reached", e["step"]) - e["step"]) for e in events if e["event"] == "start")


def _numbers(values: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(values.get(n), int | float) and not isinstance(values.get(n), bool) for n in names)
