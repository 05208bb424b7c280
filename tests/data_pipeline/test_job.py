"""A worker that dies costs the record that killed it: everything else comes through, on every runner."""

import os
import resource
import signal
import time
from pathlib import Path

import mishaps
import pytest

from data_pipeline import job as jobs
from data_pipeline.errors import DataError
from data_pipeline.job import Job, Records, Task, gaps
from data_pipeline.runners import Call
from data_pipeline.runners.local import LocalRunner
from data_pipeline.watch import Limits

NUMBERS = list(range(100, 109))
REASONS = {
    "killed": "killed_worker",
    "segfault": "killed_worker",
    "exit": "killed_worker",
    "hang": "timed_out",
    "memory": "out_of_memory",
}


@pytest.fixture
def runner():
    with LocalRunner(2, Limits(seconds=0.5, memory=1 << 30)) as runner:
        yield runner


def task(folder: Path, number: int, found: dict[int, str], function=mishaps.total, probe=mishaps.probe) -> Task:
    out = folder / f"{number}.txt"
    records = Records(len(NUMBERS), probe, mishaps.describe)
    return Task(function, (NUMBERS, found, out), (out,), len(NUMBERS), records)


def sum_without(*positions: int) -> int:
    return sum(number for at, number in enumerate(NUMBERS) if at not in positions)


@pytest.mark.parametrize("mishap", REASONS)
def test_a_record_that_takes_its_worker_along_costs_itself_only(tmp_path, runner, mishap):
    job = Job(tmp_path / "work", runner)
    counts = job.run("read", [task(tmp_path, 0, {}), task(tmp_path, 1, {5: mishap}), task(tmp_path, 2, {})])
    assert [found["sum"] for found in counts] == [sum_without(), sum_without(5), sum_without()]
    assert counts[1]["dropped"] == {REASONS[mishap]: 1}
    found = job.quarantined("read")
    assert [(one["task"], one["position"], one["reason"], one["key"]) for one in found] == [
        (1, 5, REASONS[mishap], "n105")
    ]


def test_several_of_a_task_and_its_first_and_last_are_found(tmp_path, runner):
    bad = {0: "killed", 1: "exit", 8: "killed"}
    job = Job(tmp_path / "work", runner)
    assert job.run("read", [task(tmp_path, 0, bad)])[0]["sum"] == sum_without(*bad)
    assert [one["position"] for one in job.quarantined("read")] == list(bad)


def test_a_death_between_records_is_traced_by_halving(tmp_path, runner):
    """As when a file of many records is opened: the worker cannot say which of them it was."""
    bad = {3: "killed", 7: "exit"}
    job = Job(tmp_path / "work", runner)
    counts = job.run("read", [task(tmp_path, 0, bad, mishaps.quietly, mishaps.quiet_probe), task(tmp_path, 1, {})])
    assert [found["sum"] for found in counts] == [sum_without(*bad), sum_without()]
    assert [one["position"] for one in job.quarantined("read")] == list(bad)


def test_a_worker_killed_from_outside_costs_nothing(tmp_path, runner):
    job = Job(tmp_path / "work", runner)
    once = {4: f"once:{tmp_path / 'once'}", 7: f"once:{tmp_path / 'twice'}"}
    assert job.run("read", [task(tmp_path, 0, once)])[0]["sum"] == sum_without()
    assert (tmp_path / "twice").exists()
    assert job.quarantined("read") == []


def test_what_was_found_is_never_tried_again(tmp_path, runner):
    """The task fails after its records: it is done again, and the record is not."""
    marks = tmp_path / "marks"
    first = Job(tmp_path / "work", runner)
    with pytest.raises(ZeroDivisionError):
        first.run("read", [task(tmp_path, 0, {5: "killed", -1: "bug"})])
    tried_again = {5: f"once:{marks}"}  # leaves a mark if it is reached
    again = Job(tmp_path / "work", runner)
    assert again.run("read", [task(tmp_path, 0, tried_again)])[0]["sum"] == sum_without(5)
    assert not marks.exists()


def test_a_task_that_dies_of_no_single_record_ends_the_build_with_the_way_out(tmp_path, runner):
    job = Job(tmp_path / "work", runner)
    with pytest.raises(DataError, match=r"lost its worker process 9 times \(SIGKILL\), on no one record.*--workers"):
        job.run("read", [task(tmp_path, 0, {-1: "killed"})])
    with pytest.raises(DataError, match=r"the step merge lost its worker process 3 times"):
        job.run("merge", [Task(mishaps.happen, ("killed",)), Task(mishaps.happen, ("killed",))])


def test_an_input_full_of_such_records_ends_the_build(tmp_path, runner, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_QUARANTINED", 1)
    with pytest.raises(DataError, match="more than 1 records of one input of 9 records end their worker process"):
        Job(tmp_path / "work", runner).run("read", [task(tmp_path, 0, dict.fromkeys(range(9), "exit"))])


def test_an_error_of_ours_ends_the_build_at_once_with_the_place(tmp_path, runner):
    with pytest.raises(ZeroDivisionError, match="a bug of ours") as caught:
        Job(tmp_path / "work", runner).run("read", [task(tmp_path, 0, {2: "bug"})])
    assert "mishaps.py" in "".join(caught.value.__notes__)


def test_an_error_for_the_user_arrives_as_it_was_raised(runner):
    for arguments, kind in [((DataError, "look here"), DataError), ((mishaps.Particular, "a", "b"), RuntimeError)]:
        with pytest.raises(kind, match=r"look here|a and b"):
            list(runner.run([Call(mishaps.refuse, arguments, guarded=True)]))
    assert list(runner.run([Call(mishaps.square, (3,), guarded=True)])) == [(0, 9)]  # and it goes on working


def test_gaps_are_what_is_between():
    for left_out in ([], [0], [5], [0, 5], [1, 2], [0, 1, 2, 3, 4, 5]):
        kept = [at for start, stop in gaps(6, left_out) for at in range(start, stop)]
        assert kept == [at for at in range(6) if at not in left_out]


# ------------------------------------------------------------------------------------------------------- the workers


def test_calls_are_spread_and_each_is_answered_once(runner):
    answers = list(runner.run([Call(mishaps.process_id, (n,)) for n in range(8)]))
    assert sorted(number for number, _ in answers) == list(range(8))
    assert len({process for _, process in answers}) == 2
    assert os.getpid() not in {process for _, process in answers}


def test_one_worker_reads_what_strangers_made_outside_this_process():
    with LocalRunner(1) as runner:
        assert next(runner.run([Call(mishaps.process_id, (0,))]))[1] == os.getpid()
        assert next(runner.run([Call(mishaps.process_id, (0,), guarded=True)]))[1] != os.getpid()
    with LocalRunner(0) as runner:
        assert next(runner.run([Call(mishaps.process_id, (0,), guarded=True)]))[1] == os.getpid()


def test_a_worker_killed_while_idle_is_replaced(runner):
    processes = {process for _, process in runner.run([Call(mishaps.process_id, (n,)) for n in range(8)])}
    for process in processes:
        os.kill(process, signal.SIGKILL)
    time.sleep(0.05)
    job = [Call(mishaps.square, (n,)) for n in range(8)]
    answers = dict(runner.run(job))
    lost = [number for number, answer in answers.items() if not isinstance(answer, int)]
    assert len(lost) <= 2
    assert all(answers[n] == n * n for n in range(8) if n not in lost)
    assert dict(runner.run(job)) == {n: n * n for n in range(8)}


def test_two_workers_cost_less_than_a_second_of_a_core():
    """From nothing to the last answer. Time on the wall would depend on what else this machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with LocalRunner(2) as runner:
        assert dict(runner.run([Call(mishaps.square, (n,)) for n in range(4)])) == {n: n * n for n in range(4)}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
