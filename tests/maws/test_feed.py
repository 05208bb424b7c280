"""Worker processes: they change nothing, die without harm, and never outlive the training."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from processes import children, is_alive
from torch.testing import assert_close

from data_pipeline.errors import DataError
from data_pipeline.shardset import ShardSet
from maws import stages
from maws.config import ConfigError, override
from maws.data import feed as feed_module
from maws.data.feed import Feed
from maws.data.loader import StepDataset
from maws.data.order import Part


def dataset(stage: str, shards: ShardSet, tmp_path, part: Part = Part()) -> StepDataset:
    module = stages.load(stage)
    cfg = override(module.PRESETS["debug"], [f"data.shards={shards.path}"])
    return module.dataset(module.prepare(cfg, shards, tmp_path), shards, tmp_path, part)


class Made:
    """Stands for a StepDataset: batches that say who made them, and what may go wrong."""

    def __init__(self, trouble=None) -> None:
        self.trouble = trouble or (lambda step: None)

    def reach(self, step: int) -> None:
        pass

    def __getitem__(self, step: int):
        self.trouble(step)
        grid = torch.arange(12, dtype=torch.float64).reshape(3, 4) * step
        return {
            "keys": [f"k{step}"], "image": grid.t(), "flag": torch.tensor([True, False]), "none": torch.empty(0, 5),
            "bad": [], "maker": os.getpid(),
        }  # fmt: skip


def same(a, b) -> bool:
    assert list(a) == list(b)
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert_close(value, b[name], rtol=0, atol=0)
        elif name != "maker":
            assert value == b[name]
    return True


@pytest.mark.parametrize("stage", ["mae", "wsp"])
def test_a_batch_is_the_same_whoever_makes_it_and_from_wherever_the_feed_comes(stage, shards, tmp_path):
    data = dataset(stage, shards, tmp_path, Part(1, 2))
    alone = [data[step] for step in range(9)]
    for workers in (0, 1, 2, 3):
        feed = Feed(data, 2, 9, workers, restarts=1, prefetch=2)
        assert all(same(feed.next()[0], alone[step]) for step in (2, 3))
        feed.go_to(1)
        assert all(same(feed.next()[0], alone[step]) for step in (1, 2, 3, 4))
        if workers:
            os.kill(feed.workers[0].pid, signal.SIGKILL)
        assert all(same(feed.next()[0], alone[step]) for step in (5, 6, 7, 8))
        feed.close()


def test_tensors_of_every_kind_travel_unchanged_and_stay_when_their_worker_is_gone():
    feed = Feed(Made(), 0, 4, 2)
    kept = [feed.next()[0] for _ in range(4)]
    makers = {batch["maker"] for batch in kept}
    feed.close()
    assert len(makers) == 2 and os.getpid() not in makers and not any(map(is_alive, makers))
    assert all(same(batch, Made()[step]) for step, batch in enumerate(kept))
    kept[3]["image"] += 1  # nobody else sees it
    assert same(kept[2], Made()[2])


def test_a_killed_worker_is_replaced_told_and_counted():
    told = []
    feed = Feed(Made(), 0, 99, 2, restarts=2, prefetch=2, restarted=lambda step, facts: told.append((step, facts)))
    for death in (1, 2):
        os.kill(feed.workers[1].pid, signal.SIGKILL)
        while len(told) < death:  # what it had made is used before its death is noticed
            due = feed.step
            assert feed.next()[0]["keys"] == [f"k{due}"]
        assert told[-1] == (due, {"worker": 1, "why": "was killed by SIGKILL (out of memory?)", "restarts": death})
        assert due % 2 == 1
    os.kill(feed.workers[0].pid, signal.SIGKILL)
    with pytest.raises(
        DataError, match=r"loader worker 0 was killed by SIGKILL .* at step \d+; 2 were replaced before"
    ):
        for _ in range(9):
            feed.next()
    feed.close()


def test_a_batch_that_kills_every_worker_ends_the_run_and_names_the_step():
    def trouble(step):
        if step == 3:
            os._exit(7)

    feed = Feed(Made(trouble), 0, 9, 2, restarts=3)
    with pytest.raises(DataError, match=r"ended with exit code 7 at step 3; .*maws ledger RUN --step 3"):
        for _ in range(9):
            feed.next()
    assert feed.step == 3 and feed.deaths == 4
    feed.close()


def test_a_worker_without_memory_is_replaced():
    def trouble(step):
        if step == 1:
            raise MemoryError

    feed = Feed(Made(trouble), 0, 4, 1, restarts=1)
    assert feed.next()[0]["keys"] == ["k0"]
    with pytest.raises(DataError, match="exit code 1 at step 1; 1 were replaced"):
        feed.next()
    feed.close()


class Picky(ConfigError):
    """An error whose constructor wants other things than a text."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_what_a_worker_meets_reaches_the_user_as_it_is(caplog):
    def trouble(step):
        if step == 1:
            raise Picky(1, 2)
        if step == 2:
            raise DataError("the set is damaged")
        if step == 3:
            raise ZeroDivisionError("by nought")

    feed = Feed(Made(trouble), 0, 9, 2)
    feed.next()
    with pytest.raises(Picky, match=r"^1 and 2$"):
        feed.next()
    for step, message in (
        (2, "^the set is damaged$"),
        (3, "^the batch of step 3 could not be made: ZeroDivisionError"),
    ):
        feed.go_to(step)
        with pytest.raises(DataError, match=message):
            feed.next()
    feed.close()
    assert "in trouble" in caplog.text  # the program's own mistakes come with their traceback


def test_signals_to_the_whole_group_are_not_for_workers():
    feed = Feed(Made(), 0, 90, 2, prefetch=1)
    feed.next()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for worker in feed.workers:
            os.kill(worker.pid, number)
    assert [feed.next()[0]["keys"] for _ in range(6)] == [[f"k{step}"] for step in range(1, 7)]
    assert feed.deaths == 0
    feed.close()


class Slow(Made):
    def __getitem__(self, step: int):
        time.sleep(60 if step > 3 else 0.3 * (step == 1))  # killed while at step 1; busy when the training process dies
        return super().__getitem__(step)


def training(told: Connection) -> None:
    """A training process with two feeds; one worker was forked last and inherits the sockets of all others."""
    feeds = [Feed(Slow(), 0, 99, 2, restarts=1), Feed(Slow(), 0, 99, 2)]
    os.kill(feeds[0].workers[1].pid, signal.SIGKILL)
    while not feeds[0].deaths:
        feeds[0].next()
    told.send([worker.pid for feed in feeds for worker in feed.workers])
    time.sleep(60)


def test_no_worker_is_left_when_the_training_process_is_killed():
    told, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=training, args=(theirs,))
    parent.start()
    workers = told.recv()
    assert len(workers) == 4 and all(map(is_alive, workers))
    parent.kill()
    parent.join()
    until = time.monotonic() + 5
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))


def test_a_feed_that_nobody_uses_any_more_leaves_no_process_behind():
    before = set(children(os.getpid()))
    feed = Feed(Made(), 0, 90, 2)
    assert len(set(children(os.getpid())) - before) == 2
    del feed
    assert set(children(os.getpid())) == before


def test_on_a_device_the_next_batch_is_pinned_while_a_step_runs(monkeypatch):
    """There is none here: the thread is real, the copy is a plain one."""
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(feed_module, "pin", lambda batch: pinned.append(batch["keys"][0]) or batch)
    feed = Feed(Made(), 0, 8, 2, restarts=1)
    assert feed.next()[0]["keys"] == ["k0"]
    until = time.monotonic() + 5
    while pinned != ["k0", "k1"] and time.monotonic() < until:
        time.sleep(0.01)
    assert pinned == ["k0", "k1"]  # one ahead and no more
    feed.go_to(5)
    os.kill(feed.workers[0].pid, signal.SIGKILL)
    assert [feed.next()[0]["keys"][0] for _ in range(3)] == ["k5", "k6", "k7"]
    feed.close()


def test_workers_use_one_thread_each():
    class Threads(Made):
        def __getitem__(self, step: int):
            return {"keys": [str(torch.get_num_threads())], "bad": [], "draw": np.random.default_rng(step).random()}

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    feed = Feed(Threads(), 0, 2, 1)
    assert feed.next()[0]["keys"] == ["1"] and torch.get_num_threads() == 2
    feed.close()
    torch.set_num_threads(before)
