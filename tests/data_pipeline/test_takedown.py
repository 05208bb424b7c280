"""Pictures that leave a set leave it whole: no byte of them stays, nothing else changes, whoever kills it when."""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline import files, shardset, takedown
from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import Options, prepare
from data_pipeline.shardset import ShardSet
from data_pipeline.takedown import Wanted
from data_pipeline.tombstones import NAME


def drawing(seed: int, size: int = 96) -> Image.Image:
    """A picture with large shapes, so that it has a perceptual hash that survives resizing."""
    picture = Image.effect_noise((6, 6), 200).resize((size, size), Image.Resampling.BICUBIC)
    return Image.blend(picture, Image.radial_gradient("L").resize((size, size)).rotate(seed * 40), 0.4).convert("RGB")


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def built(tmp_path_factory, make) -> Path:
    """A set of 40 pictures in 8 shards, that tests copy."""
    from data_pipeline.__main__ import main

    folder = tmp_path_factory.mktemp("takedown")
    make.parquet(folder / "in.parquet", make.rows(40))
    command = ["build", "--input", folder / "in.parquet", "--output", folder / "shards", "--workers", 1]
    assert main([str(word) for word in (*command, "--samples-per-shard", 5)]) == 0
    return folder / "shards"


@pytest.fixture
def shards(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def everything(folder: Path) -> dict[str, tuple[bytes, dict]]:
    shards = ShardSet.open(folder)
    rows = [(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]
    return {shards.record(*at)["key"]: (shards.image_bytes(*at), shards.record(*at)) for at in rows}


def test_all_else_stays_to_the_byte_and_the_counts_are_right(shards, make):
    before, old = everything(shards), ShardSet.open(shards)
    outcome = takedown.takedown(shards, Wanted(keys=["k003", "k017", "k017"]), reason="asked")
    new = ShardSet.open(shards)
    assert list(new.verify()) == []
    assert everything(shards) == {key: value for key, value in before.items() if key not in ("k003", "k017")}
    assert (len(new), new.manifest["samples"], outcome.samples) == (38, 38, 2)
    labels = Counter(label for _, record in everything(shards).values() for label in record["labels"])
    assert {entry.index: entry.count for entry in new.vocabulary if entry.count} == labels
    assert [entry.synset for entry in new.vocabulary] == [entry.synset for entry in old.vocabulary]
    counts = new.manifest["counts"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) == 40
    assert counts["dropped"]["taken_down"] == 2
    assert counts["labels"] == sum(labels.values())
    assert new.manifest["parents"][-1]["sha256"] == old.sha256 == outcome.before != outcome.after == new.sha256
    epoch = sum(record["repeat"] for _, record in everything(shards).values())
    assert new.manifest["resampling"]["samples_per_epoch"] == pytest.approx(epoch)


def test_no_byte_of_the_picture_and_no_word_of_its_caption_stays(shards, make):
    image, caption = make.picture(3), b"#goldenretriever in the #snow"
    taken = [key for key, (_, record) in everything(shards).items() if record["caption"].encode() == caption]
    takedown.takedown(shards, Wanted(keys=taken))
    rest = b"".join(path.read_bytes() for path in shards.rglob("*") if path.is_file())
    assert image not in rest and caption not in rest
    assert b"k003" in rest  # only its tombstone, by which it is kept out


def test_cached_features_of_the_pictures_go_with_them(shards):
    cache = shards / "features" / "tower-crops"
    cache.mkdir(parents=True)
    (cache / "00000.arrow").write_bytes(b"of k003 too")
    takedown.takedown(shards, Wanted(keys=["k003"]), reason="asked", dry_run=True)
    assert cache.is_dir()
    takedown.takedown(shards, Wanted(keys=["k003"]), reason="asked")
    assert not (shards / "features").exists() and len(ShardSet.open(shards)) == 39


def test_untouched_shards_are_not_written_again(shards):
    before = {path.name: path.stat().st_mtime_ns for path in (shards / "shards").iterdir()}
    takedown.takedown(shards, Wanted(keys=["k003"]))
    changed = {path.stem for path in (shards / "shards").iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert len(changed) == 1


def test_a_shard_that_loses_all_its_samples_is_gone(shards):
    first = pq.read_table(shards / "shards" / "00002.parquet")["key"].to_pylist()
    takedown.takedown(shards, Wanted(keys=first))
    assert not list((shards / "shards").glob("00002.*"))
    assert [entry["name"] for entry in ShardSet.open(shards).manifest["shards"]] == [
        f"{n:05d}" for n in range(8) if n != 2
    ]
    assert list(ShardSet.open(shards).verify()) == []


def test_by_hash_by_file_and_what_is_not_there(shards, make, tmp_path):
    (tmp_path / "it.png").write_bytes(make.picture(9))
    wanted = Wanted(
        keys=["nobody"], hashes=[hashlib.sha256(make.picture(4)).hexdigest().upper(), "ab" * 32],
        files=[tmp_path / "it.png"],
    )  # fmt: skip
    outcome = takedown.takedown(shards, wanted)
    assert [stone.key for stone in outcome.taken] == ["k004", "k009"]
    assert outcome.unknown == ["nobody", "ab" * 32]


def test_tombstones_say_what_went_and_why_and_no_more(shards, make):
    takedown.takedown(shards, Wanted(keys=["k004"]), reason="its author asked", date="2026-01-31")
    takedown.takedown(shards, Wanted(keys=["k001"]))
    lines = [json.loads(line) for line in (shards / NAME).read_text().splitlines()]
    sha256 = hashlib.sha256(make.picture(4)).hexdigest()
    hashed = prepare(make.picture(4), Options()).perceptual_hash
    expected = {"key": "k004", "content_sha256": sha256, "stored_sha256": sha256, "reason": "its author asked"}
    expected |= {"date": "2026-01-31"} | ({"perceptual_hash": hashed.hex()} if hashed else {})
    assert lines[0] == expected
    assert [line["key"] for line in lines] == ["k004", "k001"]


def test_once_more_changes_nothing(shards, make):
    takedown.takedown(shards, Wanted(keys=["k004"]))
    before = make.hashes(shards)
    outcome = takedown.takedown(shards, Wanted(keys=["k004"], hashes=[hashlib.sha256(make.picture(4)).hexdigest()]))
    assert (outcome.samples, outcome.unknown, len(outcome.already)) == (0, [], 2)
    assert make.hashes(shards) == before


def test_a_dry_run_names_all_and_writes_nothing(shards, make):
    before = make.hashes(shards)
    outcome = takedown.takedown(shards, Wanted(keys=["k004", "k005"]), dry_run=True)
    assert ([stone.key for stone in outcome.taken], outcome.samples) == (["k004", "k005"], 2)
    assert make.hashes(shards) == before


def test_near_finds_a_smaller_copy_that_is_not_the_same_file(build, make, tmp_path):
    picture = drawing(1)
    rows = make.rows(12)
    rows[2]["image"], rows[5]["image"] = png(picture), png(picture.resize((80, 80), Image.Resampling.LANCZOS))
    rows[7]["image"] = png(drawing(2))
    _, shards = build(rows, "--near-duplicates", "off")
    (tmp_path / "it.png").write_bytes(png(picture.resize((88, 88))))
    only = takedown.takedown(shards, Wanted(files=[tmp_path / "it.png"]), dry_run=True)
    assert only.samples == 0
    near = takedown.takedown(shards, Wanted(files=[tmp_path / "it.png"], near=12))
    assert [stone.key for stone in near.taken] == ["k002", "k005"]


class Killed(BaseException):
    """Like kill -9: nothing that only catches errors sees it."""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_anywhere_and_run_again_gives_the_same_bytes(built, tmp_path, make, monkeypatch, every):
    first, gone = (pq.read_table(built / "shards" / f"0000{n}.parquet")["key"].to_pylist() for n in (1, 2))
    keys = [first[0], *gone]
    expected = Path(shutil.copytree(built, tmp_path / "expected"))
    takedown.takedown(expected, Wanted(keys=keys))
    left = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments, **options)

        return call

    for module, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (shutil, "rmtree"), (files, "sync_folder")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(takedown, "sync_folder", files.sync_folder)
    kills, refused, point = 0, 0, 0
    while True:
        work = Path(shutil.copytree(built, tmp_path / f"work{kills}"))
        point += every
        left = point
        try:
            takedown.takedown(work, Wanted(keys=keys))
        except Killed:
            left = 0
        else:
            break
        try:  # what a reader finds in between: the old set, the new one, or a clear refusal
            found = set(everything(work))
            assert found in (set(everything(built)), set(everything(expected)))
            assert list(ShardSet.open(work).verify()) == []
        except DataError as error:
            assert "a takedown in" in str(error)
            refused += 1
        if kills % 4 == 0:  # another call ends it as well
            takedown.takedown(work, Wanted(keys=["nobody"]))
        takedown.takedown(work, Wanted(keys=keys))
        assert make.hashes(work) == make.hashes(expected)
        kills += 1
        original_rmtree(work)
    assert kills > 20 // every and refused > 5 // every


original_rmtree = shutil.rmtree


def test_a_set_that_is_half_done_is_not_read(shards, monkeypatch):
    def stop(path: Path) -> None:
        if (path / shardset.TAKEDOWN / "ready.json").exists():
            (path / "manifest.json").unlink()
            raise Killed

    monkeypatch.setattr(takedown, "_finish", stop)
    with pytest.raises(Killed):
        takedown.takedown(shards, Wanted(keys=["k004"]))
    with pytest.raises(DataError, match="run `python -m data_pipeline takedown"):
        ShardSet.open(shards)


def test_a_damaged_shard_is_not_copied_over(shards, make):
    name = next(
        p for p in sorted((shards / "shards").glob("*.parquet")) if "k004" in pq.read_table(p)["key"].to_pylist()
    )
    data = bytearray(name.with_suffix(".tar").read_bytes())
    data[len(data) // 2] ^= 1
    name.with_suffix(".tar").write_bytes(data)
    before = make.hashes(shards)
    with pytest.raises(DataError, match="nothing was taken down"):
        takedown.takedown(shards, Wanted(keys=["k004"]))
    assert make.hashes(shards) == before


def test_the_last_sample_and_wrong_words_are_refused(shards, tmp_path):
    with pytest.raises(DataError, match="leave no sample"):
        takedown.takedown(shards, Wanted(keys=list(everything(shards))))
    with pytest.raises(UsageError, match="no sha256"):
        takedown.takedown(shards, Wanted(hashes=["abc"]))
    with pytest.raises(UsageError, match="cannot read it"):
        takedown.takedown(shards, Wanted(files=[tmp_path / "none.png"]))
    with pytest.raises(DataError, match="no such folder"):
        takedown.takedown(tmp_path / "nowhere", Wanted(keys=["a"]))
    assert not (shards / shardset.TAKEDOWN).exists()


def test_runs_that_saw_the_set_are_named_with_their_steps(shards, tmp_path):
    def run(name: str, sha256: str, lines: str) -> None:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({"stage": "wsp", "shards_sha256": sha256}))
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(lines)

    first = ShardSet.open(shards).sha256
    run("one", first, '{"step": 10}\n{"step": 20}\n{"st')
    run("deep/two", "00", '{"step": 10}\n')
    outcome = takedown.takedown(shards, Wanted(keys=["k004"]), runs=[tmp_path / "runs"])
    assert [(run.folder.name, run.stage, run.steps) for run in outcome.runs] == [("one", "wsp", 20)]
    run("three", outcome.after, "")
    outcome = takedown.takedown(shards, Wanted(keys=["k005"]), runs=[tmp_path / "runs"])
    assert [(run.folder.name, run.steps, run.set_sha256 == first) for run in outcome.runs] == [
        ("one", 20, True), ("three", 0, False)
    ]  # fmt: skip


def test_a_later_build_lets_none_of_it_in_again(run, make, tmp_path):
    source = make.parquet(tmp_path / "in.parquet", make.rows(12))
    command = ("build", "--input", source, "--output", tmp_path / "out", "--workers", 1)
    assert run(*command).code == 0
    result = run("takedown", tmp_path / "out", "--keys", "k004", "k005", "--reason", "asked")
    assert result.code == 0, result.err
    assert "2 pictures" in result.out
    again = run(*command)
    assert (again.code, "up to date" in again.out) == (0, True)
    without = run(*command, "--overwrite")
    assert without.code == 2
    assert "add --tombstones" in without.err
    rebuilt = run(*command, "--overwrite", "--tombstones", tmp_path / "out" / NAME)
    assert rebuilt.code == 0, rebuilt.err
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest["counts"]["dropped"]["taken_down"] == 2
    assert set(make.records(tmp_path / "out")) == {f"k{n:03d}" for n in range(12)} - {"k004", "k005"}
    assert len((tmp_path / "out" / NAME).read_text().splitlines()) == 2
    assert run("takedown", tmp_path / "out", "--keys", "k006").code == 0
    assert len((tmp_path / "out" / NAME).read_text().splitlines()) == 3


def test_copies_of_a_materialised_set_go_together(build, make):
    _, shards = build(make.rows(12), "--epoch-factor", 3, "--materialise")
    copies = [key for key in everything(shards) if key.startswith("k001")]
    assert len(copies) > 1
    before = ShardSet.open(shards)
    outcome = takedown.takedown(shards, Wanted(keys=["k001"]))
    after = ShardSet.open(shards)
    assert (outcome.samples, len(outcome.taken)) == (len(copies), 1)
    assert not [key for key in everything(shards) if key.startswith("k001")]
    assert sum(e.count for e in before.vocabulary) - sum(e.count for e in after.vocabulary) == 2  # #dog and #cat
    assert after.manifest["resampling"]["samples_per_epoch"] == len(after)
