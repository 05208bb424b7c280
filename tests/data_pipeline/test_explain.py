import hashlib
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline import explain
from data_pipeline.lookup import Lookup, base_key
from data_pipeline.shardset import Sample, ShardSet, write_manifest, write_shard, write_vocabulary
from data_pipeline.summary import Printer

OVERRIDES = """
force: {doggo: dog.n.01}
forbid: [snow]
merge: {kitten.n.01: cat.n.01}
"""


def write_set(folder: Path, keys: list[str], size: int) -> ShardSet:
    """A set as a build cuts it: sorted by sha256 of the key (copies with their first), inside a shard by key."""
    keys = sorted(keys, key=lambda key: (hashlib.sha256(base_key(key).encode()).digest(), key))
    shards = []
    for start in range(0, len(keys), size):
        samples = (Sample(key, b"x", "jpg", {"key": key}, [], 1.0) for key in sorted(keys[start : start + size]))
        shards.append(write_shard(folder / "shards", f"{start // size:05d}", samples))
    digest = write_vocabulary(folder / "vocabulary.parquet", [])
    write_manifest(folder, {"shards": shards, "vocabulary_sha256": digest})
    return ShardSet.open(folder)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_every_key_is_found_where_a_scan_finds_it_and_no_other(tmp_path, size):
    keys = [f"photos/k{n:02d}" for n in range(37)]
    lookup = Lookup(write_set(tmp_path, keys, size))
    scanned = lookup.scan(set(keys))
    assert {key: lookup.find(key) for key in keys} == scanned
    assert [lookup.find(key) for key in ("", "photos/k0", "photos/k370", "zzz", "\udc80")] == [[]] * 5


def test_a_key_is_found_with_few_of_the_indexes(tmp_path, monkeypatch):
    shards = write_set(tmp_path, [f"k{n}" for n in range(64)], 1)
    read: list[int] = []
    keys = Lookup.keys
    monkeypatch.setattr(Lookup, "keys", lambda self, shard: (read.append(shard), keys(self, shard))[1])
    assert len(Lookup(shards).find("k27")) == 1
    assert len(set(read)) <= 7  # log2(64), and the shard itself


def test_copies_are_found_with_their_first_and_alone(tmp_path):
    keys = ["a", "a+10", "a+2", "a-2", "a/b", "a1", "b+2"]
    lookup = Lookup(write_set(tmp_path, keys, 7))
    assert [row for _, row in lookup.find("a")] == [0, 1, 2]
    assert [row for _, row in lookup.find("a+2")] == [2]
    assert len(lookup.find("a-2")) == 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make) -> Path:
    from data_pipeline.__main__ import main

    folder = tmp_path_factory.mktemp("explain")
    rows = [row | {"source": "flickr"} for row in make.rows(24)]
    captions = {
        0: "#doggo and #kittens in the #snow", 1: "#film #movie #cinema", 2: "#december #lesbian #qwertz",
        3: "#aardvark #dog", 4: "nothing", 5: "#whale #jaguar",
    }  # fmt: skip
    for n, caption in captions.items():
        rows[n]["caption"] = caption
    rows.append(rows[7] | {"key": "copy"})
    rows.append(rows[8] | {"key": "broken", "image": b"?"})
    make.parquet(folder / "in.parquet", rows)
    (folder / "mine.yaml").write_text(OVERRIDES)
    command = [
        "build",
        "--input",
        folder / "in.parquet",
        "--output",
        folder / "shards",
        "--workers",
        1,
        "--min-count",
        2,
    ]
    assert main([str(word) for word in (*command, "--overrides", folder / "mine.yaml")]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def opened(shards) -> explain.Words:
    return explain.Words(ShardSet.open(shards), Printer())


@pytest.fixture
def tag(opened, capsys):
    def call(text: str) -> str:
        opened.tag(text)
        return " ".join(capsys.readouterr().out.split())

    return call


@pytest.fixture
def words(run, shards):
    def call(what: str, folder: Path = shards) -> str:
        result = run("explain", folder, what)
        assert result.code == 0, result.err
        return " ".join(result.out.split())

    return call


def test_a_sample_says_how_each_tag_became_a_label(words, make, shards):
    text = words("k000")
    assert "#doggo dog.n.01 forced by the overrides" in text
    assert "#kittens cat.n.01 merged into cat.n.01 by the overrides" in text
    assert "#snow - dropped, forbidden: forbidden by the overrides" in text
    record = make.records(shards)["k000"]
    assert f"seen {record['repeat']:.3f} times an epoch" in text
    count = {entry.synset: entry for entry in ShardSet.open(shards).vocabulary}
    for synset in ("dog.n.01", "cat.n.01"):
        assert f"{synset} {count[synset].index} {count[synset].count}" in text


def test_a_synset_that_is_no_class_says_why(words):
    assert "aardvark.n.01 - - - - no class: fewer than 2 images" in words("k003")


def test_what_explain_decides_again_is_what_the_build_decided(make, shards, opened, capsys):
    for key in make.records(shards):
        opened.sample(Lookup(opened.shards).find(key))
    text = capsys.readouterr().out
    assert text.count("times an epoch") == len(make.records(shards))
    assert "The set differs" not in text


def test_an_ambiguous_tag_shows_its_senses_with_what_speaks_for_them(run, shards, make):
    records = make.records(shards)
    key = next(key for key, record in records.items() if "cat" in record["hashtags"])
    text = run("explain", shards, key).out
    assert "Senses of #cat" in text
    rows = [line for line in text.splitlines() if line.startswith(">")]
    assert any("cat.n.01" in row for row in rows)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("copy", "was dropped, exact_duplicate: another picture has the same bytes (k007)"),
        ("broken", "broken, of flickr was dropped, unsupported_format"),
        ("k004", "k004, of flickr was dropped, no_hashtags: its caption has no hashtags"),
        ("k002", "k002, of flickr was dropped, no_synset"),
    ],
)
def test_a_dropped_sample_says_why(words, key, expected):
    assert expected in words(key)


def test_a_sample_that_was_taken_down_says_so(run, shards, tmp_path, words):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    assert run("takedown", copy, "--keys", "k003", "--reason", "asked").code == 0
    assert "k003 was taken down: asked" in words("k003", copy)


def test_an_unknown_key_names_those_that_look_like_it(run, shards):
    result = run("explain", shards, "k0003")
    assert result.code == 2
    assert "has no sample 'k0003'" in result.err
    assert "did you mean k003" in result.err


def test_a_hashtag_shows_its_statistics_and_the_fate_of_each_sense(words, tag, shards):
    text = words("#Dog")
    uses = {row["tag"]: row["occurrences"] for row in pq.read_table(shards / "tags.parquet").to_pylist()}
    assert f"{uses['dog']:,} in this corpus" in text
    assert "dog.n.01 a member of the genus Canis" in text
    assert "denied_sensitive: it must not" in tag("#whale")
    assert "kitten.n.01 young domestic cat" in tag("#kittens") and "merged into cat.n.01" in tag("#kittens")
    assert "read as the plural of kitten" in tag("#kittens")
    assert "dropped denied_non_visual" in tag("#december")
    assert "0 in this corpus" in tag("#giraffe")
    assert "dropped unmapped: no noun of WordNet" in tag("#qwertz")


def test_what_is_no_hashtag(run, shards):
    assert "needs a letter" in run("explain", shards, "#12").err
