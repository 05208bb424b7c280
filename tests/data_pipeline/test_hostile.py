"""A build of all that strangers put among their pictures: it ends, what is good is in it, and the rest is counted."""

import subprocess
import sys
import time
from pathlib import Path

import hostile
import pyarrow.parquet as pq
import pytest

from data_pipeline.shardset import ShardSet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(nouns, tmp_path_factory):
    """The corpus, what is expected of it by key, and its shard set, built as a user would, with a limit on memory."""
    root = tmp_path_factory.mktemp("hostile")
    expected = hostile.write(root)
    command = [sys.executable, "-W", "error", "-m", "data_pipeline", "build"]
    command += [
        "--input",
        str(root / "files"),
        str(root / "tables"),
        "--output",
        str(root / "out"),
        "--workers",
        "2",
        "--worker-memory",
        "2",
        "--record-timeout",
        "30",
    ]
    start = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=170)
    assert ended.returncode == 0, ended.stderr
    return ShardSet.open(root / "out"), expected, time.monotonic() - start


def kept(shards: ShardSet) -> dict[str, dict]:
    found = [shards.record(n, row) for n, size in enumerate(shards.shard_sizes) for row in range(size)]
    return {record["key"]: record for record in found}


def reasons(shards: ShardSet) -> list[tuple[str | None, str]]:
    rows = pq.read_table(shards.path / "dropped.parquet").to_pylist()
    return [(row["key"], row["reason"]) for row in rows]


def test_what_was_read_was_kept_or_dropped_for_a_reason(made):
    shards, _, _ = made
    counts = shards.manifest["counts"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] == shards.manifest["samples"] == len(kept(shards))
    listed: dict[str, int] = {}
    for _, reason in reasons(shards):
        listed[reason] = listed.get(reason, 0) + 1
    assert listed == {reason: number for reason, number in counts["dropped"].items() if number}


def test_more_than_a_hundred_bad_records_are_dropped_each_for_its_reason(made):
    shards, expected, _ = made
    here = kept(shards)
    dropped = dict(reasons(shards))
    bad = {key: why for key, why in expected.items() if why and "bad_key" not in why}
    assert len(bad) >= 100
    assert {key for key in bad if key in here and "duplicate_key" not in bad[key]} == set()
    wrong = {key: (dropped.get(key), sorted(why)) for key, why in bad.items() if dropped.get(key) not in why}
    assert wrong == {}
    assert [reason for key, reason in reasons(shards)].count("bad_key") >= 3


def test_tables_and_tars_lose_only_what_is_bad_in_them(made):
    """Their records are named by what they are called, which is as strange as they are: the reasons are looked at."""
    shards, _, _ = made
    found = {reason for _, reason in reasons(shards)}
    of_tars = {"unsafe_name", "tar_link", "tar_device", "tar_unknown_kind", "duplicate_member"}
    assert of_tars | {"truncated_tar", "damaged_tar", "missing_image"} <= found
    assert {"bad_json", "bad_csv", "record_too_long", "nul_byte", "caption_not_text", "damaged_file"} <= found
    assert {"url_not_allowed", "unsafe_path", "unreadable_file", "missing_file"} <= found
    skipped = {file["path"] for file in shards.manifest["skipped_inputs"]}
    assert {f"tables/{name}" for name in ("cut.parquet", "empty.parquet", "noise.arrow", "empty.tar")} <= skipped


def test_all_that_is_good_comes_through(made):
    shards, expected, _ = made
    here = kept(shards)
    good = {key for key in expected if "good" in key}
    assert len(good) >= 30
    assert good <= here.keys()
    assert all(here[key]["labels"] for key in good)


def test_no_key_and_no_text_can_do_harm(made):
    """Keys become names of members of tars, and reach terminals and pages."""
    shards, _, _ = made
    for key in kept(shards):
        assert key and len(key.encode()) <= 240, key
        assert not key.startswith(("/", ".")) and ".." not in key.split("/"), key
        assert key.isprintable(), key


def test_pipes_and_devices_delay_nothing(made):
    _, _, seconds = made
    assert seconds < 120
