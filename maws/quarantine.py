"""Samples that could not be read: RUN/quarantine.jsonl lists each once, and too many of them end the run."""

import json
import logging
import math
from pathlib import Path

from data_pipeline.errors import DataError
from maws import dist
from maws.data.batch import BadSample

log = logging.getLogger(__name__)


class Quarantine:
    """The bad samples of a run, and how many it may have: `max_bad` of `samples`."""

    def __init__(self, path: Path, max_bad: float, samples: int) -> None:
        self.path, self.samples = path, samples
        self.allowed = max(1, math.floor(max_bad * samples))
        self.keys: set[str] = set()
        if path.exists():
            self.keys = {json.loads(line)["key"] for line in path.read_text().splitlines() if line.endswith("}")}

    def add(self, step: int, bad: list[BadSample]) -> None:
        """All ranks call this in the step in which any of them met one. Raises DataError above the budget."""
        for entries in dist.gather_objects(bad):
            for entry in entries:
                if entry["key"] in self.keys:
                    continue
                self.keys.add(entry["key"])
                log.warning("sample %s of shard %s left out: %s", entry["key"], entry["shard"], entry["reason"])
                if dist.rank() == 0:
                    with self.path.open("a") as f:
                        f.write(json.dumps({"step": step, **entry}) + "\n")
        if len(self.keys) > self.allowed:
            raise DataError(
                f"{len(self.keys)} of {self.samples} samples could not be read, more than data.max_bad allows "
                f"({self.allowed}); they are listed in {self.path}. Check the shard set, or raise data.max_bad"
            )

    def report(self) -> dict[str, int]:
        return {"data/bad_samples": len(self.keys)} if self.keys else {}
