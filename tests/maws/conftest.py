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


def chain(root: Path, sets: dict[str, Path], ranks: int) -> dict[str, Path]:
    """Every stage's debug preset, trained in turn."""
    runs = {stage: root / stage for stage in BEFORE}
    sources = {stage: ["--init-from", str(runs[before])] if before else [] for stage, before in BEFORE.items()}
    train_in_turn([arguments(stage, run, sets[stage], *sources[stage]) for stage, run in runs.items()], ranks)
    return runs


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sets: dict[str, Path]) -> dict[str, Path]:
    """Every stage's debug preset, trained once in one process: wsp from mae, lit from that."""
    return chain(tmp_path_factory.mktemp("runs"), sets, ranks=1)


@pytest.fixture(scope="session")
def trained_on_two(tmp_path_factory: pytest.TempPathFactory, sets: dict[str, Path]) -> dict[str, Path]:
    """The same on two ranks."""
    return chain(tmp_path_factory.mktemp("runs_on_two"), sets, ranks=2)
