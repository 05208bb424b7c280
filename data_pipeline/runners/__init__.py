"""Who carries out the tasks. A runner calls plain functions with plain arguments; an engine more is one file more."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, Self

from data_pipeline.errors import DataError

ATTEMPTS: Final = 3


@dataclass(frozen=True)
class Call:
    """A module-level function and its arguments, both fit for another process."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    guarded: bool = False  # it opens what strangers made: never in the process that directs the build, and with limits

    def __call__(self) -> Any:
        return self.function(*self.arguments)


@dataclass(frozen=True)
class Lost:
    """Instead of a result: the call took its worker with it. The worker is replaced; trying again is the caller's."""

    reason: str  # killed_worker, timed_out, out_of_memory
    detail: str  # the signal or exit code
    position: int  # of the record it was working on; watch.NONE if it was between records


class Runner(Protocol):
    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Position and result (or Lost) of each call, as they finish. The first exception ends it."""
        ...

    def blind(self, path: Path) -> list[str]:
        """Machines that take part but do not see this file."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *ending: object) -> None: ...


def run_surely(runner: Runner, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
    """Results only: what loses its worker is tried again, and the third time is an error."""
    waiting = list(range(len(calls)))
    for _ in range(ATTEMPTS):
        again = []
        for position, result in runner.run([calls[number] for number in waiting]):
            if isinstance(result, Lost):
                again.append(waiting[position])
            else:
                yield waiting[position], result
        waiting = sorted(again)
    if waiting:
        raise DataError(
            f"a worker process was killed {ATTEMPTS} times at the same work, most likely for lack of memory; run the "
            "same command again with fewer --workers"
        )
