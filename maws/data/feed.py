"""Batches of steps, in order, that can be set to any step: a batch is a function of its step.

steps      12  13  14  15  16 …          worker w of n makes the batches of the steps s with s mod n = w, `prefetch`
worker      0   1   0   1   0            of them ahead; with pinned memory the next one is copied while a step runs
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from maws.data.batch import Batch
from maws.data.loader import StepDataset
from maws.data.workers import Worker, WorkerDied

log = logging.getLogger(__name__)

PREFETCH = 4  # batches a worker

Restarted = Callable[[int, dict[str, Any]], None]  # the step that was due, and facts for RUN/events.jsonl


class Feed:
    """The batches of steps [start, stop) of this rank, made by `workers` processes ahead of time; 0: in this process.

    A worker that dies is replaced, at most `restarts` times in the life of the feed; each time `restarted` is told.
    Raises, from `next`, DataError when they die too often, and what making a batch raises.
    """

    def __init__(
        self, dataset: StepDataset, start: int, stop: int, workers: int, restarts: int = 0,
        prefetch: int = PREFETCH, restarted: Restarted | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.stop, self.restarts, self.restarted = dataset, stop, restarts, restarted
        self.ahead = max(1, prefetch) * workers
        self.deaths = 0
        self._news: list[tuple[int, dict[str, Any]]] = []  # for `restarted`, which is called where `next` is
        self.workers: list[Worker] = []
        self._count = min(workers, stop - start)
        self._thread = ThreadPoolExecutor(1, "pin") if torch.cuda.is_available() and workers else None
        self._pinned: Future[Batch] | None = None
        self.go_to(start)

    def next(self) -> tuple[Batch, float]:
        """The next step's batch, and the seconds it was waited for."""
        asked = time.perf_counter()
        batch = self._pinned.result() if self._pinned else self._make(self.step)
        while self._news:
            step, facts = self._news.pop(0)
            if self.restarted:
                self.restarted(step, facts)
        self.step += 1
        self._pin_next()
        return batch, time.perf_counter() - asked

    def go_to(self, step: int) -> None:
        """Continue with the batch of this step."""
        self.close()
        self.step = step
        if self._count and step < self.stop:
            self.dataset.reach(step)
        self.workers = [Worker(self.dataset.__getitem__) for _ in range(self._count)]
        for due in range(step, min(step + self.ahead, self.stop)):
            self._ask(due)
        self._pin_next()

    def close(self) -> None:
        """End the workers; `go_to` makes new ones."""
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.kill()
        if self._pinned:
            self._pinned.exception()  # it is not wanted any more, whatever came of it
            self._pinned = None
        for worker in workers:
            worker.close()

    def __del__(self) -> None:
        if getattr(self, "workers", None):
            self.close()

    def _ask(self, step: int) -> None:
        if self.workers and step < self.stop:
            self.workers[step % len(self.workers)].ask(step)

    def _make(self, step: int) -> Batch:
        batch = self._take(step) if self._count else self.dataset[step]
        return pin(batch) if torch.cuda.is_available() else batch

    def _pin_next(self) -> None:
        """While a step is computed, a thread takes the next batch into memory that the device reads by itself."""
        self._pinned = self._thread.submit(self._make, self.step) if self._thread and self.step < self.stop else None

    def _take(self, step: int) -> Batch:
        while workers := self.workers:
            try:
                batch = workers[step % len(workers)].take(step)
            except WorkerDied as death:
                if workers is self.workers:  # and not closed meanwhile
                    self._replace(step, str(death))
                continue
            self._ask(step + self.ahead)
            return batch
        raise DataError(f"the feed was closed before the batch of step {step}")

    def _replace(self, step: int, how: str) -> None:
        """A new worker in place of the one whose step is due, asked for all that the other one still had to make."""
        self.deaths += 1
        place = step % len(self.workers)
        if self.deaths > self.restarts:
            raise DataError(
                f"loader worker {place} {how} at step {step}; {self.restarts} were replaced before it, which is all "
                f"that faults.worker_restarts allows. Out of memory: lower data.workers or data.prefetch. Always at "
                f"one step: look at its samples with `python -m maws ledger RUN --step {step}`"
            )
        log.warning(
            "loader worker %d %s; a new one goes on at step %d (replaced %d of at most %d times)",
            place, how, step, self.deaths, self.restarts,
        )  # fmt: skip
        self.workers[place] = Worker(self.dataset.__getitem__)
        for due in range(step, min(step + self.ahead, self.stop), len(self.workers)):
            self._ask(due)
        self._news.append((step, {"worker": place, "why": how, "restarts": self.deaths}))


def pin(batch: Batch) -> Batch:
    """A copy in pinned memory."""
    values = cast(dict[str, Any], batch)
    return cast(Batch, {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()})
