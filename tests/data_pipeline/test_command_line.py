import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--input", "x", "--output", "y", "--min-cuont", "3"], "did you mean --min-count?"),
        (["build", "--input", "x"], "the following arguments are required: --output"),
        (["build", "--input", "x", "--output", "y", "--workers", "1.5"], "'1.5' is not a whole number from 0"),
        (["build", "--input", "x", "--output", "y", "--samples-per-shard", "1e3"], "'1e3' is not a whole number"),
        (["build", "--input", "x", "--output", "y", "--epoch-factor", "nan"], "'nan' is not a number above 0"),
        (["build", "--input", "x", "--output", "y", "--epoch-factor", "5/0"], "'5/0' is not a number above 0"),
        (["build", "--input", "x", "--output", "y", "--epoch-factor", "0.5"], "it is from 1"),
        (["build", "--input", "x", "--output", "y", "--resample", "cap"], "say how far with --epoch-factor"),
        (["build", "--input", "x", "--output", "y", "--resample", "cap", "--epoch-factor", "5/3"], "at most 1"),
        (["build", "--input", "x", "--output", "y", "--epoch-samples", "9", "--threshold", "1"], "not both"),
        (["build", "--input", "x", "--output", "y", "--vocabulary", "v", "--vocabulary-size", "9"], "leave out --voc"),
        (["build", "--input", "x", "--output", "y", "--epoch-factor", "25"], "no image is repeated more than 20 times"),
        (["build", "--input", "x", "--output", "y", "--min-count", "0"], "neither auto nor a whole number from 1"),
        (["build", "--input", "x", "--output", "y", "--resize-side", "long"], "give --resize too"),
        (["build", "--input", "x", "--output", "y", "--resample", "sqare"], "invalid choice: 'sqare'"),
        (["build", "--input", "x", "--output", "y", "--resample", "none", "--threshold", "1"], "leave out --threshold"),
        (["build", "--input", "x", "--output", "y", "--epoch-factor", "2", "--threshold", "0.1"], "not both"),
        (["takedown", "x"], "say what is to go: --keys"),
        (["takedown", "x", "--keys", "k", "--near", "99"], "'99' is not a whole number from 0 to 64"),
        (["takedown", "x", "--keys-file", "nowhere"], "--keys-file nowhere: cannot read it"),
        (["explain", "x"], "the following arguments are required: KEY|#TAG"),
        (["inspcet"], "invalid choice: 'inspcet'"),
        ([], "build|inspect"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line_and_exit_code_2(run, arguments, message):
    result = run(*arguments)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_it_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "data_pipeline", "build", "--output"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_build_and_inspect_print_what_a_person_wants_to_know(run, build, make, tmp_path):
    rows = [*make.rows(30), make.rows(1)[0] | {"key": "broken", "image": b"?"}]
    build(rows)
    result = run("inspect", tmp_path / "shards", "--top", 3, "--workers", 1)
    assert result.code == 0
    words = " ".join(result.out.split())
    for part in ("images read 31", "kept 30 96.8 %", "unsupported_format 1", "dog.n.01", "Least frequent labels",
                 "Repeat factors", "checked: 1 shards"):  # fmt: skip
        assert part in words
    assert "\x1b" not in result.out


@pytest.mark.parametrize("name", ["shards/00000.tar", "shards/00000.parquet", "vocabulary.parquet", "manifest.json"])
def test_inspect_names_the_file_with_a_flipped_byte(run, build, make, name):
    _, output = build(make.rows(10))
    data = bytearray((output / name).read_bytes())
    data[len(data) // 2] ^= 1
    (output / name).write_bytes(data)
    result = run("inspect", output, "--workers", 1)
    assert result.code == 1
    assert result.err.startswith(f"error: {output / name} ")


def test_inspect_of_something_else(run, tmp_path):
    result = run("inspect", tmp_path)
    assert (result.code, "is not a shard set" in result.err) == (1, True)


def test_markup_and_control_characters_of_users_are_only_text(run, make, tmp_path):
    file = make.parquet(tmp_path / "[red]x.parquet", [row | {"caption": "#dog"} for row in make.rows(2)])
    result = run("build", "--input", file, "--output", tmp_path / "[bold]out", "--workers", 1)
    assert result.code == 0
    assert "[bold]out" in result.out
