"""A grid over learning rate and weight decay on a data set: what is tried, what is chosen on which pictures, and told.

    outcome.chosen      the point with the best top-1 on a held-out part of the training data: the number to report
    outcome.best        the best point on the evaluation data itself, as the papers report; it is too high by choice
    outcome.grid        mean and standard deviation over all points

Following Kornblith et al. in LC-MAE's transfers (recipes 4.5); its grid is not found, ours is the suggestion there.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from data_pipeline.errors import DataError, UsageError
from data_pipeline.files import write_bytes
from eval.results import Result, append, read
from maws.files import append as add_line
from maws.files import end_line, json_lines

METHODS = ("finetune", "linear")
SPLIT_SEED = 0  # of what is held out, whatever the seeds of training


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What `--set name=value` changes."""

    lr: tuple[float, ...] = (1e-3, 5e-4, 2.5e-4, 1e-4)  # base lr, for 256 pictures a step; suggested, recipes 4.5
    weight_decay: tuple[float, ...] = (0.05, 0.1)  # suggested, recipes 4.5
    epochs: float = 100.0  # suggested, recipes 4.5
    seeds: tuple[int, ...] = (0,)
    held_out: float = 0.1  # share of the training pictures of every class on which the point is chosen; ours
    most_held_out: int = 10_000  # pictures: enough to choose on; ours
    batch: int = 1024  # method linear
    refit: bool = True  # train once more with the chosen point on all training pictures: that score is told

    def __post_init__(self) -> None:
        if not self.lr or min(self.lr) <= 0 or not self.weight_decay or min(self.weight_decay) < 0:
            raise UsageError("a grid needs one lr above 0 or more, and one weight_decay from 0 or more")
        if not 0 < self.held_out < 1 or self.epochs <= 0 or self.batch < 1 or not self.seeds:
            raise UsageError("held_out lies between 0 and 1, epochs above 0, batch is 1 or more, seeds are one or more")

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(lr, decay) for lr in self.lr for decay in self.weight_decay]


@dataclass(frozen=True)
class Point:
    """One training: top-1 on the held-out part, and on the evaluation data."""

    lr: float
    weight_decay: float
    seed: int
    held_out: float
    test: float


@dataclass(frozen=True)
class Outcome:
    """A finished grid on one data set."""

    name: str
    method: str
    images: int  # evaluation pictures
    held_out_images: int
    classes: int
    points: tuple[Point, ...]
    refits: tuple[tuple[int, float], ...] = ()  # seed, top-1 after training on everything with the chosen point

    def __post_init__(self) -> None:
        assert self.points

    @property
    def chosen(self) -> tuple[float, float]:
        """lr and weight decay with the best mean over seeds on the held-out part; of equal ones the first."""
        return _best(self.points, "held_out")

    @property
    def best(self) -> tuple[float, float]:
        """The same on the evaluation data."""
        return _best(self.points, "test")

    def at(self, point: tuple[float, float], part: str = "test") -> list[float]:
        """A value per seed."""
        return [getattr(p, part) for p in self.points if (p.lr, p.weight_decay) == point]

    @property
    def scores(self) -> list[tuple[int, float]]:
        """The number to report, per seed: after training on all pictures where that was done."""
        seeds = [p.seed for p in self.points if (p.lr, p.weight_decay) == self.chosen]
        return list(self.refits) or list(zip(seeds, self.at(self.chosen), strict=True))

    @property
    def score(self) -> float:
        return fmean(value for _, value in self.scores)

    @property
    def grid(self) -> tuple[float, float]:
        """Mean and sample standard deviation over all points and seeds, on the evaluation data."""
        values = [p.test for p in self.points]
        return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _best(points: Sequence[Point], part: str) -> tuple[float, float]:
    values: dict[tuple[float, float], list[float]] = {}
    for point in points:
        values.setdefault((point.lr, point.weight_decay), []).append(getattr(point, part))
    return max(values, key=lambda key: fmean(values[key]))


def hold_out(labels: np.ndarray, grid: Grid) -> np.ndarray:
    """bool N: a random share of every class, at least one picture of a class with two, never all. One split for all.

    Raises DataError where no class has two.
    """
    import torch

    from eval import held_out

    share = min(grid.held_out, grid.most_held_out / max(1, len(labels)))
    held = held_out.hold_out(torch.from_numpy(labels), share, SPLIT_SEED).numpy()
    if not held.any():
        raise DataError(
            "the training data has one picture of every class: nothing can be held out to choose a point on"
        )
    return held


# --------------------------------------------------------------------------------------------------------------- files


@dataclass
class Done:
    """Points that are finished, in FOLDER/points.jsonl: a grid that was interrupted goes on after them."""

    file: Path
    identity: str  # of weights, data and settings: a point of another grid does not count

    def points(self) -> dict[tuple[float, float, int], Point]:
        points = [
            Point(**{name: value for name, value in entry.items() if name != "identity"})
            for entry in json_lines(self.file)
            if entry.get("identity") == self.identity
        ]
        return {(point.lr, point.weight_decay, point.seed): point for point in points}

    def add(self, point: Point) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        end_line(self.file)
        add_line(self.file, {"identity": self.identity, **asdict(point)})


def write_results(file: Path, outcome: Outcome, common: dict[str, Any], config: dict[str, Any]) -> None:
    """Lines of protocol `transfer`; a line that is there already is not written again.

    `common` holds run, hashes, lineage and time; `config` what else makes the score.
    """
    lr, decay = outcome.chosen
    chosen = {"lr": lr, "weight_decay": decay, "on": f"{outcome.held_out_images} held-out training pictures",
              "held_out_top1": fmean(outcome.at((lr, decay), "held_out"))}  # fmt: skip
    what = config | {"protocol": "transfer", "chosen": chosen, "chance": 1 / outcome.classes,
                     "num_classes": outcome.classes}  # fmt: skip
    scores = [(f"{outcome.method}/top1", seed, value) for seed, value in outcome.scores]
    on_evaluation = {"lr": outcome.best[0], "weight_decay": outcome.best[1], "on": "the evaluation data"}
    lines = [_result(metric, value, seed, outcome, common, what) for metric, seed, value in scores]
    first = outcome.points[0].seed
    best = fmean(outcome.at(outcome.best))
    lines.append(
        _result(f"{outcome.method}/best_of_grid/top1", best, first, outcome, common, what | {"chosen": on_evaluation})
    )
    spread = what | {"standard_deviation": outcome.grid[1], "points": len(outcome.points)}
    lines.append(_result(f"{outcome.method}/grid_mean/top1", outcome.grid[0], first, outcome, common, spread))
    there = {_identity(line) for line in read(file)} if file.is_file() else set()
    append(file, [line for line in lines if _identity(line) not in there])


def _result(
    metric: str, value: float, seed: int, outcome: Outcome, common: dict[str, Any], config: dict[str, Any]
) -> Result:
    return Result(
        evaluator="transfer", metric=metric, value=value, n=outcome.images, seed=seed, config=config, **common
    )


def _identity(line: Result) -> str:
    return json.dumps(asdict(line) | {"time": ""}, sort_keys=True)


def write_summary(file: Path, outcomes: Sequence[Outcome], settings: dict[str, Any]) -> None:
    content = settings | {
        "sets": [
            asdict(one) | {"chosen": one.chosen, "score": one.score, "best": one.best, "grid": one.grid}
            for one in outcomes
        ],
        "mean": fmean(one.score for one in outcomes),
    }
    write_bytes(file, (json.dumps(content, indent=1) + "\n").encode())


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A row per set, and their mean."""
    width = max(12, *(len(one.name) for one in outcomes))
    yield (
        f"{'top-1, %':<{width}} {'chosen':>14} {'lr':>8} {'wd':>6} {'held out':>9} "
        f"{'best on evaluation*':>20} {'grid mean ± sd':>15} {'n':>8}"
    )
    for one in outcomes:
        values = [value for _, value in one.scores]
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        told = f"{100 * one.score:.1f}{spread}"
        grid = f"{100 * one.grid[0]:.1f} ± {100 * one.grid[1]:.1f}"
        held = 100 * fmean(one.at(one.chosen, "held_out"))
        yield (
            f"{one.name:<{width}} {told:>14} {one.chosen[0]:>8g} {one.chosen[1]:>6g} {held:>9.1f} "
            f"{100 * fmean(one.at(one.best)):>20.1f} {grid:>15} {one.images:>8,}"
        )
    if len(outcomes) > 1:
        best = fmean(fmean(one.at(one.best)) for one in outcomes)
        mean = f"{100 * fmean(one.score for one in outcomes):.1f}"
        yield f"{f'mean of {len(outcomes)} sets':<{width}} {mean:>14} {'':>25} {100 * best:>20.1f}"
    yield "* the best point on the evaluation data itself, as the papers report: too high by choice;"
    yield "  it and the grid's mean are of trainings without the held-out pictures"
