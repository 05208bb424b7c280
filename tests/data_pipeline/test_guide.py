"""Every command of docs/data.md does what the page says, on a small part of the demo corpus, one after the other."""

import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_pipeline.__main__ import parser
from data_pipeline.shardset import ShardSet

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "data.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def commands(kind: str) -> list[list[str]]:
    """The words after `python -m data_pipeline` of all blocks of one kind."""
    blocks = re.findall(rf"^<!-- test: {kind} -->\n```console\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert lines
    assert all(line.startswith("$ python -m data_pipeline ") for line in lines)
    return [shlex.split(line)[4:] for line in lines]


def test_every_console_block_is_tested_and_every_link_leads_somewhere():
    assert len(re.findall(r"^<!-- test: (?:run|check) -->\n```console$", TEXT, re.MULTILINE)) == TEXT.count(
        "```console"
    )
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (GUIDE.parent / name).exists(), name
    for name in re.findall(r"`((?:maws|eval|data_pipeline|tests|demo|benchmarks)/[\w./-]*)`", TEXT):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("words", commands("check"), ids=" ".join)
def test_options_are_accepted(words):
    parser().parse_args(words)


def test_every_option_that_the_page_names_exists():
    known = set(parser().options())
    named = set(re.findall(r"`(--[a-z-]+)", TEXT))
    assert len(named) > 25
    assert named <= known


def test_the_commands_one_after_the_other(run, tmp_path, monkeypatch):
    emoji = tmp_path / "demo" / "emoji"
    emoji.mkdir(parents=True)
    for vendor in ("noto", "twemoji"):
        table = pq.read_table(ROOT / "demo/emoji" / f"{vendor}.parquet")
        cat = table.filter(pc.equal(table["key"], f"{vendor}-1f408"))
        pq.write_table(pa.concat_tables([cat, table.slice(60, 40)]), emoji / f"{vendor}.parquet")
    evaluation = pq.read_table(ROOT / "demo/emoji/eval-emojione.parquet")
    pq.write_table(evaluation.slice(0, 10), emoji / "eval-emojione.parquet")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for words in commands("run"):
        workers = ["--workers", "0"] if words[0] == "build" else []
        result = run(*words, *workers)
        assert result.code == 0, (words, result.err)
        if words[:2] == ["explain", "shards"]:
            assert "cat.n.01" in result.out
    keys = {key for name in ("shards", "small") for key in ShardSet.open(name).index(0)["key"].to_pylist()}
    assert "noto-1f408" in keys  # in `small`
    assert "noto-1f408" not in ShardSet.open("shards").index(0)["key"].to_pylist()
    assert Path("shards/report.html").is_file() is False  # made anew with the set, it shows what was taken down
    assert [e.synset for e in ShardSet.open("again").vocabulary] == [e.synset for e in ShardSet.open("few").vocabulary]
