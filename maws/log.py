"""Rank 0's console and metrics.jsonl. (Never a module named logging.py: scripts in this folder would import it.)"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from maws.config import TrainConfig


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


class Metrics:
    """One JSON object per logged step in RUN/metrics.jsonl; lines after the step a run resumes from are dropped."""

    def __init__(self, run: Path, cfg: TrainConfig, start_step: int) -> None:
        path = run / "metrics.jsonl"
        lines = [line for line in _lines(path) if line["step"] <= start_step]
        tmp = path.with_suffix(".tmp")
        tmp.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tmp.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed while writing it
            continue
    return out


def duration(seconds: float) -> str:
    """`1:23` or `2:03:04`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
