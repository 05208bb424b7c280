"""A rank killed in the middle of a save: the checkpoint before it is whole, and is the one that is resumed."""

import json
from pathlib import Path

import pytest
from sabotage import dying
from training import arguments, forked, losses

from maws import checkpoint, manifest
from maws.launch import start_ranks

pytestmark = pytest.mark.timeout(600)  # real processes: seconds on an idle machine, minutes on a busy one
SHORT = ("optim.length=6 steps", "checkpoint.every=2 steps")
# Where it dies in the save of step 4, and the step that a resume finds: a save that was whole counts.
MOMENTS = {"part": 2, "manifest": 4, "latest": 4, "prune": 4}


def whole(run: Path) -> list[int]:
    """Steps of the checkpoints that nothing is wrong with."""
    found = checkpoint.complete(run / "checkpoints")
    return [checkpoint.step_of(path) for path in found if not manifest.problems(path)]


def events(run: Path, name: str) -> list[dict]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, shards_path) -> dict[int, float]:
    run = tmp_path_factory.mktemp("straight") / "run"
    with start_ranks(1, arguments("mae", run, shards_path, *SHORT), log=run.parent / "log", starter=forked) as ranks:
        assert ranks.wait(170) == [0], ranks.printed()
    return losses(run)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_in_a_save_loses_no_checkpoint(moment, straight, shards_path, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    asked = arguments("mae", run, shards_path, *SHORT, "--resume", "auto")
    with start_ranks(1, asked, log=log, starter=dying(moment, time=2)) as ranks:
        assert ranks.wait(170) == [-9], ranks.printed()
    assert 2 in whole(run) and not (run / "release").exists()
    with start_ranks(1, asked, log=log, starter=forked) as ranks:
        assert ranks.wait(170) == [0], ranks.printed()
    assert [e["step"] for e in events(run, "start")] == [0, MOMENTS[moment]]
    assert losses(run) == straight  # to the bit
    assert whole(run)[-1] == 6 and not list((run / "checkpoints").glob("tmp-*"))


@pytest.mark.slow
def test_twelve_random_kills(tmp_path, shards_path):
    import sys

    from forks import TESTS

    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    import kills

    try:
        report = kills.harness(shards_path, tmp_path, kills=12, real=0, seed=3)
    finally:
        sys.path.remove(str(TESTS.parent / "benchmarks"))
    assert len(report.kills) >= 12 and not report.wrong, report.wrong
