"""Metrics: every writer holds each step once, whatever a run went through, and none of them stops a training."""

import importlib
import json
import logging
import sys
import time
from typing import Any

import pytest

from maws import stages, telemetry
from maws.config import ConfigError, LogConfig, override
from maws.log import JsonLines, Metrics, duration

FAKE_WANDB = """
import json, os, pathlib, time
CALLS = []
class Run:
    def define_metric(self, name, step_metric=None): CALLS.append(("define", name, step_metric))
    def log(self, values): CALLS.append(("log", values))
    def finish(self): CALLS.append(("finish",))
def init(**options):
    CALLS.append(("init", options))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name that keeps what it is told."""
    folder = tmp_path / "library" / "wandb"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"stage": "mae"}')
    return folder


def settings(*more):
    return override(stages.preset("mae", "debug"), more)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["train/loss"] for line in lines(run)}


# -------------------------------------------------------------------------------------------------------- metrics.jsonl


def test_each_step_is_one_object_with_its_time(run):
    metrics = Metrics(run, settings(), 0)
    before = time.time()
    metrics.write(10, {"train/loss": 1.5, "data/bad_samples": 3})
    metrics.close()
    (line,) = lines(run)
    assert {k: v for k, v in line.items() if k != "time"} == {"step": 10, "train/loss": 1.5, "data/bad_samples": 3}
    assert before - 0.01 <= line["time"] <= time.time() + 0.01


def test_a_value_that_is_not_finite_is_null(run):
    metrics = Metrics(run, settings(), 0)
    metrics.write(1, {"a": float("nan"), "b": float("-inf"), "c": 0.0})
    metrics.close()
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert [lines(run)[0][k] for k in "abc"] == [None, None, 0.0]


def test_lines_after_the_step_that_is_resumed_from_are_dropped(run):
    first = Metrics(run, settings(), 0)
    for step in (10, 20, 30):
        first.write(step, {"train/loss": 1.0})
    first.close()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed while writing it
    second = Metrics(run, settings(), 20)
    second.write(30, {"train/loss": 2.0})
    second.close()
    assert losses(run) == {10: 1.0, 20: 1.0, 30: 2.0}


def test_lines_after_the_step_that_a_run_is_set_back_to_are_dropped(run):
    metrics = Metrics(run, settings(), 0)
    for step in (10, 20, 30):
        metrics.write(step, {"train/loss": 1.0})
    metrics.go_to(10)
    metrics.write(20, {"train/loss": 3.0})
    metrics.close()
    assert losses(run) == {10: 1.0, 20: 3.0}


def test_a_line_is_in_the_file_as_soon_as_it_is_written(run):
    metrics = Metrics(run, settings(), 0)
    metrics.write(1, {"train/loss": 1.0})
    assert losses(run) == {1: 1.0}
    metrics.close()


def test_on_a_full_disk_lines_are_lost_and_never_halved(run, caplog):
    metrics = Metrics(run, settings(), 0)
    metrics.write(1, {"train/loss": 1.0})
    writer = metrics.writers[0]
    assert isinstance(writer, JsonLines)
    real: Any = writer._file

    class Full:
        def write(self, data):
            return real.write(data[:7])

        def __getattr__(self, name):
            return getattr(real, name)

    writer._file = Full()  # type: ignore[assignment]
    metrics.write(2, {"train/loss": 2.0})
    metrics.write(3, {"train/loss": 3.0})
    writer._file = real
    metrics.write(4, {"train/loss": 4.0})
    metrics.close()
    assert losses(run) == {1: 1.0, 4: 4.0}
    assert [r.message for r in caplog.records if "could not be written" in r.message] == [
        f"step 2 could not be written to {run / 'metrics.jsonl'}: the disk is full; training goes on"
    ]


# --------------------------------------------------------------------------------------------------------- TensorBoard


def scalars(run, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(name)}


def test_tensorboard_shows_each_step_once_after_a_resume_and_a_rewind(run):
    pytest.importorskip("tensorboard")
    cfg = settings("log.tensorboard=yes")
    first = Metrics(run, cfg, 0)
    for step in (10, 20, 30):
        first.write(step, {"train/loss": 1.0, "words": "left out"})
    first.close()
    second = Metrics(run, cfg, 20)
    second.write(30, {"train/loss": 2.0})
    second.write(40, {"train/loss": 2.0})
    second.go_to(30)
    second.write(40, {"train/loss": 3.0})
    second.close()
    assert scalars(run, "train/loss") == {10: 1.0, 20: 1.0, 30: 2.0, 40: 3.0}
    assert losses(run) == scalars(run, "train/loss")


@pytest.mark.parametrize(("setting", "library"), [("log.tensorboard=yes", "tensorboard"), ("log.wandb=birds", "wandb")])
def test_a_library_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch, setting, library):
    monkeypatch.setattr(telemetry.importlib.util, "find_spec", lambda name: None if name == library else object())
    with pytest.raises(ConfigError) as error:
        telemetry.check(settings(setting).log)
    assert str(error.value) == f"{setting} needs {library}, which is not installed: pip install 'maws-open[{library}]'"
    telemetry.check(LogConfig())


# ---------------------------------------------------------------------------------------------------- Weights & Biases


def test_wandb_gets_every_line_under_one_id_that_a_resumed_run_keeps(run, wandb):
    for start in (0, 20):
        metrics = Metrics(run, settings("log.wandb=birds"), start)
        metrics.write(start + 10, {"train/loss": 1.0})
        metrics.close()
    inits = [call[1] for call in wandb.CALLS if call[0] == "init"]
    assert [i["project"] for i in inits] == ["birds", "birds"] and inits[0]["config"] == {"stage": "mae"}
    assert inits[0]["id"] == inits[1]["id"] == (run / "wandb_id").read_text().strip()
    assert all(i["resume"] == "allow" and i["dir"] == str(run) for i in inits)
    assert [c[1] for c in wandb.CALLS if c[0] == "log"] == [
        {"step": 10, "train/loss": 1.0},
        {"step": 30, "train/loss": 1.0},
    ]
    assert ("define", "*", "step") in wandb.CALLS and wandb.CALLS[-1] == ("finish",)


@pytest.mark.parametrize("failure", [RuntimeError("no network"), SystemExit(1)])
def test_without_a_network_training_goes_on_with_a_warning(run, wandb, caplog, failure):
    def init(**_):
        raise failure

    wandb.init = init
    metrics = Metrics(run, settings("log.wandb=birds"), 0)
    for step in range(1, 4):
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    assert losses(run) == {1: 1.0, 2: 1.0, 3: 1.0}
    assert f"Weights & Biases failed and is left out from now on: {failure}" in caplog.messages


def test_a_network_that_hangs_costs_lines_and_no_time(run, wandb, caplog, monkeypatch):
    import threading

    answer = threading.Event()
    wandb.init = lambda **_: answer.wait(30)
    monkeypatch.setattr(telemetry, "WAITING", 5)
    monkeypatch.setattr(telemetry, "CLOSING", 0.05)
    began = time.perf_counter()
    metrics = Metrics(run, settings("log.wandb=birds"), 0)
    for step in range(1, 101):
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    assert time.perf_counter() - began < 5
    assert len(lines(run)) == 100
    assert any("lines did not reach Weights & Biases" in message for message in caplog.messages)
    answer.set()


def test_a_writer_that_fails_is_left_out_and_the_others_go_on(run, caplog):
    class Broken:
        calls = 0

        def write(self, step, values):
            self.calls += 1
            raise ValueError("cannot")

        def go_to(self, step): ...
        def close(self): ...

    metrics = Metrics(run, settings(), 0)
    metrics.writers.insert(0, broken := Broken())
    with caplog.at_level(logging.WARNING):
        metrics.write(1, {"train/loss": 1.0})
        metrics.write(2, {"train/loss": 1.0})
    metrics.close()
    assert broken.calls == 1 and losses(run) == {1: 1.0, 2: 1.0}
    assert caplog.messages == ["Broken failed and is left out from now on: cannot"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (83.9, "1:23"), (7384, "2:03:04"), (86400 * 3 + 7380, "3 d 02:03")]
)
def test_durations_are_short_and_exact(seconds, words):
    assert duration(seconds) == words
