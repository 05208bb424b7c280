"""Shard sets and trained runs that the tests of training share."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import Training, arguments, build_shards

from data_pipeline.shardset import ShardSet


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
def trained(tmp_path_factory: pytest.TempPathFactory, shards_path: Path) -> dict[str, Path]:
    """The debug chain, trained once in one process: mae, wsp from it, lit from that."""
    root = tmp_path_factory.mktemp("runs")
    runs = {"mae": root / "mae", "wsp": root / "mae_wsp", "lit": root / "lit"}
    previous: list[str] = []
    for stage, run in runs.items():
        codes, printed = Training(arguments(stage, run, shards_path, *previous)).wait()
        assert codes == [0], printed
        previous = ["--init-from", str(run)]
    return runs
