"""Rank 0's console and a run's metrics. (Never a module named logging.py: scripts in this folder would import it.)

RUN/metrics.jsonl   {"step": 480, "time": 1763800000.0, "train/loss": 0.4312, "train/lr": 0.00015, …}
RUN/tensorboard/    the same numbers, with log.tensorboard=yes
"""

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from maws.config import TrainConfig
from maws.telemetry import Writer, further_writers

log = logging.getLogger(__name__)


def start(rank: int) -> None:
    """Rank 0 speaks, the others only about problems."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("DeepSpeed", "httpx", "urllib3", "filelock", "matplotlib", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class JsonLines:
    """One JSON object per logged step; a value that is not finite becomes null, for readers that know no NaN."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path, self.troubled = path, False
        self._open(start_step)

    def _open(self, step: int) -> None:
        """Keep the lines up to `step`, in a new file that takes the old one's name: a reader sees either."""
        tmp = self.path.with_suffix(".tmp")
        with tmp.open("wb") as new:
            if self.path.exists():
                with self.path.open("rb") as old:
                    new.writelines(line for line in old if _is_kept(line, step))
        tmp.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def write(self, step: int, values: dict[str, Any]) -> None:
        entry = {"step": step, "time": round(time.time(), 3), **values}
        line = (json.dumps({k: _finite(v) for k, v in entry.items()}) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
        except OSError as e:
            self._file.truncate(size)  # half a line would spoil the next one
            if not self.troubled:
                log.warning("step %d could not be written to %s: %s; training goes on", step, self.path, e)
        self.troubled = os.fstat(self._file.fileno()).st_size == size

    def go_to(self, step: int) -> None:
        self._file.close()
        self._open(step)

    def close(self) -> None:
        self._file.close()


class Metrics:
    """The metrics of a run, from rank 0: metrics.jsonl always, and what else `log.` asks for.

    Lines after the step a run resumes from, or is set back to, are dropped. None of the writers stops a training: one
    that fails is left out from then on, with a warning.
    """

    def __init__(self, run: Path, cfg: TrainConfig, start_step: int) -> None:
        self.writers: list[Writer] = [JsonLines(run / "metrics.jsonl", start_step)]
        self.writers += further_writers(run, cfg.log, start_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._all("write", step, values)

    def go_to(self, step: int) -> None:
        """The steps after this one are taken again: what was written of them does not count."""
        self._all("go_to", step)

    def close(self) -> None:
        self._all("close")

    def _all(self, method: str, *arguments: Any) -> None:
        for writer in list(self.writers):
            try:
                getattr(writer, method)(*arguments)
            except Exception as e:  # whatever a foreign library raises: training is worth more than its curves
                log.warning("%s failed and is left out from now on: %s", type(writer).__name__, e)
                self.writers.remove(writer)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing it
        return False


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """`1:23`, `2:03:04`, or `3 d 02:03` from a day on."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{m:02}"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
