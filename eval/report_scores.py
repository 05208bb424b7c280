"""results.jsonl -> tables: a row per evaluator, metric and evaluation set, a column per lineage, an interval in every
cell.

    MAE, WSP, MAE→WSP, MAE→WSP→LiT        runs of one lineage that differ only in their seed share a column

Pure functions over results; no torch, so that `make demo` can print the table too.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from eval.report_intervals import DRAWS, IMAGES, NOTHING, SEEDS, Score, plain, score, t_interval
from eval.report_settings import differing, setting
from eval.report_tasks import (
    Identity,
    Task,
    identity,
    is_detail,
    is_look,
    is_of_images,
    less_is_better,
    tasks,
    unit,
)
from eval.results import Result
from maws.config import STAGE_NAMES

EVALUATORS = ("linear", "knn", "lowshot", "zeroshot", "wsphead", "retrieval")  # the order of the table; others follow
HIERARCHY = "hierarchy/"  # metrics of eval/hierarchy.py begin with it; they have a table of their own
RECALL = re.compile(r"(?:^|/)[rR]@(\d+)$")


class Key(NamedTuple):
    """What makes a row."""

    evaluator: str
    metric: str
    on: Identity
    how: str = ""  # report_settings.setting


@dataclass(frozen=True)
class Row:
    evaluator: str
    metric: str
    cells: dict[str, Score]  # by column
    chance: float | None
    n: tuple[int, ...]  # evaluation images, one number unless the columns differ
    task: Task
    on: str = ""  # the task's title, where the evaluator has several; and the settings, where they differ

    @property
    def unit(self) -> str:
        return unit(self.metric)

    @property
    def best(self) -> str | None:
        if len(self.cells) < 2 or is_look(self.metric):
            return None
        wins = min if less_is_better(self.metric) else max
        return wins(self.cells, key=lambda column: self.cells[column].mean)


@dataclass(frozen=True)
class Difference:
    """One metric of MAE→WSP minus WSP, paired by training seed."""

    evaluator: str
    metric: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    interval: Score | None  # None with a single pair

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def is_clear(self) -> bool:
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


@dataclass(frozen=True)
class ScoreTable:
    columns: list[str]
    rows: list[Row]
    runs: dict[str, list[str]]  # column -> run names
    differences: list[Difference] = field(default_factory=list)
    hierarchy: list[Row] = field(default_factory=list)  # how far off mistakes are in WordNet
    retrieval: list[Row] = field(default_factory=list)  # R@k
    looks: list[Row] = field(default_factory=list)  # of features, in dimensions and pixels: no accuracies

    @property
    def everything(self) -> list[Row]:
        return [*self.rows, *self.hierarchy, *self.retrieval]


@dataclass(frozen=True)
class Entrant:
    """What the table must know of a run beside its results."""

    name: str
    lineage: tuple[str, ...]
    seed: int
    recipe: str  # digest of everything that was configured but the seed: equal means comparable as repeats
    steps: int | None = None  # of the last stage


def lineage_name(lineage: Sequence[str]) -> str:
    """("mae", "wsp") -> "MAE→WSP"."""
    return "→".join(STAGE_NAMES.get(stage, stage) for stage in lineage) or "untrained"


def newest(results: Iterable[Result]) -> list[Result]:
    """One result per run, evaluator, metric, task, setting and seed: the one written last. The file keeps them all."""
    kept: dict[tuple[object, ...], Result] = {}
    for result in results:
        kept[result.run, result.evaluator, result.metric, identity(result), setting(result), result.seed] = result
    return list(kept.values())


def chance(result: Result) -> float | None:
    """What guessing gives: k of the classes for top-k, whatever stands around it (`5-shot/vpt/top1`, `top1@k=20`)."""
    classes = result.config.get("num_classes")
    found = re.search(r"(?:^|/)top(\d+)(?:@|$)", result.metric)
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1 or not found:
        return None
    return min(1.0, int(found[1]) / classes)


def score_table(results: Iterable[Result], entrants: Sequence[Entrant] = ()) -> ScoreTable:
    """`Result.run` is the name of its entrant; a run nobody knows is a recipe of its own."""
    results = newest(results)
    known = {entrant.name: entrant for entrant in entrants}
    for result in results:
        if result.run not in known:
            known[result.run] = Entrant(result.run, tuple(result.lineage), result.seed, recipe=f"run {result.run}")
    with_results = [known[name] for name in dict.fromkeys(result.run for result in results)]
    columns = _columns(with_results)
    column_of = {name: column for column, names in columns.items() for name in names}

    values: dict[Key, Values] = {}
    sizes: dict[Key, dict[str, int]] = {}
    guess: dict[Key, float | None] = {}
    for result in results:
        key = Key(result.evaluator, result.metric, identity(result), setting(result))
        column = column_of[result.run]
        values.setdefault(key, {}).setdefault(column, {}).setdefault(result.run, []).append(result.value)
        sizes.setdefault(key, {})[column] = result.n
        guess[key] = chance(result) if guess.get(key) is None else guess[key]
    of = tasks(results)
    several, settings = _with_several_tasks(values), _settings(values)
    rows = [
        Row(
            key.evaluator,
            key.metric,
            cells={c: _cell_of(key.metric, values[key][c], sizes[key][c]) for c in columns if c in values[key]},
            chance=guess[key],
            n=tuple(sorted(set(sizes[key].values()))),
            task=of[key.on],
            on=" · ".join(filter(None, (of[key.on].title if key.evaluator in several else "", settings[key]))),
        )
        for key in sorted(values, key=lambda key: _row_order(key, of))
    ]
    hierarchy = [row for row in rows if row.metric.startswith(HIERARCHY)]
    retrieval = [row for row in rows if RECALL.search(row.metric)]
    looks = [row for row in rows if is_look(row.metric)]
    plain_rows = [row for row in rows if row not in hierarchy and row not in retrieval and row not in looks]
    plain_rows = [row for row in plain_rows if not is_detail(row.metric)]
    differences = _differences(with_results, values, column_of, of, several, settings)
    return ScoreTable(list(columns), plain_rows, columns, differences, hierarchy, retrieval, looks)


Values = dict[str, dict[str, list[float]]]  # by column and run: a value per draw


def _cell_of(metric: str, by_run: dict[str, list[float]], n: int) -> Score:
    return (score if is_of_images(metric) else plain)(list(by_run.values()), n)


def _with_several_tasks(keys: Iterable[Key]) -> set[str]:
    """Evaluators that were run on more than one task: their rows must say on which."""
    found: dict[str, set[Identity]] = {}
    for key in keys:
        found.setdefault(key.evaluator, set()).add(key.on)
    return {evaluator for evaluator, on in found.items() if len(on) > 1}


def _settings(keys: Iterable[Key]) -> dict[Key, str]:
    """What sets a row apart from others of its evaluator, metric and task."""
    alike: dict[Key, list[Key]] = {}
    for key in keys:
        alike.setdefault(key._replace(how=""), []).append(key)
    found: dict[Key, str] = {}
    for group in alike.values():
        words = differing(key.how for key in group)
        found |= {key: words[key.how] for key in group}
    return found


def _columns(entrants: Sequence[Entrant]) -> dict[str, list[str]]:
    """Column name -> runs. Runs of one lineage but of different recipes are kept apart, and named."""
    groups: dict[tuple[tuple[str, ...], str], list[Entrant]] = {}
    for entrant in entrants:
        groups.setdefault((entrant.lineage, entrant.recipe), []).append(entrant)
    of_lineage: dict[tuple[str, ...], int] = {}
    for lineage, _ in groups:
        of_lineage[lineage] = of_lineage.get(lineage, 0) + 1
    ordered = sorted(groups.items(), key=lambda item: (len(item[0][0]), item[0][0], min(e.name for e in item[1])))
    columns: dict[str, list[str]] = {}
    for (lineage, _), members in ordered:
        names = sorted(member.name for member in members)
        name = lineage_name(lineage) + (f" ({names[0]})" if of_lineage[lineage] > 1 else "")
        columns[name] = names
    return columns


def _row_order(key: Key, of: dict[Identity, Task]) -> tuple[object, ...]:
    evaluator, metric, on, how = key
    place = EVALUATORS.index(evaluator) if evaluator in EVALUATORS else len(EVALUATORS)
    numbers = [int(number) for number in re.findall(r"\d+", metric)]
    return place, evaluator, of[on].order, on, not metric.startswith("top"), re.sub(r"\d+", "0", metric), numbers, how


def _differences(
    entrants: Sequence[Entrant],
    values: dict[Key, Values],
    column_of: dict[str, str],
    of: dict[Identity, Task],
    several: set[str],
    settings: dict[Key, str],
) -> list[Difference]:
    """MAE→WSP minus WSP for every share, over the training seeds both have, at equal WSP steps."""
    ours = {e.seed: e for e in entrants if e.lineage == ("mae", "wsp")}
    theirs = {e.seed: e for e in entrants if e.lineage == ("wsp",)}
    pairs = [(ours[s], theirs[s]) for s in sorted(ours.keys() & theirs.keys()) if ours[s].steps == theirs[s].steps]
    found: list[Difference] = []
    accuracies = [key for key in values if not key.metric.startswith(HIERARCHY) and not is_look(key.metric)]
    accuracies = [key for key in accuracies if not is_detail(key.metric)]
    for key in sorted(accuracies, key=lambda key: _row_order(key, of)):
        both = [
            (a.seed, fmean(values[key][column_of[a.name]][a.name]), fmean(values[key][column_of[b.name]][b.name]))
            for a, b in pairs
            if a.name in values[key].get(column_of[a.name], {}) and b.name in values[key].get(column_of[b.name], {})
        ]
        if both:
            difference = [a - b for _, a, b in both]
            spread = max(difference) - min(difference) > 1e-9  # equal ones say nothing of the noise
            interval = t_interval(difference, SEEDS) if spread else None
            metric = key.metric + (f" on {of[key.on].title}" if key.evaluator in several else "")
            metric += f" ({settings[key]})" if settings[key] else ""
            seeds = tuple(seed for seed, _, _ in both)
            found.append(Difference(key.evaluator, metric, seeds, tuple(difference), interval))
    return found


def headline_metric(differences: Sequence[Difference]) -> Difference | None:
    """The comparison the verdict is about: linear top-1 where it was measured."""
    for difference in differences:
        if (difference.evaluator, difference.metric) == ("linear", "top1"):
            return difference
    return differences[0] if differences else None


def verdict(table: ScoreTable, steps: int | None = None) -> str:
    """One honest sentence or two: MAE→WSP against WSP at equal WSP steps, paired by training seed."""
    main = headline_metric(table.differences)
    if main is None:
        return (
            "MAE→WSP and WSP cannot be compared yet: that needs both, evaluated, "
            "with the same training seed and the same number of WSP steps."
        )
    equal = f"At equal WSP steps ({steps:,})" if steps else "At equal WSP steps"
    points = 100 * main.mean
    what = f"{main.evaluator} {main.metric}"
    apart = f"{abs(points):.1f} points {'above' if points >= 0 else 'below'}"
    direction = apart if abs(points) >= 0.05 else "level with"
    pairs = "1 pair of runs" if len(main.values) == 1 else f"mean of {len(main.values)} pairs, same training seed"
    start = f"{equal}, MAE→WSP is {direction} WSP in {what} ({pairs})"
    if main.interval is None:
        why = "one pair has" if len(main.values) == 1 else "equal differences have"
        end = f"; {why} no interval over seeds, so this is an observation, not a finding."
    else:
        bounds = f"95 % t-interval {100 * main.interval.low:+.1f} to {100 * main.interval.high:+.1f}"
        if main.is_clear:
            end = f"; {bounds}, so the difference is larger than the noise between seeds."
        else:
            end = f"; {bounds}: it includes zero, so these seeds cannot tell the two apart."
    others = [d for d in table.differences if d is not main]
    if others:
        ahead = sum(d.mean > 0 for d in others)
        end += f" MAE→WSP is ahead in {ahead} of the {len(others)} other metrics."
    return f"{start}{end} It had the MAE stage's computing on top."


def as_text(table: ScoreTable) -> str:
    """The table for a terminal."""
    header = ["evaluator", "metric", *table.columns, "chance", "n"]
    body = [
        [
            row.evaluator,
            row.metric + (f" on {row.on}" if row.on else ""),
            *(_cell(row.cells.get(column)) for column in table.columns),
            "" if row.chance is None else f"{100 * row.chance:.2f}",
            "/".join(map(str, row.n)),
        ]
        for row in table.rows
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, ["-" * width for width in widths], *body]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Score | None) -> str:
    if value is None:
        return "–"
    if value.over == NOTHING:
        return f"{100 * value.mean:.1f}"
    if value.over == NOTHING:
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ±{100 * value.half_width:.1f}" + {SEEDS: "", DRAWS: "d", IMAGES: "i"}[value.over]
