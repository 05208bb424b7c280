import gc
import io
import json
import pickle
import tarfile
import threading

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.shardset import (
    Sample,
    ShardSet,
    VocabularyEntry,
    manifest_bytes,
    safe_key,
    write_manifest,
    write_shard,
    write_vocabulary,
)

CAPTIONS = ["plain", 'quotes " and \\ and {"json": 1}', "a\u2028b\x00c\x1b[31m", "हिन्दी 犬 🐶", ""]


@pytest.fixture
def shards(tmp_path, make):
    """Two shards written by hand: 5 and 3 samples."""
    entries = []
    for name, numbers in (("00000", range(5)), ("00001", range(5, 8))):
        samples = [
            Sample(
                key=f"dir/k{n}",
                image=make.picture(n, (8 + n, 9), "jpeg" if n % 2 else "png"),
                extension="jpg" if n % 2 else "png",
                record={"key": f"dir/k{n}", "caption": CAPTIONS[n % 5], "labels": [0] * (n > 0), "repeat": 1.0 + n / 3},
                labels=[0] * (n > 0),
                repeat=1.0 + n / 3,
            )
            for n in numbers
        ]
        entries.append(write_shard(tmp_path / "shards", name, samples))
    vocabulary = [VocabularyEntry(0, "dog.n.01", "n02084071", ["dog", "domestic_dog"], "", 7)]
    digest = write_vocabulary(tmp_path / "vocabulary.parquet", vocabulary)
    write_manifest(tmp_path, {"samples": 8, "classes": 1, "shards": entries, "vocabulary_sha256": digest})
    return tmp_path


def test_what_was_written_is_read(shards, make):
    read = ShardSet.open(shards)
    assert (len(read), read.num_shards, read.shard_sizes) == (8, 2, [5, 3])
    assert read.vocabulary == [VocabularyEntry(0, "dog.n.01", "n02084071", ["dog", "domestic_dog"], "", 7)]
    assert read.image_bytes(1, 0) == make.picture(5, (13, 9), "jpeg")
    assert [read.record(0, row)["caption"] for row in range(5)] == CAPTIONS
    assert read.index(1)["repeat"].to_pylist() == [1.0 + n / 3 for n in (5, 6, 7)]
    assert list(read.verify()) == []


def test_the_tar_is_an_ordinary_one_and_the_offsets_point_into_it(shards):
    index = pq.read_table(shards / "shards" / "00000.parquet").to_pylist()
    data = (shards / "shards" / "00000.tar").read_bytes()
    assert len(data) % 10240 == 0  # whole records, as tar(1) writes them
    assert data.endswith(bytes(1024))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:2]] == ["dir/k0.json", "dir/k0.png"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        for row in index:
            for name, start, size in (
                (row["member"], row["image_offset"], row["image_size"]),
                (f"{row['key']}.json", row["json_offset"], row["json_size"]),
            ):
                file = archive.extractfile(name)
                assert file is not None
                assert file.read() == data[start : start + size]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves tars to the collector
def test_plain_webdataset_reads_it(shards):
    urls = [str(path) for path in sorted((shards / "shards").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"dir/k{n}" for n in range(8)]
    assert [sample["json"]["caption"] for sample in samples] == [CAPTIONS[n % 5] for n in range(8)]
    assert isinstance(samples[1]["jpg"], Image.Image)
    assert samples[2]["png"].size == (10, 9)
    gc.collect()


def test_a_reader_works_in_threads_and_after_pickling(shards):
    read = pickle.loads(pickle.dumps(ShardSet.open(shards)))  # noqa: S301
    places = [(shard, row) for shard, size in enumerate(read.shard_sizes) for row in range(size)] * 20
    expected = {place: read.image_bytes(*place) for place in places}
    wrong = []

    def look(start: int) -> None:
        wrong.extend(place for place in places[start:] if read.image_bytes(*place) != expected[place])

    threads = [threading.Thread(target=look, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["shards/00000.tar", "shards/00001.parquet", "vocabulary.parquet", "manifest.json"])
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_flipped_byte_is_found_and_its_file_named(shards, name, place):
    data = bytearray((shards / name).read_bytes())
    data[int(len(data) * place)] ^= 4
    (shards / name).write_bytes(data)
    try:
        problems = list(ShardSet.open(shards).verify())
    except DataError as error:
        problems = [str(error)]
    assert len(problems) == 1
    assert str(shards / name) in problems[0]


def test_missing_short_and_swapped_files_are_found(shards):
    (shards / "shards" / "00001.parquet").unlink()
    with (shards / "shards" / "00000.tar").open("r+b") as file:
        file.truncate(5000)
    problems = list(ShardSet.open(shards).verify())
    assert len(problems) == 2
    assert "5,000 bytes" in problems[0]
    assert "00001.parquet is missing" in problems[1]


def test_an_index_that_does_not_fit_its_tar_is_found(shards):
    """Both files whole, but of different builds: hashes say nothing then."""
    folder = shards / "shards"
    (folder / "00000.parquet").write_bytes((folder / "00001.parquet").read_bytes())
    manifest = json.loads((shards / "manifest.json").read_bytes())
    manifest["shards"][0]["index_sha256"] = manifest["shards"][1]["index_sha256"]
    (shards / "manifest.json").write_bytes(manifest_bytes(manifest))
    (problem,) = ShardSet.open(shards).verify()
    assert "does not fit" in problem


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.joinpath("manifest.json").unlink(), "not a shard set: it has no manifest.json"),
        (lambda folder: folder.joinpath("manifest.json").write_text("{]"), "damaged or not the manifest"),
        (lambda folder: folder.joinpath("manifest.json").write_text("[" * 100_000), "damaged or not the manifest"),
        (lambda folder: folder.joinpath("manifest.json").write_text('{"format": 2}'), "this version reads up to 1"),
    ],
)
def test_what_is_no_shard_set_is_refused(shards, prepare, message):
    prepare(shards)
    with pytest.raises(DataError, match=message):
        ShardSet.open(shards)


def test_a_folder_that_is_not_there_says_what_makes_one(tmp_path):
    with pytest.raises(DataError, match="no such folder; make one with `python -m data_pipeline build`"):
        ShardSet.open(tmp_path / "nowhere")


def test_an_unfinished_build_says_so(tmp_path):
    (tmp_path / ".work").mkdir()
    with pytest.raises(DataError, match="unfinished build"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("key", ["a", "A-b_9/c", "x" * 90])
def test_safe_keys_stay_as_they_are(key):
    assert safe_key(key) == key


HOSTILE = ["../../etc/passwd", "/root", "a/../b", ".hidden", "a.b", "a b", "a\nb", "a\x00b", "a//b", "a/", "x" * 91,
           "-", "--", "~", "C:\\x", "a/./b", "\u202egnp.exe", " ", "é", "e\u0301", "犬", "/", "//", "."]  # fmt: skip


def test_hostile_keys_become_plain_and_stay_apart():
    keys = [safe_key(key) for key in HOSTILE]
    assert len(set(keys)) == len(HOSTILE)
    for key in keys:
        assert len(key) <= 90
        assert all(part and set(part) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
                   for part in key.split("/"))  # fmt: skip
