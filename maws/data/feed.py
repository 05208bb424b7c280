"""Batches of steps, in order, that can be set to any step: a batch is a function of its step."""

import time
from collections.abc import Iterator

from maws.data.batch import Batch
from maws.data.loader import StepDataset, batches


class Feed:
    """The batches of steps [start, stop) of this rank, read by `workers` processes ahead of time."""

    def __init__(self, dataset: StepDataset, start: int, stop: int, workers: int, restarts: int = 0) -> None:
        self.dataset, self.stop, self.workers, self.restarts = dataset, stop, workers, restarts
        self._batches: Iterator[Batch] = iter(())
        self.go_to(start)

    def next(self) -> tuple[Batch, float]:
        """The next step's batch, and the seconds it was waited for."""
        asked = time.perf_counter()
        batch = next(self._batches)
        self.step += 1
        return batch, time.perf_counter() - asked

    def go_to(self, step: int) -> None:
        """Continue with the batch of this step."""
        self.step = step
        self._batches = batches(self.dataset, step, self.stop, self.workers)

    def close(self) -> None:
        self._batches = iter(())
