"""What a comparison found: scores of every arm, rung and seed; their intervals, paired tests and curves.

The lines of results.jsonl that count are the newest of each run, metric and task, and only those of the weights that
the run has: an evaluation that was killed and started again counts once.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from eval import correct
from eval.comparison import paired_statistics as paired
from eval.comparison.plan import TITLES, Entry, Plan
from eval.report_intervals import t_interval
from eval.report_scores import newest
from eval.report_settings import setting
from eval.report_tasks import SHARE, identity, unit
from eval.results import Result, read

LEVEL = 0.05  # p-values below it, corrected, count as clear


@dataclass(frozen=True)
class Cell:
    """One arm at one rung in one metric."""

    arm: str
    budget: float
    multiply_adds: int
    values: dict[int, float]  # by training seed
    low: float | None  # 95 % bootstrap interval over seeds and images; None without answers to every image
    high: float | None

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Pair:
    """Two arms of one rung in one metric, first minus second, over the seeds and images that both have."""

    first: str
    second: str
    budget: float
    seeds: tuple[int, ...]
    difference: float
    low: float | None  # 95 % bootstrap interval over seeds and images
    high: float | None
    low_seeds: float | None  # Student's t over seeds
    high_seeds: float | None
    images: paired.OverImages | None
    over_seeds: paired.OverSeeds
    holm: dict[str, float] = field(default_factory=dict)  # corrected p over the rung's pairs: t, images, signs

    @property
    def holds_zero(self) -> bool:
        """Does an interval of the difference hold 0, or is there none?"""
        of_images = self.low is None or self.high is None or self.low <= 0 <= self.high
        of_seeds = self.low_seeds is not None and self.high_seeds is not None and self.low_seeds <= 0 <= self.high_seeds
        return of_images or of_seeds

    @property
    def conclusion(self) -> str:
        """`apart`, `apart for these weights`, or `not told apart`.

        The first is about the way of training: both intervals without 0, and Holm's p of the t-test over seeds below
        5 %. The second is about the weights at hand: one seed, or seeds that do not yet tell.
        """
        if not self.holds_zero and self.holm.get("t", 1.0) < LEVEL:
            return "apart"
        without_seeds = self.low is not None and self.high is not None and not self.low <= 0 <= self.high
        return "apart for these weights" if without_seeds and self.holm["images"] < LEVEL else "not told apart"


@dataclass(frozen=True)
class Metric:
    """Everything about one score."""

    name: str  # evaluator/metric
    images: int
    chance: float | None
    cells: list[Cell]
    pairs: list[Pair]

    def curve(self, arm: str) -> list[Cell]:
        return sorted((cell for cell in self.cells if cell.arm == arm), key=lambda cell: cell.multiply_adds)


@dataclass(frozen=True)
class Measured:
    """One metric of one run: of several draws (low-shot splits) the mean, also image by image."""

    entry: Entry
    result: Result  # of the first draw
    value: float
    right: np.ndarray | None  # N, share of draws that have the image right; None where answers were not kept


def collect(plan: Plan) -> list[Metric]:
    """Intervals and tests of all shares that every run of the plan has; the headline first.

    Raises DataError for a run without results, and for results on different evaluation data.
    """
    by_metric: dict[str, list[Measured]] = {}
    for entry in plan.entries:
        for measured in measure(entry):
            by_metric.setdefault(f"{measured.result.evaluator}/{measured.result.metric}", []).append(measured)
    whole = {name: found for name, found in by_metric.items() if len(found) == len(plan.entries)}
    headline = plan.comparison.headline
    if headline not in whole:
        raise DataError(
            f"not every run of the comparison has a score {headline}; there are {', '.join(sorted(whole)) or 'none'}: "
            f"set headline to one of them"
        )
    for name, found in whole.items():
        if len({(m.result.hashes.get("data"), m.result.hashes.get("classes"), m.result.n) for m in found}) > 1:
            raise DataError(f"{name} was measured on different evaluation data; evaluate all runs on the same")
    ordered = sorted(whole, key=lambda name: (name != headline, name))
    return [of_metric(name, whole[name], plan) for name in ordered]


def measure(entry: Entry) -> list[Measured]:
    """The newest shares of a run. Raises DataError when it has none."""
    file = Path(entry.run) / "results.jsonl"
    lines = [one for one in read(file) if one.run == os.path.normpath(entry.run)] if file.is_file() else []
    weights = lines[-1].hashes.get("weights") if lines else None  # written last: of the weights that are there
    last = {(one.evaluator, one.metric): manner(one) for one in lines}
    draws: dict[tuple[str, str], list[Result]] = {}
    for one in newest(lines):
        name = one.evaluator, one.metric
        if unit(one.metric) == SHARE and one.hashes.get("weights") == weights and manner(one) == last[name]:
            draws.setdefault(name, []).append(one)
    if not draws:
        raise DataError(f"{entry.run} has no results yet; `python -m eval compare` makes them")
    return [of_draws(entry, of_one, file.parent) for of_one in draws.values()]


def manner(result: Result) -> tuple[Any, ...]:
    """On what and how a score was measured: what differs in it is another evaluation, and no further draw."""
    return identity(result), setting(result), result.config.get(result.evaluator)


def of_draws(entry: Entry, found: Sequence[Result], folder: Path) -> Measured:
    answers = [correct.read(folder, one) for one in found]
    kept = [right for right in answers if right is not None]
    right = np.mean(kept, axis=0) if len(kept) == len(found) and len({one.n for one in found}) == 1 else None
    return Measured(entry, found[0], fmean(one.value for one in found), right)


def of_metric(name: str, found: Sequence[Measured], plan: Plan) -> Metric:
    table = {(m.entry.arm, m.entry.budget, m.entry.seed): m for m in found}
    seeds, draws = plan.comparison.seeds, plan.comparison.draws
    result = found[0].result
    cells = []
    for arm, budget in dict.fromkeys((m.entry.arm, m.entry.budget) for m in found):
        of_seeds = [table[arm, budget, seed] for seed in seeds]
        answers = stacked(of_seeds)
        low, high = (None, None) if answers is None else interval(answers, draws)
        values = {m.entry.seed: m.value for m in of_seeds}
        cells.append(Cell(arm, budget, of_seeds[0].entry.multiply_adds, values, low, high))
    pairs = [pair for budget in plan.comparison.budgets for pair in pairs_of(table, budget, plan)]
    chance = result.config.get("chance")
    is_top1 = "top1" in result.metric
    return Metric(name, result.n, chance if is_top1 and isinstance(chance, float) else None, cells, pairs)


def stacked(found: Sequence[Measured]) -> np.ndarray | None:
    """S N of 0 to 1, or None when a run kept no answers."""
    if any(measured.right is None for measured in found):
        return None
    return np.array([measured.right for measured in found], dtype=np.float64)


def interval(values: np.ndarray, draws: int) -> tuple[float, float]:
    return paired.percentiles(paired.bootstrap_means({"mean": values}, draws, seed=0)["mean"])


def pairs_of(table: dict[tuple[str, float, int], Measured], budget: float, plan: Plan) -> list[Pair]:
    """Every two arms of a rung, the better mean first; p-values corrected for all of them together."""
    asked = plan.comparison
    pairs = []
    for a, b in combinations(asked.arms, 2):
        both = [[table[arm, 0.0 if arm == "scratch" else budget, seed] for seed in asked.seeds] for arm in (a, b)]
        pairs.append(compared(a, b, budget, both[0], both[1], asked.draws))
    tests = {
        "t": [pair.over_seeds.t for pair in pairs],
        "signs": [pair.over_seeds.signs for pair in pairs],
        "images": [pair.images.permutation if pair.images else None for pair in pairs],
    }
    for name, values in tests.items():
        corrected = paired.holm([1.0 if value is None else value for value in values])
        for pair, value in zip(pairs, corrected, strict=True):
            pair.holm[name] = value
    return pairs


def compared(a: str, b: str, budget: float, of_a: list[Measured], of_b: list[Measured], draws: int) -> Pair:
    gaps = [x.value - y.value for x, y in zip(of_a, of_b, strict=True)]
    if fmean(gaps) < 0:
        return compared(b, a, budget, of_b, of_a, draws)
    first, second = stacked(of_a), stacked(of_b)
    low = high = images = None
    if first is not None and second is not None:
        low, high = interval(first - second, draws)
        images = paired.over_images(first - second, draws)
    over_seeds = paired.over_seeds(gaps, draws)
    of_seeds = t_interval(gaps, "training seeds") if over_seeds.t is not None else None
    return Pair(
        a, b, budget, tuple(m.entry.seed for m in of_a), fmean(gaps), low, high,
        of_seeds.low if of_seeds else None, of_seeds.high if of_seeds else None, images, over_seeds,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Reach:
    """Where the curve of one arm first reaches the full score of another."""

    arm: str
    other: str
    multiply_adds: float
    ratio: float  # of the other's full budget to that


def reaches(metric: Metric, arms: Sequence[str]) -> list[Reach]:
    """For every two arms, read off between rungs on a logarithmic axis of FLOPs: a point estimate, no interval.

    Left out where a curve never gets there, or is there already at its smallest rung.
    """
    found = []
    trained = [arm for arm in arms if arm != "scratch"]
    for arm, other in ((a, b) for a in trained for b in trained if a != b):
        target = metric.curve(other)[-1]
        curve = metric.curve(arm)
        for one, two in pairwise(curve):
            if one.mean < target.mean <= two.mean:
                part = (target.mean - one.mean) / (two.mean - one.mean)
                at = float(np.exp(np.interp(part, [0, 1], np.log([one.multiply_adds, two.multiply_adds]))))
                found.append(Reach(arm, other, at, target.multiply_adds / at))
                break
    return found


def title(arm: str) -> str:
    return TITLES[arm]
