"""Tables of the report about classes nobody trained on: by name and by head side by side, retrieval, and the mistakes.

    zero-shot     a row per evaluation set and language, a column per run and way: names and a text tower, or a WSP head
    retrieval     a row per evaluation set, direction and run: R@1, R@5, R@10
    mistakes      how far off they are in WordNet, and the classes most often taken for each other

Pure functions over rows, results and the confusion files beside them; no torch.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report_intervals import Score
from eval.report_runs import Folder
from eval.report_scores import HIERARCHY, RECALL, Row, ScoreTable
from eval.report_tasks import Task, identity, tasks
from eval.results import Result

WAYS = {"zeroshot": "by name", "wsphead": "by WSP head"}
CONFUSION = "confusion"  # folder of confusion files in a run
PAIRS = 10  # most confused classes shown of each


@dataclass(frozen=True)
class Way:
    """A column: how the classes were asked for, and which runs were."""

    evaluator: str
    column: str

    @property
    def words(self) -> str:
        return WAYS[self.evaluator]


@dataclass(frozen=True)
class SideBySide:
    """One evaluation set in one language."""

    task: Task
    top1: dict[Way, Score]
    top5: dict[Way, Score]
    chance: float | None
    n: tuple[int, ...]

    @property
    def best(self) -> Way | None:
        return max(self.top1, key=lambda way: self.top1[way].mean) if len(self.top1) > 1 else None


@dataclass(frozen=True)
class Line:
    """A line of the retrieval or the hierarchy table: one run on one task."""

    task: Task
    what: str  # direction, or evaluator
    column: str
    cells: dict[str, Score]  # by heading
    n: tuple[int, ...]


@dataclass(frozen=True)
class Confused:
    """A confusion file that belongs to a result of today."""

    run: str
    way: str
    task: Task
    accuracy: float
    images: int
    pairs: list[dict[str, Any]]  # the first of eval/confusion.py
    others: int  # pairs that are not shown


# -------------------------------------------------------------------------------------------------------- side by side


def ways(table: ScoreTable) -> list[Way]:
    found = [Way(row.evaluator, column) for row in table.rows if row.evaluator in WAYS for column in row.cells]
    order = {name: place for place, name in enumerate(WAYS)}
    return sorted(dict.fromkeys(found), key=lambda way: (order[way.evaluator], table.columns.index(way.column)))


def side_by_side(table: ScoreTable) -> list[SideBySide]:
    """In the order of the table: by the name of the evaluation set, its languages after each other."""
    by_task: dict[Task, list[Row]] = {}
    for row in table.rows:
        if row.evaluator in WAYS and row.metric in ("top1", "top5"):
            by_task.setdefault(row.task, []).append(row)
    found = []
    for task, rows in sorted(by_task.items(), key=lambda item: item[0].order):
        cells: dict[str, dict[Way, Score]] = {"top1": {}, "top5": {}}
        for row in rows:
            cells[row.metric] |= {Way(row.evaluator, column): cell for column, cell in row.cells.items()}
        chance = next((row.chance for row in rows if row.metric == "top1"), None)
        sizes = tuple(sorted({n for row in rows for n in row.n}))
        found.append(SideBySide(task, cells["top1"], cells["top5"], chance, sizes))
    return found


def mapped(results: Iterable[Result]) -> list[tuple[Task, str]]:
    """How the classes of each task became synsets of a head, in words: the last result says it."""
    results = list(results)
    of = tasks(results)  # of all: titles are told apart as in the table
    words: dict[Task, dict[str, None]] = {}
    for result in (r for r in results if r.evaluator == "wsphead" and r.metric == "top1"):
        chosen = result.config.get("chosen")
        matched = chosen.get("matched") if isinstance(chosen, dict) else None
        if isinstance(matched, dict):
            counts = ", ".join(f"{count} {_MATCHED.get(name, name)}" for name, count in matched.items() if count)
            words.setdefault(of[identity(result)], {})[counts] = None
    return [(task, "; or ".join(different)) for task, different in words.items()]


_MATCHED = {
    "same": "by their own synset",
    "below": "by synsets below theirs",
    "above": "by the nearest synset above, which others may share",
    "none": "by none, so always wrong",
}


# ----------------------------------------------------------------------------------------------- retrieval and mistakes


def lines(rows: Sequence[Row]) -> list[Line]:
    """Rows of one metric each -> a line per task, run and what stands before the last part of the metric's name."""
    grouped: dict[tuple[Task, str, str], list[tuple[str, Row]]] = {}
    for row in rows:
        front, _, heading = row.metric.rpartition("/")
        front = row.evaluator if row.metric.startswith(HIERARCHY) else front or row.evaluator
        for column in row.cells:
            grouped.setdefault((row.task, front, column), []).append((heading, row))
    return [
        Line(
            task, what, column,
            {heading: row.cells[column] for heading, row in members},
            tuple(sorted({n for _, row in members for n in row.n})),
        )
        for (task, what, column), members in grouped.items()
    ]  # fmt: skip


def recalls(rows: Sequence[Row]) -> list[str]:
    """The headings of the retrieval table: R@1, R@5, …"""
    found = {row.metric.rpartition("/")[2]: int(match[1]) for row in rows if (match := RECALL.search(row.metric))}
    return sorted(found, key=lambda name: found[name])


def confusions(folder: Folder, shown: int = PAIRS) -> list[Confused]:
    """The confusion files whose accuracy is that of a result for the weights of today; of repeats with other seeds, the
    first run's.
    """
    of = tasks(folder.results)
    found: dict[tuple[str, str, Task], Confused] = {}
    for run in folder.runs:
        for file in sorted((run.folder / CONFUSION).glob("*.json")):
            content = _read(file)
            if content is None:
                folder.notes.append(f"{run.name}: {CONFUSION}/{file.name} cannot be read and is left out")
                continue
            result = _belongs_to(content, file, [r for r in folder.results if r.run == run.name])
            if result is None:
                folder.notes.append(f"{run.name}: {CONFUSION}/{file.name} is of an evaluation that was made again")
                continue
            pairs = content["pairs"]
            words = WAYS.get(result.evaluator, result.evaluator)
            task = of[identity(result)]
            more = len(pairs) - len(pairs[:shown])
            one = Confused(run.name, words, task, result.value, content["images"], pairs[:shown], more)
            found.setdefault((run.title, words, task), one)
    return list(found.values())


def _belongs_to(content: dict[str, Any], file: Path, results: Sequence[Result]) -> Result | None:
    """The newest top-1 with the same classes, the same number of pictures and as many right."""
    for result in reversed(results):
        same = result.hashes.get("classes") == content["classes_sha256"] and result.n == content["images"]
        if (
            result.metric == "top1" and file.name.startswith(result.evaluator) and same
            and abs(result.value - content["right"] / max(1, content["images"])) < 1e-6
        ):  # fmt: skip
            return result
    return None


def _read(file: Path) -> dict[str, Any] | None:
    """What confusion.py wrote, as far as the page needs it; None for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        right = sum(int(entry["right"]) for entry in content["classes"])
        pairs = [
            {
                "names": [str(name) for name in pair["names"]],
                "count": int(pair["count"]),
                "share": float(pair["share"]),
                "distance": None if pair["distance"] is None else int(pair["distance"]),
                "common": None if pair["common"] is None else str(pair["common"]),
            }
            for pair in content["pairs"]
        ]
        if any(len(pair["names"]) != 2 for pair in pairs):
            return None
        return {
            "images": int(content["images"]),
            "classes_sha256": str(content["classes_sha256"]),
            "right": right,
            "pairs": pairs,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
