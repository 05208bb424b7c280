"""Builds that are killed at any moment, in any part, end with the bytes of one that never was."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import children, is_alive, processes

from data_pipeline.shardset import ShardSet

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the workers")

ROOT = Path(__file__).parents[2]
TARGETS = ("everything", "parent", "workers", "one worker")


@pytest.fixture(scope="module")
def corpus(make, tmp_path_factory) -> Path:
    """Rows and files, good and bad, in more tasks than there are workers."""
    folder = tmp_path_factory.mktemp("kills") / "in"
    rows = make.rows(40)
    for number, row in enumerate(rows):
        if number % 10 == 3:
            row["image"] = row["image"][:100]
        if number % 10 == 7:
            row["caption"] = "nothing to see"
        if number % 10 == 9:
            row["key"] = rows[number - 5]["key"]
    make.parquet(folder / "a.parquet", rows, row_group_size=8)
    make.folder(folder / "photos", 20)
    (folder / "photos" / "photo03.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def whole(make, corpus, tmp_path_factory) -> tuple[dict[str, str], float]:
    """The files of a build that was never killed, and how long it took."""
    output = tmp_path_factory.mktemp("whole") / "shards"
    start = time.monotonic()
    process = started(corpus, output)
    assert process.wait(120) == 0
    return make.hashes(output), time.monotonic() - start


@pytest.mark.timeout(600)  # some seconds alone; but every build here starts three processes
def test_a_build_killed_at_random_moments_ends_byte_identical(make, corpus, whole, tmp_path):
    killed_until_done(make, corpus, whole, tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_at_random_moments(make, corpus, whole, tmp_path):
    killed_until_done(make, corpus, whole, tmp_path, kills=50, seed=2)


def killed_until_done(make, corpus: Path, whole: tuple[dict[str, str], float], folder: Path, kills: int, seed: int):
    """Kill that many times; a build that gets through is compared and the next begins; the last is left in peace."""
    expected, seconds = whole
    draw = random.Random(seed)
    done = finished = 0
    while done < kills:
        output = folder / f"shards{finished}"
        while not (output / "manifest.json").exists() or (output / ".work").exists():
            process = started(corpus, output)
            if done < kills and has_run_for(process, draw.uniform(0, 1.2 * seconds)):
                kill(process, TARGETS[done % len(TARGETS)], draw)
                done += 1
            code = process.wait(120)
            assert code in (0, -signal.SIGKILL), "a build that lost only workers finishes by itself"
        finished += 1
        assert make.hashes(output) == expected
        assert_each_record_once(output, corpus)
    assert not list(processes_on(corpus))


def assert_each_record_once(output: Path, corpus: Path) -> None:
    shards = ShardSet.open(output)
    keys = [shards.record(n, row)["key"] for n, size in enumerate(shards.shard_sizes) for row in range(size)]
    rows = {f"k{n:03d}" for n in range(40) if n % 10 not in (3, 7, 9)}
    assert sorted(keys) == sorted(rows | {f"photos/photo{n:02d}" for n in range(20) if n != 3})
    counts = shards.manifest["counts"]
    assert counts["read"] == 60 == len(keys) + sum(counts["dropped"].values())


def started(corpus: Path, output: Path) -> subprocess.Popen[bytes]:
    arguments = ["build", "--input", str(corpus), "--output", str(output), "--workers", "2", "--samples-per-shard", "8"]
    command = [sys.executable, "-m", "data_pipeline", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
    )


def has_run_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """False if it ended before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def kill(process: subprocess.Popen[bytes], target: str, draw: random.Random) -> None:
    if target == "everything":
        os.killpg(process.pid, signal.SIGKILL)
        return
    workers = sorted(children(process.pid))
    if target == "parent":
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(is_alive, workers)), "workers end when their parent was killed"
        return
    for worker in workers if target == "workers" else draw.sample(workers, min(1, len(workers))):
        os.kill(worker, signal.SIGKILL)


def processes_on(corpus: Path) -> Iterator[int]:
    """Those that name the corpus on their command line."""
    for process in processes():
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(corpus) in command and is_alive(process):
            yield process
