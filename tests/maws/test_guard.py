"""A run goes back before a loss that is not finite, and leaves the batch out also when it is started again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maws import checkpoint, guard, manifest
from maws.config import ConfigError, Duration, FaultsConfig
from maws.files import sha256
from maws.guard import Guard, NotFinite, Snapshot
from maws.history import History
from maws.manifest import Entry

REWIND = FaultsConfig(on_nan="rewind", lr_steps=5, max_rewinds=3)


class Weights:
    """Stands for the engine: one number."""

    def __init__(self) -> None:
        self.value, self.steps = 0.0, 0

    def local_state(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        state = into or {"value": torch.zeros(())}
        state["value"].fill_(self.value)
        return state

    def load_local_state(self, state: dict[str, Tensor], steps: int) -> None:
        self.value, self.steps = state["value"].item(), steps


def make(run: Path, cfg: FaultsConfig = REWIND, every: int = 10) -> tuple[Guard, Weights]:
    engine: Any = Weights()
    return Guard(cfg, engine, History(run), run, every), engine


def go(guard: Guard, engine: Weights, begin: int, end: int) -> None:
    """Steps [begin, end) without trouble; the weight counts them."""
    for step in range(begin, end):
        guard.keep(step)
        engine.value = step + 1
        assert guard.trouble(step, {"loss": 1.0}, 1.0) is None


@pytest.mark.parametrize(("loss", "norm", "words"), [
    (float("nan"), 1.0, "loss is nan"), (float("inf"), 1.0, "loss is inf"), (-float("inf"), 1.0, "loss is -inf"),
    (1.0, float("inf"), "the gradient's norm is inf"), (1.0, float("nan"), "the gradient's norm is nan"),
])  # fmt: skip
def test_a_loss_or_a_gradient_that_is_not_finite_is_trouble(tmp_path, loss, norm, words):
    guard, _ = make(tmp_path)
    assert guard.trouble(3, {"loss": loss}, norm) == words
    assert guard.trouble(4, {"loss": 1.0, "accuracy": float("nan")}, 0.0) is None


def test_going_back_restores_the_snapshot_and_leaves_the_batch_out(tmp_path):
    guard, engine = make(tmp_path)
    go(guard, engine, 0, 27)
    assert guard.rewind(27, {"loss": float("nan")}, ["a", "b"], "loss is nan") == 20
    assert engine.value == 20 and engine.steps == 20
    history = History(tmp_path)
    assert history.skips(27) and not history.skips(26)
    assert [history.lr_factor(s) for s in (19, 20, 24, 25)] == [1, 0.5, 0.5, 1]
    (batch,) = map(json.loads, (tmp_path / "quarantine_batches.jsonl").read_text().splitlines())
    assert batch == {"step": 27, "keys": ["a", "b"], "why": "loss is nan"}


def test_trouble_soon_after_going_back_takes_the_snapshot_before(tmp_path):
    """The newest one may have been taken when the damage had begun."""
    guard, engine = make(tmp_path)
    go(guard, engine, 0, 25)
    assert guard.rewind(25, {}, [], "x") == 20
    go(guard, engine, 20, 23)
    assert guard.rewind(23, {}, [], "x") == 10 and engine.value == 10
    go(guard, engine, 10, 34)
    assert [s.step for s in guard.snapshots] == [20, 30]
    assert guard.rewind(34, {}, [], "x") == 30  # a fresh one again
    assert engine.steps == 28  # the optimizer ran in all of 30 steps but 25 and 23


def test_two_snapshots_are_kept_and_the_memory_of_the_oldest_serves_the_next(tmp_path):
    guard, engine = make(tmp_path)
    go(guard, engine, 3, 21)
    assert [(s.step, s.state["value"].item()) for s in guard.snapshots] == [(10, 10), (20, 20)]  # the first one: of 3
    oldest = guard.snapshots[0].state["value"]
    go(guard, engine, 21, 31)
    assert guard.snapshots[1].state["value"] is oldest


def test_without_rewind_no_snapshot_is_taken_and_the_run_stops_with_what_is_needed_to_look_again(tmp_path):
    guard, engine = make(tmp_path, FaultsConfig())
    go(guard, engine, 0, 5)
    assert guard.snapshots == []
    assert guard.trouble(5, {"loss": 1.0}, float("inf"))
    with pytest.raises(NotFinite, match=r"at step 5.*sample keys are in .*The last checkpoint is good"):
        guard.rewind(5, {"loss": 1.0}, ["k1", "k2"], "the gradient's norm is inf")
    bundle = json.loads((tmp_path / "not_finite_step_5_rank_0.json").read_text())
    assert bundle == {"step": 5, "losses": {"loss": "1.0", "grad_norm": "inf"}, "keys": ["k1", "k2"]}
    assert History(tmp_path).rewinds() == []


def test_after_too_many_rewinds_the_run_stops_also_those_of_earlier_starts(tmp_path):
    for step in (5, 15, 25):
        guard, engine = make(tmp_path)
        go(guard, engine, step - 3, step)
        guard.rewind(step, {}, [], "x")
    guard, engine = make(tmp_path)
    go(guard, engine, 30, 35)
    with pytest.raises(NotFinite, match="after 3 rewinds"):
        guard.rewind(35, {}, [], "x")


def test_a_spike_is_measured_against_the_median_of_what_came_before(tmp_path):
    guard, _ = make(tmp_path, dataclasses.replace(REWIND, spike=3.0))
    losses = [1.0, 2.0] * 50 + [4.0] * 60
    found = [guard.trouble(step, {"loss": loss}, 1.0) for step, loss in enumerate(losses)]
    assert not any(found)  # up to 3 times a median of 1.5
    assert guard.trouble(160, {"loss": 12.1}, 1.0) == "loss is 12.1, more than 3 times the median 4 before it"
    assert guard.trouble(161, {"loss": 11.9}, 1.0) is None


def test_the_first_losses_are_no_spike_whatever_they_are(tmp_path):
    guard, _ = make(tmp_path, dataclasses.replace(REWIND, spike=3.0))
    assert not any(guard.trouble(step, {"loss": 10.0**step}, 1.0) for step in range(20))


def test_a_spike_is_one_too_when_the_run_was_killed_and_rewound_before_it(tmp_path):
    cfg = dataclasses.replace(REWIND, spike=3.0)
    guard, engine = make(tmp_path, cfg)
    go(guard, engine, 0, 47)
    guard.rewind(47, {}, [], "x")  # to 40
    for step in range(40, 45):
        guard.trouble(step, {"loss": 2.0}, 1.0)
    with (tmp_path / "losses.jsonl").open("a") as f:
        f.write('{"step": 45, "lo')  # killed here; goes on from 42
    again, _ = make(tmp_path, cfg)
    again.trouble(42, {"loss": 2.5}, 1.0)
    assert list(again.losses or []) == [1.0] * 40 + [2.0, 2.0, 2.5]
    assert "the median 1 before it" in (again.trouble(43, {"loss": 3.1}, 1.0) or "")


def write_checkpoint(run: Path, step: int) -> Path:
    path = run / "checkpoints" / checkpoint.name_of(step)
    path.mkdir(parents=True)
    facts = {"format": checkpoint.FORMAT, "step": step, "ranks": 1, "order": "o", "elements": {}}
    (path / "state.json").write_text(json.dumps(facts))
    (path / "rank_00000.safetensors").write_bytes(b"values")
    manifest.write(path, [Entry(p.name, p.stat().st_size, sha256(p)) for p in path.iterdir()])
    return path


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """A run of 25 steps with checkpoints at 10 and 20 that goes back to those on disk."""
    loaded: list[tuple[str, int]] = []

    def load(engine: Any, path: Path, identity: str, updates: Any) -> int:
        assert identity == "o"
        loaded.append((path.name, updates(checkpoint.step_of(path))))
        return checkpoint.step_of(path)

    monkeypatch.setattr(guard.checkpoint, "load", load)
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    return *make(tmp_path, dataclasses.replace(REWIND, snapshot="disk")), loaded


def test_on_disk_the_newest_whole_checkpoint_is_gone_back_to(on_disk, tmp_path):
    guard, engine, loaded = on_disk
    go(guard, engine, 0, 25)
    assert guard.snapshots == []
    (tmp_path / "checkpoints" / "step_0000020" / "state.json").write_text("{damaged")
    assert guard.rewind(25, {}, [], "x") == 10
    assert loaded == [("step_0000010", 10)]


def test_on_disk_trouble_soon_after_going_back_takes_the_checkpoint_before(on_disk):
    guard, _, loaded = on_disk
    assert guard.rewind(25, {}, [], "x") == 20
    assert guard.rewind(24, {}, [], "x") == 10
    assert loaded == [("step_0000020", 20), ("step_0000010", 10)]


def test_checkpoints_after_the_snapshot_are_of_a_course_that_was_given_up_and_go(on_disk, tmp_path):
    guard, engine, _ = on_disk
    guard.snapshots = [Snapshot(15, engine.local_state())]
    guard.cfg = REWIND
    guard.rewind(25, {}, [], "x")
    assert [p.name for p in checkpoint.complete(tmp_path / "checkpoints")] == ["step_0000010"]


def test_without_a_checkpoint_yet_a_run_that_wants_one_stops(tmp_path):
    guard, _ = make(tmp_path, dataclasses.replace(REWIND, snapshot="disk"))
    with pytest.raises(NotFinite, match=r"set faults\.snapshot=memory"):
        guard.rewind(3, {}, [], "loss is nan")


@pytest.mark.parametrize(("setting", "value"), [
    ("on_nan", "ignore"), ("snapshot", "tape"), ("spike", 0.5), ("spike", -1.0), ("lr_factor", 0.0), ("lr_factor", 2.0),
    ("lr_steps", -1), ("max_rewinds", -1), ("hang_seconds", -1.0), ("peer_seconds", 1.0), ("stop_seconds", 0.0),
])  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused(setting, value):
    with pytest.raises(ConfigError, match=rf"faults\.{setting}={value}.* must be"):
        guard.check(dataclasses.replace(FaultsConfig(), **{setting: value}))


def test_the_settings_of_every_default_are_accepted():
    guard.check(FaultsConfig())
    guard.check(FaultsConfig(on_nan="rewind", snapshot="disk", spike=3.0, snapshot_every=Duration(50, "steps")))
