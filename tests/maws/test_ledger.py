"""The ledger says which samples a step had, without having trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shardset import ShardSet
from maws.__main__ import main
from maws.data.order import Order
from maws.key_log import KeyLog, drop_from

FACTS = {"seed": 3, "batch_size": 16, "streams": 4, "window": 2, "resample": True, "labelled": True}


@pytest.fixture
def run(tmp_path: Path, shards: ShardSet) -> Path:
    """A run of 40 steps that stands at step 30."""
    folder = tmp_path / "run"
    folder.mkdir()
    record = {
        "data": {"shards": str(shards.path)}, "optim": {"length": "40 steps"}, "shards_sha256": shards.sha256,
        "order": FACTS,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record))
    lines(folder / "metrics.jsonl", [{"step": 10}, {"step": 30}])
    return folder


@pytest.fixture
def order(shards: ShardSet) -> Order:
    facts = dict(FACTS)
    return Order(shards, facts.pop("seed"), facts.pop("batch_size"), **facts)


def lines(path: Path, entries: list[dict], end: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries) + end)


def ledger(capsys, *arguments) -> tuple[int, list[str], str]:
    code = main(["ledger", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.strip()


def test_the_keys_are_those_of_the_order(run, order, capsys):
    code, out, _ = ledger(capsys, run, "--step", "12:15", "--json")
    assert code == 0 and [json.loads(line) for line in out] == [
        {"step": step, "keys": order.keys(step)} for step in (12, 13, 14)
    ]
    assert ledger(capsys, run, "--step", 39)[1] == [f"step 39: {' '.join(order.keys(39))}"]


def test_the_shares_of_all_ranks_are_the_whole(run, order, capsys):
    shares = [json.loads(ledger(capsys, run, "--step", 5, "--rank", r, "--ranks", 4, "--json")[1][0]) for r in range(4)]
    assert [len(share["keys"]) for share in shares] == [4] * 4
    assert sorted(key for share in shares for key in share["keys"]) == sorted(order.keys(5))


def test_a_key_is_found_in_every_step_that_visits_it_and_in_no_other(run, order, capsys):
    visits: dict[str, dict[int, int]] = {}
    for step in range(30):  # several epochs
        for key in order.keys(step):
            at = visits.setdefault(key, {})
            at[step] = at.get(step, 0) + 1
    assert 2 * order.steps_per_epoch < 30
    for key in sorted(visits)[::7]:
        found = [json.loads(line) for line in ledger(capsys, run, "--key", key, "--json")[1]]
        assert {entry["step"]: entry["times"] for entry in found} == visits[key]
    untagged = next(r for r in range(20) if not order.shards.record(0, r)["synsets"])
    key = order.shards.record(0, untagged)["key"]
    assert ledger(capsys, run, "--key", key)[1:] == ([], f"{key} was in none of 30 steps")
    assert "has the key 'nobody'" in ledger(capsys, run, "--key", "nobody")[2]


def test_steps_left_out_and_samples_replaced_are_marked(run, order, capsys):
    lines(run / "events.jsonl", [{"event": "rewind", "step": 7, "to": 4, "why": "loss is nan"}], '{"event": "rew')
    items = order.items(9)
    bad = items[order.per_stream]  # the first of stream 1
    lines(run / "quarantine.jsonl", [{"step": 9, "key": bad.key, "shard": "00000", "reason": "truncated"}])
    assert ledger(capsys, run, "--step", 7)[1][0].startswith("step 7, left out (loss is nan): ")
    by = order.item(1, 9, 0, skip=1).key
    entry = json.loads(ledger(capsys, run, "--step", 9, "--json")[1][0])
    assert {"key": bad.key, "by": by, "reason": "truncated"} in entry["replaced"] and entry["keys"] == order.keys(9)
    assert f"{bad.key} replaced by {by} (truncated)" in ledger(capsys, run, "--step", 9)[1][0]
    assert "step 9, replaced (truncated)" in ledger(capsys, run, "--key", bad.key)[1]


def test_what_the_ranks_wrote_is_compared(run, order, capsys):
    lines(run / "events.jsonl", [{"event": "rewind", "step": 7, "to": 4, "why": "loss is nan"}])
    written = [{"step": step, "keys": [] if step == 7 else order.keys(step)} for step in range(4, 12)]
    halves = [[e | {"keys": e["keys"][i::2]} for e in written] for i in range(2)]
    lines(run / "keys" / "rank_00000.jsonl", halves[0])
    lines(run / "keys" / "rank_00001.jsonl", halves[1][:-1], '{"step": 11, "ke')  # killed while it wrote
    assert ledger(capsys, run, "--check")[:2] == (0, ["8 steps (4 to 11) had the samples that the order gives"])
    halves[0][3]["keys"] = ["another"]
    lines(run / "keys" / "rank_00000.jsonl", halves[0])
    assert ledger(capsys, run, "--check")[:2] == (1, ["1 of 8 steps had other samples than the order gives: 7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "40"], "--step 40 is outside of the run: its steps are 0:40"),
        (["--step", "5:5"], "--step 5:5 is outside of the run"),
        (["--step", "x"], "write 12, or 12:15 for the steps 12, 13 and 14"),
        ([], "say what to look up"),
        (["--step", "1", "--ranks", "3"], "3 ranks cannot share 4 streams evenly"),
        (["--step", "1", "--ranks", "2", "--rank", "2"], "ranks count from 0 to 1"),
        (["--step", "1", "--rank", "1"], "--rank R goes with --ranks W"),
        (["--check"], "has no lines; a run writes them with log.keys=yes"),
    ],
)
def test_what_cannot_be_is_refused_in_words(run, capsys, arguments, message):
    code, out, err = ledger(capsys, run, *arguments)
    assert code in (1, 2) and not out and message in err


def test_another_shard_set_and_no_run_are_refused(run, shards, tmp_path, capsys):
    assert "no run at" in ledger(capsys, tmp_path / "nowhere", "--step", 1)[2]
    moved = tmp_path / "moved"
    shutil.copytree(shards.path, moved)
    assert ledger(capsys, run, "--step", 1, "--shards", moved)[0] == 0
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(record | {"shards_sha256": "f" * 64}))
    assert "is not the shard set of" in ledger(capsys, run, "--step", 1)[2]
    (run / "config.json").write_text(json.dumps(record | {"data": {"shards": str(tmp_path / "gone")}}))
    assert "has moved, add --shards FOLDER" in ledger(capsys, run, "--step", 1)[2]
    del record["order"]
    (run / "config.json").write_text(json.dumps(record))
    assert "written by an older version; continue the run" in ledger(capsys, run, "--step", 1)[2]


def test_the_ledger_needs_no_torch():
    code = "import sys, maws.ledger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_after_a_rewind_the_key_log_goes_on_with_the_step_it_is_set_to(tmp_path):
    log = KeyLog(tmp_path, 0)
    for step in range(9):
        log.write(step, [f"k{step}"])
    log.go_to(5)
    log.write(5, ["again"])
    log.close()
    lines(tmp_path / "keys" / "rank_00001.jsonl", [{"step": step, "keys": []} for step in range(9)])
    path = tmp_path / "keys" / "rank_00000.jsonl"
    assert [json.loads(line)["keys"] for line in path.read_text().splitlines()[4:]] == [["k4"], ["again"]]
    path.write_text(path.read_text() + '{"step": 6, "ke')  # killed while it wrote
    again = KeyLog(tmp_path, 6)  # on one rank, where there were two
    again.write(6, ["k6"])
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(7))
    assert len((tmp_path / "keys" / "rank_00001.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("tail", [1, 40, 1 << 20])
def test_a_log_is_cut_at_the_same_place_however_much_of_it_is_looked_at(tmp_path, monkeypatch, tail):
    monkeypatch.setattr("maws.key_log.TAIL", tail)
    for step in range(12):
        path = tmp_path / "log"
        lines(path, [{"step": s, "keys": ["k"] * (s % 3)} for s in range(10)], '{"step": 1')
        drop_from(path, step)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(min(step, 10)))
