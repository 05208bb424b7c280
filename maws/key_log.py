"""Which samples each step really had, written by every rank while it trains: RUN/keys/rank_00000.jsonl (`log.keys`).

{"step": 12, "keys": ["k017", "k003"]}        no keys: the step was left out
"""

import json
from pathlib import Path

from maws import dist

TAIL = 1 << 20  # bytes; steps are dropped at the end of files that grow for a month


class KeyLog:
    """One line a step, each step once: lines from the step on that a run goes on with are dropped."""

    def __init__(self, run: Path, start: int) -> None:
        self.folder = run / "keys"
        if dist.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        self.path = self.folder / f"rank_{dist.rank():05}.jsonl"
        self._open(start)

    def write(self, step: int, keys: list[str]) -> None:
        self._file.write(json.dumps({"step": step, "keys": keys}) + "\n")

    def go_to(self, step: int) -> None:
        """Continue with the line of this step; all ranks call it."""
        self._file.close()
        self._open(step)

    def close(self) -> None:
        self._file.close()

    def _open(self, step: int) -> None:
        own = [self.path] if self.path.exists() else []
        if dist.rank() == 0:  # and those of ranks that an earlier start had and this one has not
            own += sorted(self.folder.glob("rank_*.jsonl"))[dist.world_size() :]
        for path in own:
            drop_from(path, step)
        self._file = self.path.open("a", buffering=1)


def drop_from(path: Path, step: int) -> None:
    """Cut a key log before its first line of `step` or later, or half a line. Steps grow from line to line."""
    with path.open("rb+") as file:
        size, tail = path.stat().st_size, TAIL
        while True:
            start = max(0, size - tail)
            file.seek(start)
            if start:
                start += len(file.readline())  # from somewhere inside a line
            end = _end_before(file.read(), step)
            if end or start == 0 or tail >= size:
                file.truncate(start + end)
                return
            tail *= 8


def _end_before(lines: bytes, step: int) -> int:
    """Where the last whole line of an earlier step ends; 0 where there is none."""
    end = place = 0
    for line in lines.splitlines(keepends=True):
        place += len(line)
        if (found := step_of(line)) is None or found >= step:
            break
        end = place
    return end


def step_of(line: bytes) -> int | None:
    """None for half a line."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
