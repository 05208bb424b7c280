"""What a training tells: means since the last logged line, speed, waiting, and how long it will take."""

import logging
import time
from dataclasses import dataclass, field

from maws.log import duration

log = logging.getLogger(__name__)


@dataclass
class Meter:
    """Sums up steps between two logged lines."""

    batch_size: int
    total: int
    start: int  # the step this process began with
    flops: float = 0.0  # of one image in training, forward and backward
    peak_flops: float = 0.0  # of all devices together; 0: not known
    since: float = field(default_factory=time.perf_counter)
    begun: float = field(default_factory=time.perf_counter)
    spoke: float = 0.0
    waited: float = 0.0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, losses: dict[str, float], waited: float) -> None:
        """One step was taken."""
        self.steps += 1
        self.waited += waited
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def report(self) -> dict[str, float]:
        """Means since the last report, which begins the next; empty when no step was taken."""
        now = time.perf_counter()
        values: dict[str, float] = {}
        if self.steps:
            values = {f"train/{k}": v / self.steps for k, v in self.sums.items()} | {
                "train/images_per_second": round(self.steps * self.batch_size / (now - self.since), 1),
                "data/wait_ms": round(1000 * self.waited / self.steps, 1),
            }
        self.since, self.waited, self.steps, self.sums = now, 0.0, 0, {}
        return values

    def say(self, done: int, values: dict[str, float]) -> None:
        """A line for people, at most every two seconds."""
        now = time.perf_counter()
        if now - self.spoke < 2 and done < self.total:
            return
        self.spoke = now
        left = (now - self.begun) / (done - self.start) * (self.total - done)
        log.info(
            "step %d/%d (%d%%)  loss %.4f  lr %.2e  %.0f images/s  data wait %.0f ms  %s left",
            done, self.total, 100 * done // self.total, values["train/loss"], values["train/lr"],
            values["train/images_per_second"], values["data/wait_ms"], duration(left),
        )  # fmt: skip
