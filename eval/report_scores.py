"""results.jsonl -> one table: a row per evaluator and metric, a column per lineage, an interval in every cell.

    MAE, WSP, MAE→WSP, MAE→WSP→LiT        runs of one lineage that differ only in their seed share a column

Pure functions over results; no torch, so that `make demo` can print the table too.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from eval.results import Result
from maws.config import STAGE_NAMES

EVALUATORS = ("linear", "knn", "lowshot", "zeroshot")  # the order of the table; others follow by name

# Two-sided 95 % quantiles of Student's t, by degrees of freedom; beyond 30 the normal's is within 2 %.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T95 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
Z95 = 1.960

SEEDS, DRAWS, IMAGES = "training seeds", "low-shot draws", "evaluation images"


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval, and what was repeated to get it."""

    mean: float
    low: float
    high: float
    over: str  # SEEDS, DRAWS or IMAGES
    count: int  # how many of those

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Row:
    evaluator: str
    metric: str
    cells: dict[str, Score]  # by column
    chance: float | None
    n: tuple[int, ...]  # evaluation images, one number unless the columns differ

    @property
    def best(self) -> str | None:
        return max(self.cells, key=lambda column: self.cells[column].mean) if len(self.cells) > 1 else None


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


def t_interval(values: Sequence[float], over: str) -> Score:
    """Mean ± t·s/√k; needs two values or more."""
    mean, k = fmean(values), len(values)
    t = T95[k - 2] if k - 2 < len(T95) else Z95
    half = t * stdev(values) / math.sqrt(k)
    return Score(mean, mean - half, mean + half, over, k)


def wilson_interval(value: float, n: int) -> Score:
    """Wilson's interval for a share of `n` images: the sampling error of the evaluation set alone."""
    if n <= 0:
        return Score(value, 0.0, 1.0, IMAGES, n)
    centre = (value + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(value * (1 - value) / n + Z95**2 / (4 * n * n))
    return Score(value, max(0.0, centre - half), min(1.0, centre + half), IMAGES, n)


def score(by_run: Sequence[Sequence[float]], n: int) -> Score:
    """Per run, the value of every draw -> mean, with an interval over training seeds where there are several."""
    means = [fmean(values) for values in by_run]
    if len(means) > 1:
        return t_interval(means, SEEDS)
    if len(by_run[0]) > 1:
        return t_interval(by_run[0], DRAWS)
    return wilson_interval(means[0], n)


def newest(results: Iterable[Result]) -> list[Result]:
    """One result per run, evaluator, metric and seed: the one written last. The file itself keeps them all."""
    kept: dict[tuple[str, str, str, int], Result] = {}
    for result in results:
        kept[result.run, result.evaluator, result.metric, result.seed] = result
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

    values: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    sizes: dict[tuple[str, str], dict[str, int]] = {}
    guess: dict[tuple[str, str], float | None] = {}
    for result in results:
        key, column = (result.evaluator, result.metric), column_of[result.run]
        values.setdefault(key, {}).setdefault(column, {}).setdefault(result.run, []).append(result.value)
        sizes.setdefault(key, {})[column] = result.n
        guess[key] = chance(result) if guess.get(key) is None else guess[key]
    rows = [
        Row(
            *key,
            cells={c: score(list(values[key][c].values()), sizes[key][c]) for c in columns if c in values[key]},
            chance=guess[key],
            n=tuple(sorted(set(sizes[key].values()))),
        )
        for key in sorted(values, key=_row_order)
    ]
    return ScoreTable(list(columns), rows, columns, _differences(with_results, values, column_of))


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


def _row_order(key: tuple[str, str]) -> tuple[object, ...]:
    evaluator, metric = key
    place = EVALUATORS.index(evaluator) if evaluator in EVALUATORS else len(EVALUATORS)
    numbers = [int(number) for number in re.findall(r"\d+", metric)]
    return place, evaluator, not metric.startswith("top"), re.sub(r"\d+", "0", metric), numbers


def _differences(
    entrants: Sequence[Entrant],
    values: dict[tuple[str, str], dict[str, dict[str, list[float]]]],
    column_of: dict[str, str],
) -> list[Difference]:
    """MAE→WSP minus WSP for every metric, over the training seeds both have, at equal WSP steps."""
    ours = {e.seed: e for e in entrants if e.lineage == ("mae", "wsp")}
    theirs = {e.seed: e for e in entrants if e.lineage == ("wsp",)}
    pairs = [(ours[s], theirs[s]) for s in sorted(ours.keys() & theirs.keys()) if ours[s].steps == theirs[s].steps]
    found: list[Difference] = []
    for key in sorted(values, key=_row_order):
        both = [
            (a.seed, fmean(values[key][column_of[a.name]][a.name]), fmean(values[key][column_of[b.name]][b.name]))
            for a, b in pairs
            if a.name in values[key].get(column_of[a.name], {}) and b.name in values[key].get(column_of[b.name], {})
        ]
        if both:
            difference = [a - b for _, a, b in both]
            spread = max(difference) - min(difference) > 1e-9  # equal ones say nothing of the noise
            interval = t_interval(difference, SEEDS) if spread else None
            found.append(Difference(*key, tuple(seed for seed, _, _ in both), tuple(difference), interval))
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
            row.metric,
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
    return f"{100 * value.mean:.1f} ±{100 * value.half_width:.1f}" + {SEEDS: "", DRAWS: "d", IMAGES: "i"}[value.over]
