"""What a run's events say: what is left out, where the learning rate is lower, and how much of the time was of use."""

import json

import pytest

from maws.history import History, goodput, lost_steps, read, restarts


def rewind(step: int, to: int, time: float = 0.0, factor: float = 0.5, until: int = 0) -> dict:
    return {"event": "rewind", "step": step, "to": to, "time": time, "lr_factor": factor, "lr_until": until}


def start(step: int, time: float, **facts) -> dict:
    return {"event": "start", "step": step, "time": time, **facts}


def line(step: int, ms: float, time: float = 0.0) -> dict:
    return {"step": step, "train/step_ms": ms, "time": time}


def test_events_come_back_and_half_a_line_of_a_killed_writer_costs_only_itself(tmp_path):
    first = History(tmp_path)
    first.start(0, ranks=2)
    first.add("save", 4)
    with first.path.open("a") as f:
        f.write('{"event": "rewind", "st')
    second = History(tmp_path)
    second.add("stop", 7, code=75)
    assert [e["event"] for e in History(tmp_path).events] == ["start", "save", "stop"]
    assert second.events == read(second.path)


def test_what_is_no_event_is_passed_over(tmp_path):
    lines = ["[1]", "7", '"start"', "{}", '{"event": "start"}', '{"event": 3, "step": 1, "time": 2}', "\xff", "",
             '{"event": "start", "step": "1", "time": 2}', '{"event": "start", "step": 1, "time": 2}']  # fmt: skip
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\xfe\xff\n" + "\n".join(lines).encode())
    assert read(path) == [start(1, 2)]
    assert read(tmp_path / "none") == []


def test_rewinds_say_which_steps_are_left_out_and_where_the_learning_rate_is_lower(tmp_path):
    events = [rewind(48, 40, until=60), rewind(55, 50, factor=0.1, until=52), rewind(48, 40, until=40)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    history = History(tmp_path)
    assert [s for s in range(100) if history.skips(s)] == [48, 55]
    factors = {s: history.lr_factor(s) for s in range(100)}
    assert all(factors[s] == 1 for s in [*range(40), *range(60, 100)])
    assert all(factors[s] == 0.5 for s in [*range(40, 50), *range(52, 60)])
    assert factors[50] == factors[51] == pytest.approx(0.05)
    assert [history.updates(s) for s in (48, 49, 55, 56, 99)] == [48, 48, 54, 54, 97]  # 48 is one step


def test_of_a_run_without_faults_all_time_but_saving_counts():
    """20 steps of 2 s; 4 s of saving in between."""
    events = [
        start(0, 100.0),
        {"event": "save", "step": 10, "time": 125.0},
        {"event": "done", "step": 20, "time": 144.0},
    ]
    metrics = [line(10, 2000, 120.0), line(20, 2000, 144.0), {"step": 20, "probe/knn": 0.5, "time": 144.0}]
    assert goodput(events, metrics) == pytest.approx(40 / 44)


def test_lost_steps_start_up_and_waiting_do_not_count():
    """Begun at 0; killed at step 17, 34 s later; started again after 66 s from step 10; done at 130."""
    events = [start(0, 0.0), start(10, 100.0, reached=17), {"event": "done", "step": 20, "time": 130.0}]
    metrics = [line(5, 2000, 10.0), line(10, 2000, 20.0), line(15, 2000, 112.0), line(20, 2000, 130.0)]
    assert goodput(events, metrics) == pytest.approx(40 / 130)
    assert goodput(events, metrics, now=400.0) == pytest.approx(40 / 400)
    assert restarts(events) == 1
    assert lost_steps(events) == 7


def test_a_rewind_loses_the_steps_back_to_the_snapshot_and_leaves_one_out():
    """Steps 0-11 in 12 s, back to 10, left out 11, then 10 and 12-19 in 9 s."""
    events = [start(0, 0.0), rewind(11, 10, 12.0, until=20), {"event": "done", "step": 20, "time": 21.0}]
    metrics = [line(10, 1000, 10.0), line(20, 1000, 21.0)]
    assert goodput(events, metrics) == pytest.approx((10 + 9) / 21)
    assert lost_steps(events) == 2 and restarts(events) == 0


def test_a_run_that_has_only_begun_has_no_goodput_yet():
    assert goodput([], []) == goodput([start(0, 5.0)], [{"step": 1, "train/loss": 2.0}]) == 0.0
    assert restarts([]) == lost_steps([]) == 0


def test_a_start_says_how_far_the_run_had_come(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"step": 3')
    history = History(tmp_path)
    history.start(16, ranks=1)
    assert lost_steps(history.events) == 4
