"""Tasks on this machine: in this process, or in a pool of spawned ones."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.runners import Call


class LocalRunner:
    """With one worker nothing is started; otherwise the pool starts with the first step that has two tasks."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "LocalRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:  # do not wait for what is under way: its results are thrown away
            for process in multiprocessing.active_children():
                process.terminate()

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        if self.workers == 1 or len(calls) < 2:
            yield from ((number, call()) for number, call in enumerate(calls))
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # fork and threads (Arrow's) do not go together
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker)
        try:
            futures = {self._pool.submit(call): number for number, call in enumerate(calls)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DataError(
                f"a worker process was killed, most likely for lack of memory; run the same command again with fewer "
                f"than --workers {self.workers} (finished work is kept)"
            ) from None


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered once, by the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
