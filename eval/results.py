"""results.jsonl: one JSON object per score, only ever appended to; tables and the report are made from it.

{"run": "runs/demo/mae_wsp", "evaluator": "lowshot", "metric": "5-shot/vpt/top1", "value": 0.41, "n": 362, "seed": 3,
 "config": {…}, "hashes": {"weights": …, "train": …, "data": …}, "lineage": ["mae", "wsp"], "time": "2026-…",
 "contamination": {"status": "checked", "pictures": 362, "exact": 0, "near": 0, …}}
"""

import fcntl
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line."""

    run: str
    evaluator: str
    metric: str
    value: float  # 0..1; edges of WordNet for heights and distances (report_tasks.unit)
    n: int  # evaluation images behind the value
    seed: int
    config: dict[str, Any]  # everything that was set or chosen, so that the line can be made again
    hashes: dict[str, str]
    lineage: list[str]
    time: str  # ISO 8601, UTC
    contamination: dict[str, Any] = field(default_factory=dict)  # see contamination.py; older lines have none


def version(library: str) -> str | None:
    """Of an installed library, for the record."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def append(path: Path, results: Iterable[Result]) -> None:
    """Add lines in one write under a lock, so that evaluations running side by side never mix theirs."""
    text = "".join(json.dumps(asdict(result), ensure_ascii=False, allow_nan=False) + "\n" for result in results)
    if not text:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(
                descriptor, fcntl.LOCK_EX
            )  # released by close; so that nobody takes a line in the making for torn
            data = (_line_break(descriptor) + text).encode()
            if os.write(descriptor, data) != len(data):
                raise OSError("the disk took only part of the line")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"cannot append to {path}: {error}; give another file with --results") from None


def _line_break(descriptor: int) -> str:
    """What to write first when a killed writer left half a line."""
    size = os.fstat(descriptor).st_size
    return "\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else ""


def read(path: Path) -> Iterator[Result]:
    """The whole lines of a file; half a line that a killed writer left is skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield Result(**json.loads(line))
            except (ValueError, TypeError):
                continue
