"""What happened to a run: RUN/events.jsonl, one line for each start, save, rewind and stop. Only ever appended to.

    {"event": "start", "step": 0, "time": 1763800000.0, "ranks": 2}
    {"event": "rewind", "step": 480, "to": 400, "keys": [...], "why": "loss is nan", "lr_factor": 0.5, "lr_until": 500}

A later start of the run must know of its rewinds: which steps are left out, and where the learning rate is lower.
"""

import json
import time
from pathlib import Path
from typing import Any

from maws import dist


class History:
    """The events of one run, the same on all ranks; rank 0 writes."""

    def __init__(self, run: Path) -> None:
        self.path = run / "events.jsonl"
        self.events: list[dict[str, Any]] = dist.broadcast(read(self.path) if dist.rank() == 0 else None)

    def add(self, event: str, step: int, **facts: Any) -> None:
        """All ranks call this with the same values."""
        entry = {"event": event, "step": step, "time": round(time.time(), 3), **facts}
        self.events.append(entry)
        if dist.rank() == 0:
            with self.path.open("a") as f:
                f.write(json.dumps(entry) + "\n")

    def rewinds(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "rewind"]

    def skips(self, step: int) -> bool:
        """Is this step left out, because its batch made the loss not finite?"""
        return any(e["step"] == step for e in self.rewinds())

    def lr_factor(self, step: int) -> float:
        """What the learning rate of this step is multiplied with, after rewinds."""
        factor = 1.0
        for e in self.rewinds():
            if e["to"] <= step < e["lr_until"]:
                factor *= e["lr_factor"]
        return factor


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a file; half a line of a killed writer is left out."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out
