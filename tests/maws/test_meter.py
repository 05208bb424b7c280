"""The meter: means, speeds and shares of made-up times, a time left that does not jump, and a past that is not lost."""

import json
import logging
import math
from itertools import pairwise

import pytest
import torch

from maws import meter as module
from maws.history import goodput, useful_seconds
from maws.meter import Meter, Past, peak_flops, peak_memory


class Clock:
    """Time as the test wants it; both of the clocks that the meter looks at."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def perf_counter(self):
        return self.now

    time = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def make(clock, **changes):
    given = {"batch_size": 32, "total": 1000, "start": 0, "past": Past(0.0, clock.now), **changes}
    return Meter(**given)


def steps(meter, clock, number, seconds=0.5, waited=0.1, loss=1.0):
    for _ in range(number):
        clock.now += seconds
        meter.add({"loss": loss}, waited)


def test_speed_waiting_and_means_are_those_of_the_steps_since_the_last_line(clock):
    meter = make(clock)
    steps(meter, clock, 3, loss=100.0)
    meter.report()
    clock.now += 0.25
    meter.add({"loss": 1.0, "hit": 0.0}, 0.05)
    clock.now += 0.75
    meter.add({"loss": 3.0, "hit": 1.0}, 0.15)
    values = meter.report()
    assert values["train/loss"] == 2.0 and values["train/hit"] == 0.5
    assert values["train/images_per_second"] == 64.0  # 2 steps of 32 in one second
    assert values["train/step_ms"] == 500.0
    assert values["data/wait_ms"] == 100.0 and values["data/wait_share"] == 0.2
    assert meter.report() == {}


def test_what_happens_between_steps_is_not_in_the_speed(clock):
    meter = make(clock)
    steps(meter, clock, 4)
    clock.now += 60  # a checkpoint
    meter.aside()
    steps(meter, clock, 4)
    assert meter.report()["train/step_ms"] == 500.0


def test_model_flops_utilisation_is_the_share_of_the_peak_that_the_images_need(clock):
    meter = make(clock, flops=3e9, peak_flops=1e12)
    steps(meter, clock, 2, seconds=0.25)
    assert meter.report()["train/mfu"] == pytest.approx(128 * 3e9 / 1e12, abs=1e-4)
    assert "train/mfu" not in (steps(other := make(clock, flops=3e9), clock, 2), other.report())[1]


def test_a_peak_is_the_settings_or_that_of_the_gpus_data_sheet(monkeypatch, caplog):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert peak_flops(cpu, "fp32") == 0.0 and peak_flops(cpu, "fp32", 0.5) == 0.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(gpu, "bf16") == 989e12 and peak_flops(gpu, "fp32") == 67e12
    assert peak_flops(gpu, "bf16", 1000.0) == 1e15
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 9")
    with caplog.at_level(logging.INFO):
        assert peak_flops(gpu, "bf16") == 0.0
    assert "peak speed of Abacus 9 is not known" in caplog.text


def test_goodput_is_the_share_of_the_time_since_the_first_start_that_went_into_steps(clock):
    meter = make(clock, start=100, past=Past(useful=50.0, began=clock.now - 100))
    steps(meter, clock, 20)  # 10 seconds
    clock.now += 10
    meter.aside()
    steps(meter, clock, 20)  # 10 seconds
    assert meter.report()["run/goodput"] == pytest.approx(70 / 130, abs=1e-4)


def test_steps_that_are_taken_again_do_not_count_twice(clock):
    meter = make(clock)
    steps(meter, clock, 100)  # 50 seconds
    meter.go_to(40)
    steps(meter, clock, 60)  # 30 seconds
    assert meter.report()["run/goodput"] == pytest.approx(50 / 80, abs=1e-3)
    assert meter.step == 100


def test_after_a_rewind_the_means_are_of_the_new_steps(clock):
    meter = make(clock)
    steps(meter, clock, 5, loss=math.nan)
    meter.go_to(0)
    steps(meter, clock, 5, loss=2.0)
    assert meter.report()["train/loss"] == 2.0


def test_the_time_left_is_that_of_the_steps_left(clock):
    meter = make(clock, start=200)
    clock.now += 30
    meter.add({"loss": 1.0}, 0)  # compiling and the like: says nothing of the others
    steps(meter, clock, 99)
    assert meter.report()["run/seconds_left"] == pytest.approx(700 * 0.5, rel=1e-6)


def test_the_time_left_does_not_jump_when_a_checkpoint_is_written(clock):
    meter = make(clock, total=100_000)
    left = []
    for _ in range(20):
        steps(meter, clock, 100)
        left.append(meter.report()["run/seconds_left"])
        clock.now += 5  # 5 seconds in 50: a tenth of the time
        meter.aside()
    changes = [(a - b) / a for a, b in pairwise(left[5:])]
    assert all(-0.01 < change < 0.02 for change in changes)
    assert left[-1] == pytest.approx((100_000 - 2000) * 0.55, rel=0.01)


def test_the_time_left_follows_a_lasting_change_of_speed(clock):
    meter = make(clock, total=100_000)
    steps(meter, clock, 1000, seconds=0.5)
    steps(meter, clock, 3000, seconds=1.0)  # five horizons
    assert meter.report()["run/seconds_left"] == pytest.approx(96_000 * 1.0, rel=0.02)


def test_memory_is_the_peak_of_this_process():
    name, before = peak_memory(torch.device("cpu"))
    ballast = torch.zeros(1 << 26).fill_(1.0)  # 256 MiB that are really there
    after = peak_memory(torch.device("cpu"))[1]
    del ballast
    assert name == "memory/process_gib"
    assert 0.1 < before <= after <= before + 0.4
    assert peak_memory(torch.device("cpu"))[1] > after - 0.01  # it stays; Linux counts in batches of pages


def test_the_most_of_all_ranks_is_told(clock, monkeypatch):
    monkeypatch.setattr(module.dist, "largest", lambda values, device: [2 * values[0], 7.5])
    meter = make(clock)
    steps(meter, clock, 2)
    values = meter.report()
    assert values["memory/process_gib"] == 7.5 and values["data/wait_ms"] == 200.0


# ---------------------------------------------------------------------------------------------------------------- past


def test_a_resumed_run_knows_what_its_earlier_steps_took(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, ms in ((10, 500.0), (20, 700.0), (25, 600.0), (30, 9000.0)):
            file.write(json.dumps({"step": step, "train/step_ms": ms}) + "\n")
            file.write(json.dumps({"step": step, "probe/knn_top1": 0.1}) + "\n")
        file.write('{"step": 40, "trai')
    (tmp_path / "events.jsonl").write_text('{"event": "start", "step": 0, "time": 123.5}\n{"event": "sta')
    past = Past.of(tmp_path, start=25)
    assert past.useful == pytest.approx(10 * 0.5 + 10 * 0.7 + 5 * 0.6)
    assert past.began == 123.5


def test_a_run_without_a_past_begins_now(tmp_path, clock):
    assert Past.of(tmp_path, 0) == Past(0.0, clock.now)


def test_what_a_meter_reports_adds_up_to_the_time_of_its_steps(clock):
    meter = make(clock)
    lines = []
    for number in (1, 7, 10):
        steps(meter, clock, number, seconds=0.1 * number)
        lines.append({"step": meter.step, **meter.report()})
    assert useful_seconds([], lines) == pytest.approx(meter.useful) == pytest.approx(0.1 + 4.9 + 10)


def test_goodput_so_far_is_what_the_runs_files_say_afterwards(clock):
    """Through a rewind: step 25 is left out from then on, and steps 20 to 24 are taken again."""
    meter = make(clock)
    events = [{"event": "start", "step": 0, "time": clock.now}]
    lines = []

    def go(to):
        while meter.step < to:
            if meter.step == 25 and len(events) > 1:
                meter.skip()
            steps(meter, clock, 1, seconds=0.3)
            if meter.step % 10 == 0:
                lines.append({"step": meter.step, "time": clock.now, **meter.report()})

    go(25)
    clock.now += 0.3  # the step that is not finite
    events.append({"event": "rewind", "step": 25, "to": 20, "time": clock.now})
    meter.go_to(20)
    go(60)
    assert lines[-1]["run/goodput"] == pytest.approx(goodput(events, lines), abs=0.01)
    assert lines[-1]["run/goodput"] < 0.95


# ---------------------------------------------------------------------------------------------------------------- line


def test_the_line_says_what_was_measured(clock, caplog):
    meter = make(clock, flops=3e9, peak_flops=1e12, past=Past(0.0, clock.now - 100))
    steps(meter, clock, 200)
    values = meter.report() | {"train/lr": 1.5e-4, "probe/knn_top1": 0.231, "probe/knn_chance": 0.02}
    with caplog.at_level(logging.INFO):
        meter.say(200, values)
    memory = values["memory/process_gib"]
    assert caplog.messages == [
        "step 200/1000 (20%)  loss 1.0000  lr 1.50e-04  64 images/s  data wait 100 ms (20%)  MFU 19.2%  "
        f"{memory:.1f} GiB  knn top1 23.1%  6:40 left  goodput 50%"
    ]


def test_people_get_a_line_every_two_seconds_and_the_last_one(clock, caplog):
    meter = make(clock)
    with caplog.at_level(logging.INFO):
        for done in (100, 200, 300, 999, 1000):
            steps(meter, clock, 10, seconds=0.07)
            meter.say(done, meter.report() | {"train/lr": 0.0})
    assert [m.split()[1] for m in caplog.messages] == ["100/1000", "999/1000", "1000/1000"]
