"""Who carries out the tasks. A runner calls plain functions with plain arguments; an engine more is one file more."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Call:
    """A module-level function and its arguments, both fit for another process."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.function(*self.arguments)


class Runner(Protocol):
    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Position and result of each call, as they finish. The first exception ends it."""
        ...
