"""Kill a build anywhere: the next one ends with the bytes of one never killed; and nothing of others is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import children as children_of
from processes import is_alive

from data_pipeline import build

OPTIONS = ("build", "--samples-per-shard", "8", "--workers", "0")

# Kill this very process right before or right after its n-th rename: every file that a build leaves appears by one.
KILL_AT = """
import os, signal, sys
from data_pipeline import files
number, when = int(sys.argv[1]), sys.argv[2]
replace, seen = os.replace, 0
def counted(source, target):
    global seen
    seen += 1
    if seen == number and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = counted
from data_pipeline.__main__ import main
from data_pipeline.ending import leave
code = main(sys.argv[3:])
print(seen)
leave(code)
"""


@pytest.fixture(scope="module")
def made(make, tmp_path_factory):
    """The corpus, a build of it that was never killed, and one killed between the first and the second shard."""
    root = tmp_path_factory.mktemp("made")
    make.parquet(root / "in" / "a.parquet", make.rows(20), row_group_size=10)
    make.folder(root / "in" / "photos", 10)
    arguments = (*OPTIONS, "--input", str(root / "in"), "--output")
    ended = kill_at(10_000, "never", *arguments, root / "whole")
    assert ended.returncode == 0, ended.stderr
    (root / "renames").write_text(ended.stdout.split()[-1])
    assert killed(point(root, 0.65), "after", *arguments, root / "unfinished") == -signal.SIGKILL
    return root


def point(root: Path, share: float) -> int:
    """The rename that comes after this share of all."""
    return max(1, round(share * int((root / "renames").read_text())))


@pytest.fixture
def corpus(made, tmp_path):
    return shutil.copytree(made / "in", tmp_path / "in")


@pytest.fixture
def whole(made, tmp_path):
    return shutil.copytree(made / "whole", tmp_path / "whole")


@pytest.fixture
def unfinished(made, tmp_path):
    return shutil.copytree(made / "unfinished", tmp_path / "unfinished")


@pytest.fixture
def expected(make, made):
    return make.hashes(made / "whole")


@pytest.fixture
def options(corpus):
    return (*OPTIONS, "--input", corpus)


def killed(number: int, when: str, *arguments: object) -> int:
    return kill_at(number, when, *arguments).returncode


def kill_at(number: int, when: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILL_AT, str(number), when, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])


# The first; in WordNet's tables; around a marker and between the files of a task; between a tar and its index; the last
# one, of the manifest.
POINTS = [
    (0, "before"),
    (0.1, "after"),
    (0.25, "before"),
    (0.45, "after"),
    (0.7, "after"),
    (0.9, "before"),
    (1, "before"),
]


@pytest.mark.parametrize(("share", "when"), POINTS)
def test_a_killed_build_started_again_ends_byte_identical(run, make, made, tmp_path, options, expected, share, when):
    output = tmp_path / "out"
    assert killed(point(made, share), when, *options, "--output", output) == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    assert run(*options, "--output", output).code == 0
    assert make.hashes(output) == expected


def test_killed_after_its_last_file_a_build_is_finished(run, make, made, tmp_path, options, expected):
    output = tmp_path / "out"
    assert killed(point(made, 1), "after", *options, "--output", output) == -signal.SIGKILL
    assert (output / ".work").exists()
    assert "up to date" in run(*options, "--output", output).out
    assert make.hashes(output) == expected


def test_killed_again_and_again_it_still_ends_byte_identical(run, make, made, tmp_path, options, expected):
    output, deaths = tmp_path / "out", 0
    while killed(point(made, 0.3), "after", *options, "--output", output) == -signal.SIGKILL:
        deaths += 1
        assert deaths < 20
    assert deaths >= 2
    assert make.hashes(output) == expected
    assert "up to date" in run(*options, "--output", output).out


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the workers")
def test_a_build_with_workers_killed_in_the_middle_leaves_no_process_and_continues(
    run, make, tmp_path, options, expected
):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "data_pipeline", *map(str, options), "--workers", "2", "--output", str(output)]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    )
    deadline = time.monotonic() + 60
    while not list(output.glob(".work/done/read/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    children = children_of(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert children
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, children))
    assert run(*options, "--output", output).code == 0
    assert make.hashes(output) == expected


def test_ctrl_c_ends_with_one_line_and_130(make, tmp_path):
    rows = [make.rows(1)[0] | {"key": f"k{n}", "image": make.picture(n, (200, 200))} for n in range(150)]
    file = make.parquet(tmp_path / "big.parquet", rows, row_group_size=50)
    output = tmp_path / "out"
    arguments = ["build", "--input", str(file), "--output", str(output), "--workers", "2"]
    command = [sys.executable, "-m", "data_pipeline", *arguments]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (output / ".work" / "job.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted: finished work is kept; the same command continues\n"


def test_tasks_done_are_not_done_again(run, make, options, monkeypatch, unfinished, expected):
    monkeypatch.setattr("data_pipeline.build.read", lambda *_: pytest.fail("read again"))
    assert run(*options, "--output", unfinished).code == 0
    assert make.hashes(unfinished) == expected


def test_a_finished_build_is_up_to_date(run, options, whole):
    before = {path: path.stat().st_mtime_ns for path in [whole, *whole.rglob("*")]}
    result = run(*options, "--output", whole)
    assert (result.code, "is up to date, nothing to do (30 samples)" in result.out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in [whole, *whole.rglob("*")]} == before


def test_a_finished_build_with_a_missing_shard_is_not_up_to_date(run, options, whole):
    (whole / "shards" / "00001.tar").unlink()
    result = run(*options, "--output", whole)
    assert (result.code, "00001.tar is missing or has another size" in result.err) == (1, True)


def test_another_parameter_is_refused_by_name_and_replaced_when_asked(run, make, options, whole, expected):
    output = whole
    result = run(*options, "--output", output, "--min-count", 2)
    assert result.code == 1
    assert "--min-count was auto, now 2; choose another --output, or replace it with --overwrite" in result.err
    assert make.hashes(output) == expected
    assert run(*options, "--output", output, "--min-count", 2, "--overwrite").code == 0
    assert json.loads((output / "manifest.json").read_bytes())["parameters"]["min_count"] == "2"


def test_changed_inputs_are_refused_by_name(run, make, options, corpus, whole, expected):
    (corpus / "photos" / "photo00.txt").write_text("#bear now")
    make.parquet(corpus / "b.parquet", make.rows(2, first=90))
    result = run(*options, "--output", whole)
    assert result.code == 1
    assert "the input in/ has changed" in result.err
    assert "the input in/b.parquet is new" in result.err
    assert make.hashes(whole) == expected


def test_an_unfinished_build_of_something_else_is_refused(run, options, unfinished):
    output = unfinished
    result = run(*options, "--output", output, "--keep-unlabelled")
    assert result.code == 1
    assert "an unfinished build made otherwise: --keep-unlabelled was False, now True" in result.err
    assert run(*options, "--output", output, "--keep-unlabelled", "--overwrite").code == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_other_things_is_never_touched(run, tmp_path, options, overwrite):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.tex").write_text("years of work")
    result = run(*options, "--output", output, *overwrite)
    assert result.code == 1
    assert "is not empty and not a shard set ('chapter1.tex' is in it)" in result.err
    assert [path.name for path in output.iterdir()] == ["chapter1.tex"]


def test_overwriting_leaves_files_of_others_alone(run, options, whole):
    (whole / "notes.txt").write_text("mine")
    assert run(*options, "--output", whole, "--overwrite").code == 0
    assert (whole / "notes.txt").read_text() == "mine"


def test_two_builds_cannot_write_into_one_folder(run, tmp_path, options):
    import fcntl

    output = tmp_path / "out"
    (output / ".work").mkdir(parents=True)
    with (output / ".work" / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(*options, "--output", output)
    assert (result.code, "another build is writing" in result.err) == (1, True)


def test_an_image_that_changes_during_the_build_stops_it(run, tmp_path, make, corpus, options, monkeypatch):
    def meddle(*arguments):
        (corpus / "photos" / "photo03.png").write_bytes(make.picture(77))
        return merge(*arguments)

    merge = build.merge
    monkeypatch.setattr(build, "merge", meddle)
    result = run(*options, "--output", tmp_path / "out")
    assert (result.code, "photo03.png changed while the build was running" in result.err) == (1, True)
