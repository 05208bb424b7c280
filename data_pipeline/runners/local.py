"""Tasks on this machine: in worker processes, or in this one."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from data_pipeline.runners import Call, Lost
from data_pipeline.runners.worker import Worker
from data_pipeline.watch import Limits


class LocalRunner:
    """Workers start when they are first needed: for two calls at once, or for one that is guarded.

    `workers=0` does everything in this process, where a debugger sees it: without limits, and what kills it kills all.
    """

    def __init__(self, workers: int, limits: Limits | None = None, *, outside: bool = False) -> None:
        self.workers = workers
        self.limits = limits or Limits()
        self.outside = outside  # nothing in this process
        self._idle: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        while self._idle:
            self._idle.pop().close()

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        if not self._needs_workers(calls):
            yield from ((number, call()) for number, call in enumerate(calls))
            return
        waiting = deque(enumerate(calls))
        holding: dict[Connection, tuple[Worker, int]] = {}
        try:
            while waiting or holding:
                while waiting and len(holding) < self.workers:
                    worker = self._idle.pop() if self._idle else Worker(self.limits)
                    number, call = waiting.popleft()
                    holding[worker.connection] = worker, number
                    worker.send(call)
                for heard in wait(list(holding)):
                    worker, number = holding[heard]  # pyright: ignore[reportArgumentType]
                    for answer in worker.answers():
                        del holding[worker.connection]
                        if isinstance(answer, Lost) and worker.process.returncode is not None:
                            worker.close()
                        else:
                            self._idle.append(worker)
                        yield number, answer
        finally:  # an exception, or nobody wants the rest: do not wait for what is under way
            for worker, _ in holding.values():
                worker.close(kill=True)

    def _needs_workers(self, calls: Sequence[Call]) -> bool:
        if self.workers == 0:
            return False
        return self.outside or min(self.workers, len(calls)) > 1 or any(call.guarded for call in calls)

    def blind(self, path: Path) -> list[str]:
        return []


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
