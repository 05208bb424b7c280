"""`python -m maws watch`: reads only what is new, says how a run is doing, and draws what was logged."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from maws import follow, watch
from maws.config import ConfigError
from maws.follow import Curve, Followed, Tail

NOW = 1_800_000_000.0


def append(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def make_run(folder, steps=40, age=3.0):
    """A run that logged every tenth step, 5 seconds apart, the last line `age` seconds before NOW."""
    append(folder / "events.jsonl", {"event": "start", "step": 0, "time": NOW - 500, "of": 80, "ranks": 2,
                                     "launcher": "torchrun"})  # fmt: skip
    for step in range(10, steps + 1, 10):
        append(
            folder / "metrics.jsonl",
            {
                "step": step, "time": NOW - age - (steps - step) / 2, "train/loss": 5 - step / 10, "train/lr": 1e-3,
                "train/images_per_second": 321.4, "data/wait_share": 0.0123, "train/grad_norm": None,
                "memory/process_gib": 1.25, "run/goodput": 0.875, "run/seconds_left": 75.0,
            },
        )  # fmt: skip
    config = {"stage": "mae", "model": {"variant": "nano"}, "optim": {"length": "80 steps"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shown(runs, now=NOW, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(watch.frame(runs, now))
    return console.export_text()


# ------------------------------------------------------------------------------------------------------------- reading


def test_each_look_gives_the_whole_lines_that_are_new(tmp_path):
    path = tmp_path / "x.jsonl"
    tail = Tail(path)
    assert list(tail.look()) == []
    append(path, {"step": 1}, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3')
    assert [e["step"] for e in tail.look()] == [1, 2]
    with path.open("a") as file:
        file.write("}\n")
    assert [e["step"] for e in tail.look()] == [3]
    assert list(tail.look()) == []


def test_only_the_new_part_of_a_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    append(path, *({"step": i} for i in range(1000)))
    tail = Tail(path)
    assert len(list(tail.look())) == 1000
    append(path, {"step": 1000})
    seen = []
    monkeypatch.setattr(follow, "_object", lambda line: seen.append(line))
    assert list(tail.look()) == [] and len(seen) == 1


@pytest.mark.parametrize("longer", [False, True])
def test_a_file_that_was_written_anew_is_read_from_its_beginning(tmp_path, longer):
    """Also when it is longer than the old one was by the time somebody looks."""
    path = tmp_path / "x.jsonl"
    append(path, {"step": 1, "v": 1}, {"step": 2, "v": 1})
    tail = Tail(path)
    list(tail.look())
    path.unlink()
    append(path, *({"step": i, "v": 2} for i in range(1, 9 if longer else 2)))
    assert [e["v"] for e in tail.look()] == [2] * (8 if longer else 1)


def test_lines_that_are_not_objects_with_a_step_are_passed_over(tmp_path):
    (tmp_path / "x").write_text('7\n{"a": 1}\n\x00\xff\n{"step": "1"}\n{"step": 1}\n', encoding="latin-1")
    assert [e["step"] for e in Tail(tmp_path / "x").look()] == [1]


def test_a_curve_of_any_length_is_kept_short_with_its_shape():
    curve = Curve()
    for i in range(50_000):
        curve.add(i)
    points = curve.points()
    assert follow.POINTS / 2 <= len(points) <= follow.POINTS
    assert points[0] < 50 and points[-1] > 49_900
    assert points == sorted(points)


def test_a_run_that_was_set_back_shows_its_new_steps_only(tmp_path):
    run = Followed(make_run(tmp_path / "a"))
    run.look()
    assert run.curve("train/loss") == [4, 3, 2, 1]
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(lines))
    append(tmp_path / "a" / "metrics.jsonl", {"step": 30, "time": NOW, "train/loss": 9.0})
    run.look()
    assert run.curve("train/loss") == [4, 3, 9] and run.step == 30


# --------------------------------------------------------------------------------------------------------------- state


def test_a_run_is_running_while_lines_come_and_silent_when_they_stop_coming(tmp_path):
    run = Followed(make_run(tmp_path / "a", age=3))
    run.look()
    assert run.state(NOW) == ("running", "running, last line 3 s ago")
    assert run.state(NOW + 30).mood == "running"
    assert run.state(NOW + 600) == ("silent", "silent for 10 min: killed, or hanging")


def test_lines_that_usually_come_slowly_are_waited_for_longer(tmp_path):
    run = Followed(make_run(tmp_path / "a"))
    for i in range(1, 12):
        append(tmp_path / "a" / "metrics.jsonl", {"step": 40 + i, "time": NOW + 120 * i})
    run.look()
    assert run.state(NOW + 120 * 11 + 600).mood == "running"
    assert run.state(NOW + 120 * 11 + 1300).mood == "silent"


@pytest.mark.parametrize(
    ("event", "mood", "words"),
    [
        ({"event": "done"}, "done", "done"),
        ({"event": "stop", "code": 75}, "stopped", "stopped at step 40: asked to stop and saved, to be requeued"),
        ({"event": "stop", "code": 130}, "stopped", "stopped at step 40: Ctrl-C, saved"),
        ({"event": "start"}, "running", "running, last line 0 s ago"),
    ],
)
def test_how_a_run_ended_is_said_in_words(tmp_path, event, mood, words):
    run = Followed(make_run(tmp_path / "a"))
    append(tmp_path / "a" / "events.jsonl", {"step": 40, "time": NOW + 9000, **event})
    run.look()
    assert run.state(NOW + 9000) == (mood, words)


def test_an_older_run_without_events_is_done_when_it_has_a_release(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "events.jsonl").unlink()
    run = Followed(folder)
    run.look()
    assert run.state(NOW).mood == "running" and run.total() == 80
    append(folder / "release" / "config.json", {})
    assert run.state(NOW).mood == "done"


def test_the_length_in_epochs_of_a_run_without_events_comes_from_its_epochs_so_far(tmp_path):
    (tmp_path / "config.json").write_text('{"optim": {"length": "4 epochs"}}')
    append(tmp_path / "metrics.jsonl", {"step": 30, "time": NOW, "train/epoch": 1.5})
    run = Followed(tmp_path)
    run.look()
    assert run.total() == 80


# ------------------------------------------------------------------------------------------------------------- drawing


def test_a_frame_shows_what_was_logged(tmp_path):
    folder = make_run(tmp_path / ("long_" * 20 + "name"))
    append(folder / "events.jsonl", {"event": "save", "step": 20, "time": NOW},
           {"event": "rewind", "step": 33, "to": 20, "why": "loss is nan", "time": NOW},
           {"event": "start", "step": 20, "time": NOW, "of": 80, "ranks": 4, "launcher": "srun"})  # fmt: skip
    append(folder / "events.jsonl", {"event": "worker_restart", "step": 22, "time": NOW},
           {"event": "save_failed", "step": 30, "time": NOW, "failure": "the disk is full"})  # fmt: skip
    append(folder / "quarantine.jsonl", {"step": 1, "key": "k"}, {"step": 2, "key": "l"})
    append(folder / "metrics.jsonl", {"step": 40, "probe/knn_top1": 0.25, "probe/knn_chance": 0.031})
    text = shown([Followed(folder)])
    for said in (
        "long_name  MAE nano",
        "step 40 of 80", "50 %", "1.0000", "1.00e-03", "321", "1.2%", "goodput 87.5%", "75 s left",
        "1.2 GiB", "4 ranks (srun)", "1 restart ·", "1 rewind ·", "2 bad samples", "checkpoint at step 20",
        "set back from step 33 to 20: loss is nan", "25.0% (chance 3.1%)",
        "1 worker restart · 1 failed save", "the newest save failed: the disk is full",
    ):  # fmt: skip
        assert said in text, said
    assert "grad norm" not in text  # it was never a number


def test_a_run_that_is_not_there_yet_is_followed_once_it_is(tmp_path):
    run = Followed(tmp_path / "a")
    assert "not there yet" in shown([run])
    (tmp_path / "a").mkdir()
    assert "no config.json yet" in shown([run])
    (tmp_path / "a" / "config.json").write_text('{"stage": "mae"}')
    assert "starting" in shown([run])
    make_run(tmp_path / "a")
    assert "step 40 of 80" in shown([run])


def test_runs_stand_side_by_side_where_there_is_room(tmp_path):
    runs = [Followed(make_run(tmp_path / name)) for name in "ab"]
    beside, below = shown(runs, width=2 * watch.WIDTH + 2), shown(runs, width=watch.WIDTH)
    assert sum("step 40" in line for line in beside.splitlines()) == 1
    assert sum("step 40" in line for line in below.splitlines()) == 2


def test_bars_are_as_high_as_their_values_and_a_spike_does_not_flatten_the_rest():
    assert watch.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == watch.BARS
    assert watch.sparkline([1, 1, 1], 8) == watch.BARS[3] * 3
    assert watch.sparkline([], 8) == ""
    spiky = [float(i % 8) for i in range(40)]
    spiky[17] = 1e9
    assert watch.sparkline(spiky, 40)[:8] == watch.BARS
    assert len(watch.sparkline(list(range(1000)), 34)) == 34


def test_dots_lie_where_the_values_are():
    rows, low, high = watch.dots([0.0, 1.0], width=1, height=2)
    assert (low, high) == (0.0, 1.0)
    assert rows == [chr(0x2800 + 0x08), chr(0x2800 + 0x40)]  # right column at the very top, left one at the very bottom


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_starts_fast_prints_a_frame_and_needs_no_torch(tmp_path):
    make_run(tmp_path / "a")
    code = "import sys; from maws.__main__ import main; sys.exit(main(sys.argv[1:]) + ('torch' in sys.modules))"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "watch", str(tmp_path / "a"), "--once"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "step 40 of 80" in done.stdout
    assert time.perf_counter() - began < 5  # 0.3 s when the machine is idle


@pytest.mark.timeout(60)
@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_ends_it_quietly(tmp_path, terminal):
    make_run(tmp_path / "a")
    command = [sys.executable, "-m", "maws", "watch", str(tmp_path / "a"), "--interval", "0.05"]
    env = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | ({"FORCE_COLOR": "1"} if terminal else {})
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert watching.stdout is not None and watching.stdout.readline()  # the first frame is out
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=30)
    finally:
        watching.kill()
    assert (watching.returncode, err) == (0, "")


def test_an_interval_of_nothing_is_refused():
    from maws.__main__ import parser

    with pytest.raises(ConfigError, match="must be a number of seconds above 0"):
        watch.run(parser().parse_args(["watch", "runs/a", "--interval", "0"]))
