"""The same bytes on every runner, and Ray where it is installed (`pip install 'maws-open[cluster]'`)."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import mishaps
import pytest
from PIL import Image

from data_pipeline import build
from data_pipeline.job import Job, Records, Task
from data_pipeline.runners.local import LocalRunner
from data_pipeline.sources import Sources
from data_pipeline.steps import Settings
from data_pipeline.watch import Limits

ROOT = Path(__file__).parents[2]

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture
def corpus(make, tmp_path):
    make.parquet(tmp_path / "in" / "a.parquet", make.rows(24), row_group_size=6)
    make.folder(tmp_path / "in" / "photos", 10)
    return tmp_path / "in"


def test_workers_change_nothing(run, make, corpus, tmp_path):
    made = {}
    for workers in (0, 3):
        output = tmp_path / f"shards{workers}"
        arguments = ("--input", corpus, "--output", output, "--samples-per-shard", 8)
        assert run("build", *arguments, "--workers", workers).code == 0
        made[workers] = make.hashes(output)
    assert made[0] == made[3]


def test_without_ray_the_error_is_the_line_that_installs_it(run, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "data_pipeline.runners.ray", raising=False)
    result = run("build", "--input", corpus, "--output", tmp_path / "shards", "--engine", "ray")
    assert result.code == 2
    assert "pip install 'maws-open[cluster]'" in result.err
    assert not (tmp_path / "shards").exists()


def test_an_address_without_ray_is_refused(run, corpus, tmp_path):
    result = run("build", "--input", corpus, "--output", tmp_path / "shards", "--address", "auto")
    assert (result.code, "give --engine ray too" in result.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["segfault", "hang"])
def test_a_build_loses_the_one_record_that_kills_who_reads_it(make, tmp_path, monkeypatch, mishap):
    """Halved down to it: its key can never be read. It is named by its row, counted, and never tried again."""
    pictures = tuple(make.picture(n) for n in range(7))
    pieces = [mishaps.DeadlyPiece(pictures[:6], 4, mishap), mishaps.DeadlyPiece(pictures[6:], 9, mishap, first=50)]
    monkeypatch.setattr(build, "discover", lambda *_, **__: Sources(pieces, [], []))  # type: ignore[arg-type]
    with LocalRunner(2, Limits(seconds=0.3)) as runner:
        manifest, _ = build.build([tmp_path], tmp_path / "out", Settings(), runner)
    counts = manifest["counts"]
    reason = {"segfault": "killed_worker", "hang": "timed_out"}[mishap]
    assert (counts["read"], counts["dropped"][reason]) == (7, 1)
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    assert sorted(make.records(tmp_path / "out")) == sorted([f"k{n:03d}" for n in range(6) if n != 4] + ["k050"])
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [(one["position"], one["reason"]) for one in map(json.loads, lines)] == [(4, reason)]
    assert "quarantine.jsonl" in manifest["files"]


def test_a_picture_that_wants_more_memory_than_allowed_is_dropped_by_name(make, run, tmp_path):
    rows = make.rows(6)
    rows[4]["image"] = giant(9000)
    file = make.parquet(tmp_path / "in.parquet", rows)
    output = tmp_path / "shards"
    assert run("build", "--input", file, "--output", output, "--worker-memory", 0.15, "--workers", 1).code == 0
    counts = json.loads((output / "manifest.json").read_bytes())["counts"]
    assert counts["dropped"]["out_of_memory"] == 1
    assert sorted(make.records(output)) == [f"k{n:03d}" for n in range(6) if n != 4]
    line = json.loads((output / "quarantine.jsonl").read_text())
    assert (line["key"], line["row"], line["reason"]) == ("k004", 4, "out_of_memory")


def giant(side: int) -> bytes:
    """A sound picture, small as a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "png")
    return buffer.getvalue()


@needs_ray
@pytest.mark.slow
def test_ray_makes_the_same_bytes_and_leaves_no_process(run, make, corpus, tmp_path):
    """Each in a process of its own: Ray keeps threads. An unfinished build changes the runner half-way."""
    assert run("build", "--input", corpus, "--output", tmp_path / "local", "--workers", 2).code == 0
    expected = make.hashes(tmp_path / "local")
    command = [sys.executable, "-W", "error", "-m", "data_pipeline", "build", "--input", str(corpus)]
    on_ray = [*command, "--output", str(tmp_path / "ray"), "--engine", "ray", "--address", "local", "--workers", "2"]
    before = ray_processes()
    ended = subprocess.run(on_ray, capture_output=True, text=True, cwd=ROOT, timeout=170)
    assert ended.returncode == 0, ended.stderr
    assert make.hashes(tmp_path / "ray") == expected
    assert ray_processes() <= before
    again = run("build", "--input", corpus, "--output", tmp_path / "ray", "--workers", 1)
    assert "up to date" in again.out


@needs_ray
@pytest.mark.slow
def test_on_ray_a_record_that_takes_its_worker_along_costs_itself_only(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for `mishaps` in Ray's workers
    script = f"""
import mishaps, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_runners import on_ray
on_ray(Path({str(tmp_path)!r}))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=170)
    assert ended.returncode == 0, ended.stderr


def on_ray(folder: Path) -> None:
    from data_pipeline.runners.ray import RayRunner

    numbers = list(range(8))
    bad = {2: "killed", 5: "memory"}
    with RayRunner("local", 2, Limits(seconds=20, memory=1 << 30)) as runner:
        assert runner.blind(Path(__file__)) == []
        assert runner.blind(folder / "nowhere") != []
        tasks = [
            Task(
                mishaps.total,
                (numbers, mishap, folder / f"{n}.txt"),
                records=Records(8, mishaps.probe, mishaps.describe),
            )
            for n, mishap in enumerate([{}, bad])
        ]
        job = Job(folder / "work", runner)
        assert [counts["sum"] for counts in job.run("read", tasks)] == [28, 28 - 2 - 5]
        assert [(one["position"], one["reason"]) for one in job.quarantined("read")] == [
            (2, "killed_worker"),
            (5, "out_of_memory"),
        ]


def ray_processes() -> set[int]:
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if b"raylet" in command or b"gcs_server" in command or b"ray::" in command:
                found.add(int(path.name))
    return found - {os.getpid()}
