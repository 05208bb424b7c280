"""Real runs on two ranks in which something goes wrong: it is named, the others stop, and the next start goes on."""

import json
import math
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import Training, arguments, losses, metrics

from maws import checkpoint, stages
from maws.data.order import Order
from maws.history import goodput, lost_steps, read

REWIND = ["faults.on_nan=rewind", "faults.snapshot_every=5 steps", "faults.lr_steps=20", "log.every=1", "log.keys=yes"]


def broken(start, run: Path, shards: Path, faults: list, *more: str, ranks: int = 2) -> Training:
    """A training of mae's debug preset (40 steps) with faults, see nan_at.py."""
    return start([arguments("mae", run, shards, *more), faults], ranks=ranks, target="nan_at:train")


def keys_of(run: Path, step: int) -> list[str]:
    """What the ranks say they trained on in a step, in the order of ranks."""
    lines = [json.loads(x) for p in sorted((run / "keys").glob("rank_*.jsonl")) for x in p.read_text().splitlines()]
    assert sum(line["step"] == step for line in lines) == 2
    return [key for line in lines if line["step"] == step for key in line["keys"]]


def lr(step: int) -> float:
    """Of the debug preset at a step, from its closed form: 2 steps of warm-up to 0.002, then half a cosine over 38."""
    return 0.001 * (1 + math.cos(math.pi * (step - 2) / 38))


def test_a_nan_on_one_rank_sets_both_back_and_the_batch_is_left_out(shards_path, shards, tmp_path, start):
    run = tmp_path / "run"
    codes, printed = broken(start, run, shards_path, [["nan", 22, 1]], *REWIND).wait()
    assert codes == [0, 0], printed
    assert "loss is nan at step 22: back to step 20" in printed
    found = losses(run)
    assert sorted(found) == [s for s in range(1, 41) if s != 23]  # metrics count steps from 1
    assert all(map(math.isfinite, found.values()))
    assert keys_of(run, 22) == [] and len(keys_of(run, 21)) == len(keys_of(run, 23)) == 16
    (batch,) = map(json.loads, (run / "quarantine_batches.jsonl").read_text().splitlines())
    cfg = stages.preset("mae", "debug")
    order = Order(shards, cfg.seed, cfg.optim.batch_size, resample=cfg.data.resample, window=cfg.data.window)
    assert batch["step"] == 22 and sorted(batch["keys"]) == sorted(order.keys(22)) and len(batch["keys"]) == 16
    rates = {line["step"] - 1: line["train/lr"] for line in metrics(run) if "train/lr" in line}
    assert all(rates[s] == pytest.approx(lr(s) * (0.5 if s >= 20 else 1)) for s in rates if s >= 2)
    events = read(run / "events.jsonl")
    assert goodput(events, metrics(run)) < 1 and lost_steps(events) == 3


def test_when_a_rank_is_killed_the_other_names_it_and_leaves_within_seconds(shards_path, tmp_path, start):
    run = tmp_path / "run"
    training = broken(start, run, shards_path, [["killed", 12, 1]], "log.every=1", "optim.length=3000 steps")
    pid = training.processes[1].pid
    training.processes[1].wait(120)
    died = time.monotonic()
    codes, printed = training.wait(60)
    assert codes == [1, -signal.SIGKILL], printed
    assert time.monotonic() - died < 10
    assert f"error: rank 1 (host {socket.gethostname()}, pid {pid}) died at step" in printed
    assert "Rank 0 leaves too, at step 12; continue with --resume auto" in printed


def seconds_to_end(training: Training, rank: int, limit: float = 60) -> float:
    began = time.monotonic()
    assert training.processes[rank].wait(limit) is not None
    return time.monotonic() - began


@pytest.mark.slow
def test_rank_0_is_named_as_well(shards_path, tmp_path, start):
    training = broken(start, tmp_path / "run", shards_path, [["killed", 12, 0]], "optim.length=3000 steps")
    codes, printed = training.wait(120)
    assert codes == [-signal.SIGKILL, 1], printed
    assert f"error: rank 0 (host {socket.gethostname()}, pid {training.processes[0].pid}) died at step" in printed


@pytest.mark.slow
def test_an_error_on_one_rank_is_told_to_the_other(shards_path, tmp_path, start):
    codes, printed = broken(start, tmp_path / "run", shards_path, [["raise", 12, 1]]).wait()
    assert codes == [1, 1]
    assert "failed at step 12 (step): ArithmeticError: something went wrong in a forward" in printed
    assert "Traceback" in printed  # of the rank whose error it is


@pytest.mark.slow
def test_a_hung_rank_leaves_the_stacks_of_both_and_ends_the_run(shards_path, tmp_path, start):
    run = tmp_path / "run"
    codes, printed = broken(start, run, shards_path, [["hang", 12, 1]], "faults.hang_seconds=15").wait(90)
    assert codes == [1, 1], printed
    stacks = [(run / "hang" / f"rank_0000{rank}.txt").read_text() for rank in range(2)]
    assert "nan_at.py" in stacks[1] and "in happen" in stacks[1] and "in happen" not in stacks[0]
    assert "in train" in stacks[0]
    assert "no rank has gone on for 15 s" in printed and "at step 12 (step), in nan_at.py" in printed


@pytest.mark.slow
def test_a_stopped_rank_is_named_after_peer_seconds(shards_path, tmp_path, start):
    training = broken(start, tmp_path / "run", shards_path, [["sigstop", 12, 1]], "faults.peer_seconds=5")
    assert seconds_to_end(training, 0) < 45
    training.signal(signal.SIGKILL)
    codes, printed = training.wait()
    assert codes[0] == 1
    assert f"pid {training.processes[1].pid}) has not been heard of for 5 s" in printed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_is_seen_while_the_loss_is(precision, shards_path, tmp_path, start):
    """DeepSpeed leaves such a step out by itself, silently; its norm says so."""
    run = tmp_path / "run"
    settings = [*REWIND, f"engine.precision={precision}", "optim.clip=1"]
    codes, printed = broken(start, run, shards_path, [["gradient", 22, 0]], *settings).wait()
    assert codes == [0, 0], printed
    assert "the gradient's norm is inf at step 22: back to step 20" in printed
    assert all(map(math.isfinite, losses(run).values()))


@pytest.mark.slow
def test_running_statistics_and_means_of_weights_are_put_back_too(shards_path, tmp_path, start):
    """lc_mae has both; without its bad batch it is the same run whether or not the batch broke them."""
    runs = [tmp_path / what for what in ("nan", "statistics")]
    for run in runs:
        given = arguments("lc_mae", run, shards_path, *REWIND, "optim.ema=0.9")
        codes, printed = start([given, [[run.name, 22, 0]]], target="nan_at:train").wait()
        assert codes == [0] and "loss is nan at step 22: back to step 20" in printed, printed
    assert losses(runs[0]) == losses(runs[1]) and all(map(math.isfinite, losses(runs[0]).values()))
    ours, theirs = (load_file(run / "release" / "model.safetensors") for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", ["memory", "disk"])
def test_a_run_that_rewound_and_was_killed_goes_on_as_if_it_had_not_been_killed(snapshot, shards_path, tmp_path, start):
    """Two rewinds; killed between them, right after the second, and again later."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    bad = [["nan", 13, 1], ["spike", 33, -1]]
    settings = [*REWIND, f"faults.snapshot={snapshot}", "checkpoint.every=5 steps", "faults.spike=5"]
    codes, printed = broken(start, straight, shards_path, bad, *settings).wait()
    assert codes == [0, 0] and "times the median" in printed, printed
    for step in (18, 34, 38):
        training = broken(start, killed, shards_path, [*bad, ["killed", step, step % 2]], *settings, "--resume", "auto")
        codes, printed = training.wait()
        assert 1 in codes and -signal.SIGKILL in codes, printed
    codes, printed = broken(start, killed, shards_path, bad, *settings, "--resume", "auto").wait()
    assert codes == [0, 0], printed
    assert losses(killed) == losses(straight)  # to the bit
    assert [s for s in range(1, 41) if s not in losses(killed)] == [14, 34]
    skipped = [[e["step"] for e in read(run / "events.jsonl") if e["event"] == "rewind"] for run in (killed, straight)]
    assert skipped[0] == skipped[1] == [13, 33]


@pytest.mark.slow
def test_too_many_rewinds_end_the_run_with_what_is_needed_to_look_again(shards_path, tmp_path, start):
    run = tmp_path / "run"
    bad = [["nan", step, 0] for step in (12, 13, 14)]
    codes, printed = broken(start, run, shards_path, bad, *REWIND, "faults.max_rewinds=2").wait()
    assert codes == [1, 1]
    assert "loss is nan, after 2 rewinds (faults.max_rewinds), at step 14" in printed
    bundles = [json.loads((run / f"not_finite_step_14_rank_{rank}.json").read_text()) for rank in range(2)]
    assert [len(bundle["keys"]) for bundle in bundles] == [8, 8]


# ------------------------------------------------------------------------------------------------------------- signals
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "left"),
    [
        (["sigterm", "build", 1], [75, 75], "stopped at step 0, before a first one was taken"),
        (["sigint", 0, 0], [130, 130], "saved at step 1"),
        (["sigterm", "save", 1], [75, 75], "saved at step 11"),  # one is on its way to the disk
        (["sigterm", 39, 0], [0, 0], "done:"),  # the last step: nothing is left to do but the release
        (["sigterm", "release", -1], [0, 0], "done:"),
    ],
)
def test_a_signal_at_any_time_is_agreed_upon(fault, codes, left, shards_path, tmp_path, start):
    run = tmp_path / "run"
    ended, printed = broken(start, run, shards_path, [fault], "checkpoint.every=10 steps").wait()
    assert ended == codes and left in printed, printed
    if left.startswith("saved"):
        saved = checkpoint.find(run, "latest")
        assert saved is not None and checkpoint.step_of(saved) == int(left.split()[-1])
    if codes[0]:
        assert read(run / "events.jsonl")[-1]["event"] == "stop"
        assert start(arguments("mae", run, shards_path, "--resume", "auto"), ranks=2).wait()[0] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_cannot_save_leaves_in_time_with_the_last_checkpoint_whole(number, shards_path, tmp_path, start):
    """Rank 1 hangs, so rank 0 is stuck in a collective, where Python sees no signal."""
    run = tmp_path / "run"
    training = broken(start, run, shards_path, [["hang", 12, 1]], "faults.stop_seconds=3", "checkpoint.every=5 steps")
    training.wait_for_steps(run, 1)
    until = time.monotonic() + 60
    while not (run / "checkpoints" / "step_0000010").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(2)
    training.signal(number)
    began = time.monotonic()
    codes, printed = training.wait(60)
    assert time.monotonic() - began < 12
    assert set(codes) <= {1, 75 if number == signal.SIGTERM else 130} and codes != [1, 1], printed
    assert "not saved 3 s (faults.stop_seconds) after the signal to stop" in printed
    found = checkpoint.find(run, "auto")
    assert found is not None and found.name == "step_0000010"


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(shards_path, tmp_path, start):
    run = tmp_path / "run"
    training = broken(start, run, shards_path, [["hang", 12, 1]], "log.every=1")
    training.wait_for_steps(run, 12)
    time.sleep(1)
    for _ in range(2):
        training.signal(signal.SIGINT)
        time.sleep(0.2)
    began = time.monotonic()
    codes, printed = training.wait(60)
    assert time.monotonic() - began < 10
    assert 130 in codes, printed
