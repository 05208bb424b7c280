"""Saves that training does not wait for, that fail without harm, and that a kill at any moment does not break."""

import errno
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import StateOnly, make_saver, names, save_steps
from ranks import run_ranks
from safetensors.torch import load_file

from maws import checkpoint, manifest, save_job
from maws.checkpoint import CheckpointError
from maws.config import CheckpointConfig, ConfigError
from maws.retention import Retention
from maws.save_job import Facts, Job
from maws.saver import Saver
from maws.tensor_file import specs_of, write_tensors

BIG = {"big": (1 << 18,)}  # one megabyte


def saved(run: Path, step: int, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:07}" / f"rank_{rank:05}.safetensors")


class Gate:
    """A writer that waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun = threading.Event(), threading.Event()
        monkeypatch.setattr(save_job, "write_tensors", self.write)

    def write(self, *args: Any) -> tuple[int, str]:
        self.begun.set()
        assert self.open.wait(20)
        return write_tensors(*args)


class TestAsynchronous:
    def test_training_goes_on_while_a_slow_save_writes_what_was_there_when_it_began(self, tmp_path, monkeypatch):
        gate, engine = Gate(monkeypatch), StateOnly()
        saver = make_saver(engine, tmp_path)
        before = engine.local_state()
        saver.save(3, {})
        assert gate.begun.wait(5)
        for _ in range(100):
            engine.step()
        assert checkpoint.complete(tmp_path / "checkpoints") == []
        gate.open.set()
        saver.finish()
        assert all(torch.equal(saved(tmp_path, 3)[k], v) for k, v in before.items())
        assert not engine.has(saved(tmp_path, 3))

    def test_the_next_save_waits_for_it_and_training_was_held_up_as_long_as_is_said(self, tmp_path, monkeypatch):
        gate, engine = Gate(monkeypatch), StateOnly()
        saver = make_saver(engine, tmp_path)
        saver.save(1, {})
        assert saver.blocked_seconds < 0.2
        threading.Timer(0.3, gate.open.set).start()
        engine.step()
        saver.save(2, {})
        assert 0.2 < saver.blocked_seconds < 5
        assert (tmp_path / "checkpoints" / "step_0000001" / "manifest.json").exists()
        saver.finish()
        assert engine.has(saved(tmp_path, 2)) and not engine.has(saved(tmp_path, 1))

    def test_memory_of_the_first_copy_serves_all(self, tmp_path):
        engine = StateOnly()
        saver = make_saver(engine, tmp_path)
        places = []
        for step in (1, 2, 3):
            saver.save(step, {})
            places.append([t.data_ptr() for t in saver._host.values()])
        saver.finish()
        assert places[0] == places[1] == places[2]

    def test_without_it_the_checkpoint_stands_when_save_returns(self, tmp_path):
        engine = StateOnly()
        make_saver(engine, tmp_path, asynchronous=False).save(1, {})
        assert engine.has(saved(tmp_path, 1)) and names(tmp_path) == ["latest", "step_0000001"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """The system refuses files above half a megabyte in this process: a real error from a real write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFailures:
    def test_a_write_that_the_system_refuses_leaves_the_checkpoint_before_it(self, tmp_path, caplog, small_disk):
        save_steps(tmp_path, 1)
        saver = make_saver(StateOnly(sizes=BIG), tmp_path)
        saver.save(2, {})
        with pytest.raises(CheckpointError, match=r"step 2 could not be written \(rank 0: EFBIG, File too large"):
            saver.finish()
        assert names(tmp_path) == ["latest", "step_0000001"]
        assert checkpoint.find(tmp_path, "latest").name == "step_0000001"  # type: ignore[union-attr]
        assert "the one before it stays whole. Make room on the disk" in caplog.text

    def test_a_full_disk_is_said_and_the_next_save_is_tried(self, tmp_path, caplog):
        engine = save_steps(tmp_path, 1)
        saver = make_saver(engine, tmp_path)
        full = tmp_path / "checkpoints" / f"tmp-step_0000002.{saver._token}-1"
        full.mkdir()
        (full / "rank_00000.safetensors").symlink_to("/dev/full")  # every write to it fails with ENOSPC
        saver.save(2, {})
        saver.save(3, {})  # where training goes on, and learns of it
        assert "ENOSPC, No space left on device" in saver.failure and "tries again at the next" in caplog.text
        saver.finish()
        assert saver.failure == "" and names(tmp_path) == ["latest", "step_0000001", "step_0000003"]
        assert Path("/dev/full").is_char_device()

    def test_a_folder_that_cannot_be_made_is_a_failure_with_its_path(self, tmp_path):
        (tmp_path / "checkpoints").write_text("a file")
        saver = make_saver(StateOnly(), tmp_path)
        saver.save(1, {})
        with pytest.raises(CheckpointError, match=f"{tmp_path}/checkpoints"):
            saver.finish()

    def test_a_fault_of_our_own_in_the_thread_does_not_pass_for_a_checkpoint(self, tmp_path, monkeypatch):
        monkeypatch.setattr(save_job, "specs_of", lambda tensors: {})
        monkeypatch.setattr(save_job, "write_tensors", lambda *args: 1 / 0)
        saver = make_saver(StateOnly(), tmp_path)
        saver.save(1, {})
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            saver.finish()
        assert names(tmp_path) == []

    @pytest.mark.parametrize("note", ["", '{"error": "ENOSPC, No space left on device"}'])
    def test_a_rank_that_is_silent_or_failed_is_named(self, tmp_path, note):
        facts = Facts(4, 0, 3, {}, {})
        job = Job(tmp_path, "t", facts, {"a": torch.ones(2)}, Retention(1), patience=0.1)
        job.tmp.mkdir()
        (job.tmp / "rank_00001.json").write_text(json.dumps({"name": "x", "bytes": 1, "sha256": "0"}))
        if note:
            (job.tmp / "rank_00002.json").write_text(note)
        job.start()
        failure = job.outcome({}).failure
        assert "rank 2: ENOSPC" in failure if note else "rank 2 has not said within 0.1 s" in failure
        assert list(tmp_path.iterdir()) == []

    def test_a_rank_whose_failure_is_known_is_not_waited_for(self, tmp_path):
        job = Job(tmp_path, "t", Facts(4, 0, 2, {}, {}), {"a": torch.ones(2)}, Retention(1), patience=60)
        job.start()
        begun = time.monotonic()
        assert "rank 1: its disk is gone" in job.outcome({1: "its disk is gone"}).failure
        assert time.monotonic() - begun < 5


class Killed(BaseException):
    """Not an Exception: nothing of ours may catch it, like SIGKILL."""


class Killer:
    """Ends a save at one of its calls of the system: opening, renaming, removing, making folders."""

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
    countdown: float = float("inf")

    @classmethod
    def listen(cls, event: str, args: tuple[Any, ...]) -> None:
        if event in cls.EVENTS and cls.countdown != float("inf"):
            if cls.countdown == 0:
                raise Killed
            cls.countdown -= 1


@pytest.fixture(scope="module", autouse=True)
def killer() -> None:
    sys.addaudithook(Killer.listen)  # for good: there is no taking it back, but it sleeps until it is set


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_killed_at_any_moment_of_a_save_the_run_has_a_whole_checkpoint(tmp_path, again):
    """Every call of the file system in turn is the last; then a resume, and a save that clears up."""
    save_steps(tmp_path / "before", 5, *([10] if again else []))
    for moment in range(1000):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(moment))
        engine = StateOnly(seed=3)
        engine.step()
        job = Job(run / "checkpoints", "t", Facts(10, 0, 1, about(engine), {}), engine.local_state(), Retention(2), 1.0)
        Killer.countdown = moment
        try:
            job.run()
            done = True
        except Killed:
            done = False
        finally:
            Killer.countdown = float("inf")
        checkpoint.recover(run / "checkpoints")
        found = checkpoint.find(run, "latest")
        assert found is not None and found.name in ("step_0000005", "step_0000010")
        assert not again or found.name == "step_0000010", moment
        assert not done or engine.has(saved(run, 10))
        save_steps(run, 15)
        assert names(run)[-1] == "step_0000015" and not [n for n in names(run) if n.startswith("tmp")]
        if done:
            break
    assert moment > 8


def about(engine: StateOnly) -> dict[str, Any]:
    return {**checkpoint.contents(engine), "order": "same"}  # type: ignore[arg-type]


class TestRetention:
    def test_newest_round_and_best_ones_stay(self):
        losses = {10: 5.0, 20: 1.0, 30: 4.0, 40: 3.0, 50: float("nan"), 60: 2.0}
        assert Retention(2).kept(losses, 60) == {50, 60}
        assert Retention(1, every=20).kept(losses, 60) == {20, 40, 60}
        assert Retention(1, best="train/loss").kept(losses, 60) == {20, 60}
        assert Retention(1, best="probe/knn").kept(losses, 60) == {10, 60}

    def test_of_equally_good_ones_the_newest_is_the_best(self):
        assert Retention(1, best="train/loss").kept({1: 2.0, 2: 2.0, 3: 9.0}, 3) == {2, 3}

    def test_what_was_just_written_stays_also_after_going_back_before_others(self):
        assert Retention(1).kept({5: 0.0, 8: 0.0, 20: 0.0}, 8) == {8, 20}

    def test_a_run_keeps_what_it_says(self, tmp_path):
        engine = StateOnly()
        saver = make_saver(engine, tmp_path, keep=1, keep_best="train/loss")
        saver.retention = Retention(1, every=4, best="train/loss")
        for step, loss in enumerate([9.0, 3.0, 1.0, 2.0, 5.0, 4.0, 6.0], 1):
            saver.save(step, {"train/loss": loss, "train/lr": 0.1})
        saver.finish()
        assert names(tmp_path) == ["latest", "step_0000003", "step_0000004", "step_0000007"]

    def test_one_that_is_being_read_stays_until_the_save_after(self, tmp_path):
        save_steps(tmp_path, 1)
        with manifest.reading(tmp_path / "checkpoints" / "step_0000001"):
            save_steps(tmp_path, 2, 3, keep=1)
            assert names(tmp_path) == ["latest", "step_0000001", "step_0000003"]
        save_steps(tmp_path, 4, keep=1)
        assert names(tmp_path) == ["latest", "step_0000004"]

    def test_a_metric_that_is_not_measured_is_refused_at_the_first_save_with_those_that_are(self, tmp_path):
        saver = make_saver(StateOnly(), tmp_path, keep_best="train/los")
        with pytest.raises(
            ConfigError, match=r"keep_best=train/los is not measured by this run; did you mean train/loss\?"
        ):
            saver.save(1, {"train/loss": 1.0, "train/lr": 0.1})
        assert names(tmp_path) == ["latest", "step_0000001"]  # nothing of the run is lost

    @pytest.mark.parametrize(("settings", "message"), [
        ({"keep": 0}, "checkpoint.keep=0 must be at least 1"), ({"keep_best": "loss"}, r"must be a metric train/…"),
    ])  # fmt: skip
    def test_rules_that_cannot_be_followed_are_refused_before_the_first_step(self, tmp_path, settings, message):
        with pytest.raises(ConfigError, match=message):
            make_saver(StateOnly(), tmp_path, **settings)

    def test_the_best_by_a_probe_needs_one(self):
        cfg = CheckpointConfig(keep_best="probe/knn_top1")
        assert Retention.of(cfg, 6, probed=True) == Retention(2, 6, "probe/knn_top1")
        with pytest.raises(ConfigError, match=r"keep_best=probe/knn_top1 needs a probe: set probe\.every"):
            Retention.of(cfg, 0, probed=False)


def test_the_file_is_the_formats_own_and_its_hash_is_right(tmp_path):
    tensors = {
        "flags": torch.tensor([True, False, True]), "count": torch.tensor(7), "half": torch.randn(3, 5).bfloat16(),
        "none": torch.zeros(0, 4), "double": torch.randn(2, dtype=torch.float64), "view": torch.randn(4, 6).T[1:],
    }  # fmt: skip
    specs = specs_of(tensors)
    size, digest = write_tensors(tmp_path / "a", specs, ((n, tensors[n]) for n in specs), {"format": "pt"})
    assert (size, digest) == ((tmp_path / "a").stat().st_size, manifest.sha256(tmp_path / "a"))
    read = load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())


# On two ranks.
def on_two_ranks(place: str) -> dict[str, Any]:
    import torch.distributed as td

    td.init_process_group("gloo")
    run, rank = Path(place), td.get_rank()
    begun = time.perf_counter()
    engine = StateOnly()
    saver = make_saver(engine, run)
    found: dict[str, Any] = {"failures": [], "finish": []}

    def attempt(step: int, failing: int | None, act: Callable[[], object] = lambda: None) -> None:
        save_job.write_tensors = out_of_space if failing == rank else write_tensors  # type: ignore[assignment]
        engine.step()
        saver.save(step, {})
        act()
        try:
            saver.finish()
            found["finish"].append("")
        except CheckpointError as error:
            found["finish"].append(str(error))
        found["failures"].append(saver.failure)

    attempt(1, None)
    attempt(2, failing=1)
    attempt(3, failing=0)
    found["after"] = names(run)
    td.barrier()  # the other rank begins the next save
    sums = torch.zeros(1)
    attempt(4, None, lambda: [td.all_reduce(sums.fill_(rank + 1.0)) for _ in range(50)])  # while the threads write
    found["sum"] = float(sums)
    read: list[str] = []
    manifest.sha256 = lambda path: read.append(path.name) or real_sha256(path)  # type: ignore[assignment]
    whole = checkpoint.find(run, "latest")
    found["hashed"], found["whole"] = list(read), whole and whole.name
    (run / "checkpoints" / "step_0000004" / "rank_00001.safetensors").write_bytes(b"")
    td.barrier()
    older = checkpoint.find(run, "latest")
    found["older"] = older and older.name
    fresh = StateOnly(seed=9)
    checkpoint.load(fresh, run / "checkpoints" / "step_0000001", "same")  # type: ignore[arg-type]
    found["loaded"] = {k: v.tolist() for k, v in fresh.loaded.items()}
    return found | {"seconds": time.perf_counter() - begun}


real_sha256 = manifest.sha256


def out_of_space(path: Path, *rest: Any) -> tuple[int, str]:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.timeout(120)
def test_on_two_ranks(tmp_path, subtests):
    first, second = run_ranks("test_saver", "on_two_ranks", tmp_path, place=str(tmp_path / "run"))
    with subtests.test("a failure on one rank is known to both, hangs neither, and the next save stands"):
        assert first["failures"] == second["failures"] and first["finish"] == second["finish"]
        none, other, own, last = first["failures"]
        assert none == last == "" and "rank 1: ENOSPC" in other and "rank 0: ENOSPC" in own
        assert first["after"] == ["latest", "step_0000001"]
        assert [bool(e) for e in first["finish"]] == [False, True, True, False]
        assert first["seconds"] < 15  # and not the patience of 20 s
    with subtests.test("collectives of training and threads of saving do not meet"):
        assert first["sum"] == second["sum"] == 3.0
    with subtests.test("each rank hashes its share of the files"):
        assert sorted(first["hashed"] + second["hashed"]) == [
            "rank_00000.safetensors", "rank_00001.safetensors", "state.json"
        ]  # fmt: skip
        assert first["whole"] == second["whole"] == "step_0000004"
        assert second["hashed"] and first["older"] == second["older"] == "step_0000001"
    with subtests.test("both parts together are the state, for two ranks and for one"):
        engine = StateOnly()
        engine.step()
        alone = StateOnly(seed=9)
        checkpoint.load(alone, tmp_path / "run" / "checkpoints" / "step_0000001", "same")  # type: ignore[arg-type]
        assert engine.has(alone.loaded)
        for key, value in engine.whole.items():
            both = [torch.tensor(rank["loaded"][key]) for rank in (first, second)]
            assert torch.equal(torch.cat(both)[: value.numel()], value.flatten())


def test_a_save_is_an_event_of_the_run(tmp_path):
    from maws.history import History

    history = History(tmp_path)
    cfg: Any = CheckpointConfig()
    saver = Saver(StateOnly(), tmp_path / "checkpoints", cfg, {"order": "same"}, history=history)  # type: ignore[arg-type]
    saver.save(7, {})
    saver.finish()
    (event,) = history.events
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoints" / "step_0000007").iterdir() if p.stem != "manifest")
    assert event["event"] == "save" and event["step"] == 7 and event["bytes"] == size
