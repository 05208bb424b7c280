"""Samples that could not be read: RUN/quarantine.jsonl lists each once, and too many of them end the run.

{"step": 12, "key": "k017", "shard": "00003", "reason": "truncated"}
"""

import logging
import math
import re
from collections import Counter
from itertools import chain
from pathlib import Path

from data_pipeline.errors import DataError
from maws import dist
from maws.data.batch import BadSample
from maws.files import append, end_line, json_lines

log = logging.getLogger(__name__)

SENTENCE = "unreadable"  # what a reason that is no single word is counted under: a file that could not be read


class Quarantine:
    """The bad samples of a run, and how many it may have: `max_bad` of `samples`."""

    def __init__(self, path: Path, max_bad: float, samples: int) -> None:
        self.path, self.samples = path, samples
        self.allowed = max(1, math.floor(max_bad * samples))
        if dist.rank() == 0:
            end_line(path)
        self.reasons: dict[str, str] = {e["key"]: e["reason"] for e in json_lines(path) if {"key", "reason"} <= set(e)}

    def add(self, step: int, bad: list[BadSample]) -> None:
        """All ranks call this in the step in which any of them met one. Raises DataError above the budget."""
        fresh = list[BadSample]()
        for entry in chain.from_iterable(dist.gather_objects(bad)):
            if entry["key"] not in self.reasons:
                self.reasons[entry["key"]] = entry["reason"]
                log.warning("sample %s of shard %s left out: %s", entry["key"], entry["shard"], entry["reason"])
                fresh.append(entry)
        if dist.rank() == 0 and fresh:
            append(self.path, *({"step": step, **entry} for entry in fresh))
        if len(self.reasons) > self.allowed:
            counts = ", ".join(f"{n} {reason}" for reason, n in self.counts().most_common())
            raise DataError(
                f"{len(self.reasons)} of {self.samples} samples could not be read ({counts}), more than data.max_bad "
                f"allows ({self.allowed}); they are listed in {self.path}. Check the shard set, or raise data.max_bad"
            )

    def counts(self) -> Counter[str]:
        """Bad samples by reason."""
        return Counter(r if re.fullmatch(r"\w+", r) else SENTENCE for r in self.reasons.values())

    def report(self) -> dict[str, int]:
        """For metrics.jsonl: how many there are, in all and by reason; nothing while there are none."""
        if not self.reasons:
            return {}
        return {"data/bad_samples": len(self.reasons)} | {
            f"data/bad_samples/{reason}": n for reason, n in sorted(self.counts().items())
        }
