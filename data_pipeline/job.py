"""A job is steps one after the other; a step is a list of tasks; a task is done once, whoever kills it.

A task writes its files under temporary names, renames them, and then leaves a marker with its counts. Run again, tasks
with a marker and all their files are skipped, the others start afresh. Tasks only read files of earlier steps, so
between steps there is a barrier and nothing else is shared.

A task whose worker dies is tried again. If one record is to blame, it is found, written down for good, and left out:
it costs itself and nothing else.
"""

import contextlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_pipeline import watch
from data_pipeline.errors import DataError
from data_pipeline.files import write_bytes
from data_pipeline.progress import progress
from data_pipeline.runners import Call, Lost, Runner

log = logging.getLogger(__name__)

Counts = dict[str, Any]  # numbers by name, or by name and reason
LeftOut = dict[int, dict[str, Any]]  # position of a record in its task -> reason, detail and what it is called

TEMPORARY: Final = ".*.tmp"  # what files.atomic_write leaves when it is killed
DEATHS: Final = 3  # after which a record alone, or a task as a whole, is taken to be the cause
MAX_DEATHS: Final = 3 * DEATHS  # of a task in which no single record is to blame
MAX_QUARANTINED: Final = 100  # records of one task; more is a broken file or machine


@dataclass(frozen=True)
class Records:
    """How to run a task on part of its records, to find the one that kills its worker.

    The task's own function takes what is left out (LeftOut) as its last argument.
    """

    count: int
    probe: Callable[..., object]  # (*arguments, start, stop): whatever the task does to these, but no files
    describe: Callable[..., dict[str, Any]]  # (*arguments, position): what to call it; opens no picture


@dataclass(frozen=True)
class Task:
    function: Callable[..., Counts]  # of a module, taking plain data; returns its counts
    arguments: tuple[Any, ...]
    outputs: tuple[Path, ...] = ()
    size: int = 1  # in the step's unit, for the progress line
    records: Records | None = None


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
        deaths: Counter[int] = Counter()
        with progress(step, sum(tasks[number].size for number in waiting), unit) as counter:
            while waiting:
                lost: dict[int, Lost] = {}
                for number, result in self._carry_out(step, tasks, waiting):
                    if isinstance(result, Lost):
                        lost[number] = result
                    else:
                        counts[number] = result
                        counter.advance(tasks[number].size)
                self._find_causes(step, tasks, lost, deaths)
                waiting = sorted(lost)
        return [found for found in counts if found is not None]

    def forget(self, step: str, number: int) -> None:
        """Do this task again next time."""
        self._marker_path(step, number).unlink(missing_ok=True)

    def quarantined(self, step: str) -> list[dict[str, Any]]:
        """Every record that was left out because it killed its worker, in the order of the input."""
        return [
            {"task": int(path.stem), "position": int(position), **record}
            for path in sorted((self.folder / "quarantine" / step).glob("*.json"))
            for position, record in sorted(_read(path).items(), key=lambda item: int(item[0]))
        ]

    def _carry_out(self, step: str, tasks: Sequence[Task], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        calls = []
        for number in numbers:
            task, marker = tasks[number], self._marker_path(step, number)
            left_out = () if task.records is None else (self._left_out(step, number),)
            calls.append(Call(carry_out, (task.function, (*task.arguments, *left_out), marker), bool(left_out)))
        return ((numbers[position], result) for position, result in self.runner.run(calls))

    # ------------------------------------------------------------------------------------- which record killed it

    def _find_causes(self, step: str, tasks: Sequence[Task], lost: Mapping[int, Lost], deaths: Counter[int]) -> None:
        """Quarantine the records that kill their worker; DataError if there is no such record and no end of it."""
        deaths.update(lost.keys())
        suspects = [(n, found.position) for n, found in lost.items() if found.position != watch.NONE]
        guilty = self._confirm(tasks, [(n, at) for n, at in suspects if tasks[n].records is not None], DEATHS - 1)
        unclear = [n for n in lost if n not in {number for number, _ in guilty} and deaths[n] % DEATHS == 0]
        guilty |= self._bisect(step, tasks, [n for n in unclear if tasks[n].records is not None])
        for (number, position), reason in sorted(guilty.items()):
            self._quarantine(step, number, position, reason, tasks[number])
            deaths[number] = 0
        for number in lost:
            if deaths[number] >= (DEATHS if tasks[number].records is None else MAX_DEATHS):
                raise DataError(
                    f"the step {step} lost its worker process {deaths[number]} times ({lost[number].detail}), on no "
                    "one record: most likely memory ran out; run the same command again with fewer --workers (finished "
                    "work is kept)"
                )

    def _confirm(self, tasks: Sequence[Task], suspects: Iterable[tuple[int, int]], times: int) -> dict[Any, Lost]:
        """Those records that, alone, kill their worker that many times in a row."""
        dead: dict[tuple[int, int], Lost] = dict.fromkeys(suspects)  # pyright: ignore[reportAssignmentType]
        for _ in range(times):
            found = self._probe(tasks, [(number, at, at + 1) for number, at in dead])
            dead = {(number, start): end for (number, start, _), end in found.items()}
        return dead

    def _bisect(self, step: str, tasks: Sequence[Task], numbers: Sequence[int]) -> dict[Any, Lost]:
        """Halve the records of these tasks until single ones are left that kill their worker."""
        ranges = [gap for n in numbers for gap in self._gaps(step, n, tasks[n])]
        single: list[tuple[int, int]] = []
        while ranges:
            halves = []
            for number, start, stop in self._probe(tasks, ranges):
                middle = (start + stop) // 2
                if stop - start == 1:
                    single.append((number, start))
                else:
                    halves += [(number, start, middle), (number, middle, stop)]
            ranges = halves
        return self._confirm(tasks, single, DEATHS - 1)

    def _probe(self, tasks: Sequence[Task], ranges: Sequence[tuple[int, int, int]]) -> dict[Any, Lost]:
        """Those ranges that kill their worker."""
        calls = []
        for number, start, stop in ranges:
            records = tasks[number].records
            assert records is not None
            calls.append(Call(discard, (records.probe, *tasks[number].arguments, start, stop), guarded=True))
        return {ranges[at]: result for at, result in self.runner.run(calls) if isinstance(result, Lost)}

    def _gaps(self, step: str, number: int, task: Task) -> list[tuple[int, int, int]]:
        assert task.records is not None
        return [(number, a, b) for a, b in gaps(task.records.count, self._left_out(step, number))]

    def _quarantine(self, step: str, number: int, position: int, lost: Lost, task: Task) -> None:
        assert task.records is not None
        call = Call(task.records.describe, (*task.arguments, position), guarded=True)
        name = next(iter(self.runner.run([call])))[1]
        path = self._quarantine_path(step, number)
        record = {"reason": lost.reason, "detail": lost.detail} | ({} if isinstance(name, Lost) else name)
        known = _read(path) | {str(position): record}
        write_bytes(path, json.dumps(known, sort_keys=True).encode())
        log.info("%s: record %s of task %s is left out (%s, %s)", step, position, number, lost.reason, lost.detail)
        if len(known) > MAX_QUARANTINED:
            raise DataError(
                f"more than {MAX_QUARANTINED} records of one input of {task.records.count:,} records end their worker "
                f"process (the last: {record}): a broken file, or limits that are too tight. Take the file out of "
                "--input, or give --worker-memory and --record-timeout higher values, and use --overwrite"
            )

    def _left_out(self, step: str, number: int) -> LeftOut:
        return {int(at): record for at, record in _read(self._quarantine_path(step, number)).items()}

    # -------------------------------------------------------------------------------------------------- on disk

    def _quarantine_path(self, step: str, number: int) -> Path:
        return self.folder / "quarantine" / step / f"{number:06d}.json"

    def _marker_path(self, step: str, number: int) -> Path:
        return self.folder / "done" / step / f"{number:06d}.json"

    def _marker(self, step: str, number: int, task: Task) -> Counts | None:
        with contextlib.suppress(OSError, ValueError):
            if all(path.is_file() for path in task.outputs):
                return json.loads(self._marker_path(step, number).read_bytes())
        return None


def carry_out(function: Callable[..., Counts], arguments: tuple[Any, ...], marker: Path) -> Counts:
    text = json.dumps(function(*arguments), sort_keys=True)
    write_bytes(marker, text.encode())
    return json.loads(text)  # the very form that a later run finds in the marker: the order of names included


def discard(probe: Callable[..., object], *arguments: object) -> None:
    """Only whether it ends is of interest, and not every result can travel."""
    probe(*arguments)


def gaps(count: int, left_out: Iterable[int]) -> list[tuple[int, int]]:
    """What is between: of 6 records without the second and third, (0, 1) and (3, 6)."""
    edges = [-1, *sorted(left_out), count]
    return [(a + 1, b) for a, b in itertools.pairwise(edges) if a + 1 < b]


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


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}
