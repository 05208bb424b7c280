"""`python -m maws`: what it prints, and how it says that it was asked for what is not there."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from maws.__main__ import COMMANDS, main


@pytest.fixture(scope="module")
def whole_table() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["models"]) == 0
    return printed.getvalue()


def lines(printed: str, name: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines() if line.startswith(name + " ")]


def test_the_table_has_the_papers_sizes_to_the_digit(whole_table):
    papers = {  # recipes §1.1: image, patch, tokens, blocks, width, heads, parameters
        "vit_b16": "224 16 197 12 768 12 85,798,656",
        "vit_l16": "224 16 197 24 1024 16 303,301,632",
        "vit_h14": "224 14 257 32 1280 16 630,764,800",
        "vit_2b14": "224 14 257 24 2560 32 1,890,408,960",
        "vit_6.5b14": "224 14 257 32 4096 32 6,447,632,384",
        "vit_s16": "224 16 197 12 384 6 21,665,664",
    }
    assert {name: " ".join(lines(whole_table, name)[0][1:8]) for name in papers} == papers


def test_the_table_has_the_gmacs_of_figure_5_and_the_memory_of_the_largest(whole_table):
    compute, memory = lines(whole_table, "vit_6.5b14")
    assert compute[9] == "427.7"  # 420.5 + 7.2, recipes §9.12
    assert compute[11] == "1,673.8"  # 1673.6, and 0.13 of the head
    assert memory[1] == "96.5"  # GiB, deepspeed.md §5
    assert memory[4:] == ["306.3", "27.7", "1,077.9", "101.1"]  # 272.6 + 33.7; 17.0 + 2.1 + 8.5; 1078; 67.4 + 33.7


def test_a_narrow_terminal_loses_no_digits(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(Terminal()) as printed:
        assert main(["models", "vit_6.5b14"]) == 0
    assert all(
        digits in printed.getvalue() for digits in ("6,447,632,384", "27,751,500", "1,673.8", "1,705.0", "1,077.9")
    )
    assert "…" not in printed.getvalue()


def test_json_is_exact_and_states_are_shared_by_the_ranks(capsys):
    def rows(*arguments: str) -> list[dict]:
        assert main(["models", "vit_b16", "atto", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    alone, shared = rows(), rows("--ranks", "8")
    assert [row["name"] for row in alone] == ["vit_b16", "atto"]
    decoder = 8 * (12 * 512**2 + 13 * 512) + 769 * 512 + 512 + 197 * 512 + 2 * 512 + 513 * 768
    assert alone[0]["decoder_parameters"] == decoder
    assert alone[0]["mae_states_bytes"] == 16 * (85_798_656 + decoder)
    head = 2 * 768 * 4096 + 2 * 4096  # two matrices, and the norm between
    more = 16 * 2 * head + 6 * (85_798_656 + head)  # projector and predictor; the target has trunk and projector
    assert alone[0]["lc_mae_states_bytes"] == alone[0]["mae_states_bytes"] + more
    for one, eighth in zip(alone, shared, strict=True):
        assert {k: v / 8 if "states" in k else v for k, v in one.items()} == eighth


def test_larger_images_have_more_tokens_and_models_that_cannot_take_them_are_named(capsys):
    assert main(["models", "--image-size", "256"]) == 0
    printed = capsys.readouterr().out
    assert lines(printed, "vit_b16")[0][1:4] == ["256", "16", "257"]
    assert not lines(printed, "vit_h14")
    assert "vit_h14, vit_2b14, vit_6.5b14" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models", "vit_b61"], "there is no model 'vit_b61'; did you mean vit_b16?"),
        (["models", "--rank", "2"], "did you mean --ranks?"),
        (["models", "--ranks", "0"], "--ranks 0"),
        (["models", "--ranks", "many"], "invalid int value: 'many'"),
        (["models", "vit_h14", "--image-size", "256"], "multiple of 14; try 252"),
        (["models", "--image-size", "5"], "multiple of"),
        (["modles"], "there is no command 'modles'; did you mean models?"),
        (["--modles"], "required"),
        ([], "required"),
    ],
)
def test_what_is_not_there_is_said_in_one_line_with_the_nearest(capsys, arguments, said):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(command.help in " ".join(printed.split()) for command in COMMANDS.values())
    with pytest.raises(SystemExit):
        main(["models", "--help"])
    assert "Example: python -m maws models " in capsys.readouterr().out


def test_wrong_words_are_told_before_torch_is_loaded():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "maws", "modles"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2
    assert "did you mean models?" in run.stderr
    assert "data_pipeline.errors" in run.stderr and "torch" not in run.stderr
