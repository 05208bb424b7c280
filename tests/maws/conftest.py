"""Shard sets and trained runs that the tests of training share."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import BEFORE, LABELLED, Training, arguments, build_shards, train_in_turn

from data_pipeline.shardset import ShardSet
from maws.twin_data import make_shards


@pytest.fixture(scope="session")
def shards_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def shards(shards_path: Path) -> ShardSet:
    return ShardSet.open(shards_path)


@pytest.fixture
def start() -> Iterator[Callable[..., Training]]:
    """Start a training; whatever is left of it is killed when the test ends."""
    started: list[Training] = []

    def _start(*args: Any, **kwargs: Any) -> Training:
        started.append(Training(*args, **kwargs))
        return started[-1]

    yield _start
    for training in started:
        training.signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def labelled_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set with one class for each of its pictures."""
    return make_shards(tmp_path_factory.mktemp("labelled") / "shards")


@pytest.fixture(scope="session")
def sets(shards_path: Path, labelled_path: Path) -> dict[str, Path]:
    """What each stage is trained on."""
    return {stage: labelled_path if stage in LABELLED else shards_path for stage in BEFORE}


class Chain(dict[str, Path]):
    """Every stage's debug preset, trained in turn in the same processes; `later` stages are when they are asked for."""

    def __init__(self, root: Path, sets: dict[str, Path], ranks: int, later: tuple[str, ...] = ()) -> None:
        self.root, self.sets, self.ranks = root, sets, ranks
        self.train([stage for stage in BEFORE if stage not in later])

    def train(self, stages: list[str]) -> None:
        runs = {stage: self.root / stage for stage in stages}
        source = {s: ["--init-from", str(self.root / BEFORE[s])] if BEFORE[s] else [] for s in stages}
        train_in_turn([arguments(s, run, self.sets[s], *source[s]) for s, run in runs.items()], self.ranks)
        self.update(runs)

    def __missing__(self, stage: str) -> Path:
        self.train([stage])
        return self[stage]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sets: dict[str, Path]) -> dict[str, Path]:
    """Every stage's debug preset, trained once in one process: wsp from mae, lit from that."""
    return Chain(tmp_path_factory.mktemp("runs"), sets, ranks=1)


@pytest.fixture(scope="session")
def trained_on_two(tmp_path_factory: pytest.TempPathFactory, sets: dict[str, Path]) -> dict[str, Path]:
    """The same on two ranks. LC-MAE takes as long as four others, and only slow tests ask for it: test_momentum.py."""
    return Chain(tmp_path_factory.mktemp("runs_on_two"), sets, ranks=2, later=("lc_mae",))
