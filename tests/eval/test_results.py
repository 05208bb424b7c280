"""results.jsonl is only appended to, one whole line per score."""

import json
import subprocess
import sys

import pytest

from data_pipeline.errors import DataError
from eval.results import Result, append, read


def result(value: float = 0.5, **more) -> Result:
    fields = {"run": "runs/a", "evaluator": "knn", "metric": "top1", "value": value, "n": 10, "seed": 0}
    return Result(**fields | {"config": {}, "hashes": {}, "lineage": ["wsp"], "time": "2026-01-01"} | more)


def test_what_was_appended_is_read_back(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    append(path, [result(0.25, config={"é": [1]})])
    append(path, [result(0.5), result(0.75)])
    assert list(read(path)) == [result(0.25, config={"é": [1]}), result(0.5), result(0.75)]


def test_a_half_line_of_a_killed_writer_is_kept_apart(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, [result(0.25)])
    with path.open("a") as file:
        file.write('{"run": "runs/a", "val')
    append(path, [result(0.5)])
    assert [r.value for r in read(path)] == [0.25, 0.5]


WRITER = """
import sys
from pathlib import Path
from eval.results import Result, append
line = Result(run="a", evaluator="knn", metric="top1", value=float(sys.argv[2]), n=1, seed=0, config={"x": "x" * 5000},
              hashes={}, lineage=[], time="")
for _ in range(50):
    append(Path(sys.argv[1]), [line])
"""


def test_writers_side_by_side_never_mix_their_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, value]) for value in ("0.1", "0.2")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 100


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(tmp_path / "results.jsonl", [result(float("nan"))])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot append to .*results\.jsonl: .*--results"):
        append(tmp_path / "results.jsonl", [result()])
