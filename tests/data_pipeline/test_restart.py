"""Kill a build anywhere: the next one ends with the bytes of one never killed; and nothing of others is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def corpus(make, tmp_path):
    make.parquet(tmp_path / "in" / "a.parquet", make.rows(20), row_group_size=10)
    make.folder(tmp_path / "in" / "photos", 10)
    return tmp_path / "in"


@pytest.fixture
def options(corpus):
    return ("build", "--input", corpus, "--samples-per-shard", 8, "--workers")


@pytest.fixture
def expected(run, make, tmp_path, options):
    assert run(*options, 1, "--output", tmp_path / "whole").code == 0
    return make.hashes(tmp_path / "whole")


def killed(number: int, when: str, *arguments: object) -> int:
    command = [sys.executable, "-c", KILL_AT, str(number), when, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, cwd=Path(__file__).parents[2]).returncode


# Of 40 renames: the first; in WordNet's tables; around a marker and between the files of a task; the plan; between a tar
# and its index; the last one, of the manifest.
POINTS = [(1, "before"), (3, "after"), (8, "before"), (10, "after"), (21, "after"), (32, "after"), (40, "before")]


@pytest.mark.parametrize(("number", "when"), POINTS)
def test_a_killed_build_started_again_ends_byte_identical(run, make, tmp_path, options, expected, number, when):
    output = tmp_path / "out"
    assert killed(number, when, *options, 1, "--output", output) == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    assert run(*options, 1, "--output", output).code == 0
    assert make.hashes(output) == expected


def test_killed_after_its_last_file_a_build_is_finished(run, make, tmp_path, options, expected):
    output = tmp_path / "out"
    assert killed(40, "after", *options, 1, "--output", output) == -signal.SIGKILL
    assert (output / ".work").exists()
    assert "up to date" in run(*options, 1, "--output", output).out
    assert make.hashes(output) == expected


def test_killed_again_and_again_it_still_ends_byte_identical(run, make, tmp_path, options, expected):
    output, deaths = tmp_path / "out", 0
    while killed(12, "after", *options, 1, "--output", output) == -signal.SIGKILL:
        deaths += 1
        assert deaths < 20
    assert deaths >= 2
    assert make.hashes(output) == expected
    assert "up to date" in run(*options, 1, "--output", output).out


def test_a_build_with_workers_killed_in_the_middle_leaves_no_process_and_continues(
    run, make, tmp_path, options, expected
):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "data_pipeline", *map(str, options), "2", "--output", str(output)]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    )
    deadline = time.monotonic() + 60
    while not list(output.glob(".work/done/read/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    children = workers_of(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert run(*options, 1, "--output", output).code == 0
    assert make.hashes(output) == expected


def workers_of(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def test_ctrl_c_ends_with_one_line_and_130(make, tmp_path):
    rows = [make.rows(1)[0] | {"key": f"k{n}", "image": make.picture(n, (200, 200))} for n in range(150)]
    file = make.parquet(tmp_path / "big.parquet", rows, row_group_size=50)
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "data_pipeline",
        "build",
        "--input",
        str(file),
        "--output",
        str(output),
        "--workers",
        "2",
    ]
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


def test_tasks_done_are_not_done_again(run, tmp_path, options, monkeypatch, expected):
    output = tmp_path / "out"
    assert killed(24, "after", *options, 1, "--output", output) == -signal.SIGKILL
    monkeypatch.setattr("data_pipeline.steps.read", lambda *_: pytest.fail("read again"))
    assert run(*options, 1, "--output", output).code == 0


def test_a_finished_build_is_up_to_date(run, make, tmp_path, options, expected):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    result = run(*options, 1, "--output", tmp_path / "whole")
    assert (result.code, "is up to date, nothing to do (30 samples)" in result.out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*") if path.is_file()} == before


def test_another_parameter_is_refused_by_name_and_replaced_when_asked(run, make, tmp_path, options, expected):
    output = tmp_path / "whole"
    result = run(*options, 1, "--output", output, "--min-count", 2)
    assert result.code == 1
    assert "--min-count was auto, now 2; choose another --output, or replace it with --overwrite" in result.err
    assert make.hashes(output) == expected
    assert run(*options, 1, "--output", output, "--min-count", 2, "--overwrite").code == 0
    assert json.loads((output / "manifest.json").read_bytes())["parameters"]["min_count"] == "2"


def test_changed_inputs_are_refused_by_name(run, make, tmp_path, options, corpus, expected):
    (corpus / "photos" / "photo00.txt").write_text("#bear now")
    make.parquet(corpus / "b.parquet", make.rows(2, first=90))
    result = run(*options, 1, "--output", tmp_path / "whole")
    assert result.code == 1
    assert "the input in/ has changed" in result.err
    assert "the input in/b.parquet is new" in result.err
    assert make.hashes(tmp_path / "whole") == expected


def test_an_unfinished_build_of_something_else_is_refused(run, tmp_path, options):
    output = tmp_path / "out"
    assert killed(11, "after", *options, 1, "--output", output) == -signal.SIGKILL
    result = run(*options, 1, "--output", output, "--keep-unlabelled")
    assert result.code == 1
    assert "an unfinished build made otherwise: --keep-unlabelled was False, now True" in result.err
    assert run(*options, 1, "--output", output, "--keep-unlabelled", "--overwrite").code == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_other_things_is_never_touched(run, tmp_path, options, overwrite):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.tex").write_text("years of work")
    result = run(*options, 1, "--output", output, *overwrite)
    assert result.code == 1
    assert "is not empty and not a shard set ('chapter1.tex' is in it)" in result.err
    assert [path.name for path in output.iterdir()] == ["chapter1.tex"]


def test_overwriting_leaves_files_of_others_alone(run, tmp_path, options, expected):
    output = tmp_path / "whole"
    (output / "notes.txt").write_text("mine")
    assert run(*options, 1, "--output", output, "--overwrite").code == 0
    assert (output / "notes.txt").read_text() == "mine"


def test_two_builds_cannot_write_into_one_folder(run, tmp_path, options):
    import fcntl

    output = tmp_path / "out"
    (output / ".work").mkdir(parents=True)
    with (output / ".work" / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(*options, 1, "--output", output)
    assert (result.code, "another build is writing" in result.err) == (1, True)


def test_an_image_that_changes_during_the_build_stops_it(run, tmp_path, make, corpus, options):
    output = tmp_path / "out"
    assert killed(17, "after", *options, 1, "--output", output) == -signal.SIGKILL
    (corpus / "photos" / "photo03.png").write_bytes(make.picture(77))
    result = run(*options, 1, "--output", output)
    assert (result.code, "the input in/ has changed" in result.err) == (1, True)
