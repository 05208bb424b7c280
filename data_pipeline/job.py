"""A job is steps one after the other; a step is a list of tasks; a task is done once, whoever kills it.

A task writes its files under temporary names, renames them, and then leaves a marker with its counts. Run again, tasks
with a marker and all their files are skipped, the others start afresh. Tasks only read files of earlier steps, so
between steps there is a barrier and nothing else is shared.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_pipeline.files import write_bytes
from data_pipeline.progress import progress
from data_pipeline.runners import Call, Runner

Counts = dict[str, Any]  # numbers by name, or by name and reason

TEMPORARY: Final = ".*.tmp"  # what files.atomic_write leaves when it is killed


@dataclass(frozen=True)
class Task:
    function: Callable[..., Counts]  # of a module, taking plain data; returns its counts
    arguments: tuple[Any, ...]
    outputs: tuple[Path, ...] = ()
    size: int = 1  # in the step's unit, for the progress line


@dataclass
class Job:
    """Runs steps and remembers in `folder` what is done."""

    folder: Path
    runner: Runner
    skipped: int = field(default=0, init=False)  # tasks that an earlier run had done

    def run(self, step: str, tasks: Sequence[Task], unit: str = "tasks") -> list[Counts]:
        """Counts of each task, in their order."""
        counts: list[Counts | None] = [self._marker(step, number, task) for number, task in enumerate(tasks)]
        waiting = [number for number, found in enumerate(counts) if found is None]
        self.skipped += len(tasks) - len(waiting)
        with progress(step, sum(tasks[number].size for number in waiting), unit) as counter:
            calls = [Call(carry_out, (tasks[n], self._marker_path(step, n))) for n in waiting]
            for position, result in self.runner.run(calls):
                counts[waiting[position]] = result
                counter.advance(tasks[waiting[position]].size)
        return [found for found in counts if found is not None]

    def forget(self, step: str, number: int) -> None:
        """Do this task again next time."""
        self._marker_path(step, number).unlink(missing_ok=True)

    def _marker_path(self, step: str, number: int) -> Path:
        return self.folder / "done" / step / f"{number:06d}.json"

    def _marker(self, step: str, number: int, task: Task) -> Counts | None:
        with contextlib.suppress(OSError, ValueError):
            if all(path.is_file() for path in task.outputs):
                return json.loads(self._marker_path(step, number).read_bytes())
        return None


def carry_out(task: Task, marker: Path) -> Counts:
    text = json.dumps(task.function(*task.arguments), sort_keys=True)
    write_bytes(marker, text.encode())
    return json.loads(text)  # the very form that a later run finds in the marker: the order of names included


def merge_counts(parts: Sequence[Mapping[str, Any]]) -> Counts:
    """Sum of numbers by name, one level of reasons included."""
    total: Counts = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, Mapping):
                total[name] = merge_counts([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return dict(sorted(total.items()))


def remove_temporary(*folders: Path) -> None:
    for folder in folders:
        for path in folder.rglob(TEMPORARY):
            path.unlink(missing_ok=True)
