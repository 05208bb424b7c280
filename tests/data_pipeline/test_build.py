"""What ends up in the shards, and what is dropped with which count."""

from collections import Counter

import pyarrow.parquet as pq
import pytest

from data_pipeline.resample import Repeats
from data_pipeline.shardset import ShardSet
from data_pipeline.steps.shards import cut


def test_every_image_ends_in_exactly_one_place(build, make):
    """read = kept + dropped, whatever is wrong with them."""
    rows = [row | {"licence": "CC0"} for row in make.rows(12)]
    rows[0]["image"] = b"not an image"
    rows[1]["image"] = rows[1]["image"][:-30]
    rows[2]["image"] = None
    rows[3]["image"] = make.picture(3, (300, 4))
    rows[4]["caption"] = "no hashtag here"
    rows[5]["caption"] = "#happy is no noun"
    rows[6]["caption"] = None
    rows[7]["caption"] = "#dog " + "x" * 10_000
    rows[8]["key"] = "k009"
    rows[10]["key"] = ""
    rows[11]["licence"] = "x" * 2000
    manifest, output = build(rows)
    counts = manifest["counts"]
    cut_off = {name: counts["dropped"].pop(name, 0) for name in ("undecodable", "truncated")}
    assert sum(cut_off.values()) == 1
    assert counts["dropped"] == {
        "bad_key": 1,
        "caption_too_long": 1,
        "duplicate_key": 1,
        "missing_image": 1,
        "no_caption": 1,
        "no_hashtags": 1,
        "no_synset": 1,
        "text_too_long": 1,
        "too_small": 1,
        "unsupported_format": 1,
    }
    assert (counts["read"], counts["kept"], manifest["samples"]) == (12, 1, 1)
    assert set(make.records(output)) == {"k009"}


def test_the_first_of_equal_keys_stays(build, make):
    rows = make.rows(3)
    for row, caption in zip(rows, ("first #dog", "second #cat", "third #snow"), strict=True):
        row |= {"key": "same", "caption": caption}
    manifest, output = build(rows)
    assert make.records(output)["same"]["caption"] == "first #dog"
    assert manifest["counts"]["dropped"] == {"duplicate_key": 2}


def test_synonyms_are_one_class_with_the_sum_of_their_images(build, make):
    rows = make.rows(5)
    for row, caption in zip(
        rows, ("#brownbear", "#ursusarctos", "#UrsusArctos #Brown_Bears", "#dog", "#dogs"), strict=True
    ):
        row["caption"] = caption
    _, output = build(rows)
    vocabulary = {entry.synset: entry.count for entry in ShardSet.open(output).vocabulary}
    assert vocabulary == {"brown_bear.n.01": 3, "dog.n.01": 2}
    assert make.records(output)["k002"]["labels"] == [0]


def test_a_sample_carries_all_that_is_known(build, make):
    row = make.rows(1)[0] | {"caption": "two #dogs, #happy, #dog", "source": "flickr", "licence": "CC0"}
    _, output = build([row])
    shards = ShardSet.open(output)
    assert shards.record(0, 0) == {
        "key": "k000",
        "caption": "two #dogs, #happy, #dog",
        "language": "en",
        "hashtags": ["dogs", "happy", "dog"],
        "synsets": ["dog.n.01"],
        "labels": [0],
        "repeat": 5 / 3,
        "source": "flickr",
        "licence": "CC0",
    }
    assert shards.image_bytes(0, 0) == row["image"]


def test_vocabulary_counts_are_the_images_that_carry_the_label(build, make):
    manifest, output = build(make.rows(50), "--samples-per-shard", 7, "--min-count", 3)
    shards = ShardSet.open(output)
    labels = [
        label
        for shard in range(shards.num_shards)
        for row in shards.index(shard)["labels"].to_pylist()
        for label in row
    ]
    assert Counter(labels) == {entry.index: entry.count for entry in shards.vocabulary}
    assert [entry.count for entry in shards.vocabulary] == sorted(Counter(labels).values(), reverse=True)
    assert manifest["counts"]["labels"] == len(labels)


def test_repeat_factors_have_the_asked_mean_and_follow_the_rarest_label(build, make):
    manifest, output = build(make.rows(60), "--epoch-factor", 1.4)
    shards = ShardSet.open(output)
    count = {entry.index: entry.count for entry in shards.vocabulary}
    index = shards.index(0).to_pylist()
    repeats = Repeats(manifest["resampling"]["threshold"], len(index))
    assert [row["repeat"] for row in index] == [repeats.of([count[label] for label in row["labels"]]) for row in index]
    assert sum(row["repeat"] for row in index) / len(index) == pytest.approx(1.4)
    assert manifest["resampling"]["mean_repeat"] == pytest.approx(1.4)


def test_without_resampling_all_repeats_are_one(build, make):
    _, output = build(make.rows(20), "--resample", "none")
    assert set(ShardSet.open(output).index(0)["repeat"].to_pylist()) == {1.0}


def test_rare_synsets_are_no_class_and_their_images_are_dropped_or_kept(run, make, tmp_path):
    rows = [*make.rows(6), make.rows(1, 6)[0] | {"key": "rare", "caption": "#aardvark"},
            make.rows(1, 7)[0] | {"key": "both", "caption": "#aardvark #dog"}]  # fmt: skip
    file = make.parquet(tmp_path / "in.parquet", rows)
    options = ("--input", file, "--workers", 1, "--min-count", 3)
    assert run("build", *options, "--output", tmp_path / "a").code == 0
    assert run("build", *options, "--output", tmp_path / "b", "--keep-unlabelled").code == 0
    dropped, kept = ShardSet.open(tmp_path / "a"), ShardSet.open(tmp_path / "b")
    assert "aardvark.n.01" not in {entry.synset for entry in dropped.vocabulary}
    assert dropped.vocabulary == kept.vocabulary
    assert (
        dropped.manifest["counts"]["dropped"]["below_min_count"]
        == kept.manifest["counts"]["unlabelled"]["below_min_count"]
    )
    assert "rare" not in make.records(tmp_path / "a")
    record = make.records(tmp_path / "b")["rare"]
    assert (record["labels"], record["repeat"], record["synsets"]) == ([], 1.0, ["aardvark.n.01"])


def test_samples_are_cut_into_even_shards_in_an_order_that_mixes_the_input(build, make):
    _, output = build(make.rows(50), "--samples-per-shard", 12)
    shards = ShardSet.open(output)
    assert shards.shard_sizes == [10, 10, 10, 10, 10]
    keys = [shards.index(shard)["key"].to_pylist() for shard in range(5)]
    assert all(shard == sorted(shard) for shard in keys)
    assert all(max(shard) > "k030" and min(shard) < "k020" for shard in keys)


@pytest.mark.parametrize("sizes", [[7], [0, 7, 0], [3, 4, 100, 1], [1] * 30, [0]])
@pytest.mark.parametrize("per_shard", [1, 5, 1000])
def test_cutting_takes_every_row_once_and_in_order(sizes, per_shard):
    slices = cut(sizes, per_shard)
    taken = [(s["partition"], row) for s in slices for row in range(s["start"], s["stop"])]
    assert taken == [(partition, row) for partition, size in enumerate(sizes) for row in range(size)]
    filled = Counter()
    for s in slices:
        filled[s["shard"]] += s["stop"] - s["start"]
    if filled:
        assert max(filled.values()) <= per_shard
        assert max(filled.values()) - min(filled.values()) <= 1


def test_hostile_names_and_captions_come_through_as_data(build, make):
    keys = ["../../etc/passwd", "/abs", "a.b.c", "a\nb", "[red]x[/red]", "\u202ek", "k"]
    captions = [
        '#dog "quote" \\',
        "#dog \x1b[31m",
        "#dog\u2028",
        "#dog </script>",
        "#dog [bold]",
        "#dog {}",
        "#dog 🐶",
    ]
    pictures = make.rows(len(keys))
    rows = [row | {"key": k, "caption": c} for row, k, c in zip(pictures, keys, captions, strict=True)]
    manifest, output = build(rows)
    records = make.records(output)
    assert sorted(record["caption"] for record in records.values()) == sorted(map(str.strip, captions))
    assert all(not key.startswith("/") and ".." not in key and "." not in key for key in records)
    assert manifest["counts"]["kept"] == len(keys)


def test_resizing_is_off_unless_asked(build, make, tmp_path):
    rows = [make.rows(1)[0] | {"key": f"k{n}", "image": make.picture(n, (40, 60), kind)}
            for n, kind in enumerate(("png", "jpeg", "webp", "bmp"))]  # fmt: skip
    _, output = build(rows)
    shards = ShardSet.open(output)
    members = shards.index(0)["member"].to_pylist()
    assert members == ["k0.png", "k1.jpg", "k2.webp", "k3.png"]
    assert [shards.image_bytes(0, n) for n in range(3)] == [row["image"] for row in rows[:3]]
    _, output = build(rows, "--resize", 16, "--quality", 80, "--overwrite")
    shards = ShardSet.open(output)
    assert shards.index(0)["member"].to_pylist() == [f"k{n}.jpg" for n in range(4)]


def test_bytes_do_not_depend_on_workers_or_partitions(run, make, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.PIECE_ROWS", 10)
    make.parquet(tmp_path / "in" / "in.parquet", make.rows(25), row_group_size=9)
    options = ("--input", make.folder(tmp_path / "in" / "photos", 20).parent, "--samples-per-shard", 8)
    expected = None
    for workers, partition_rows in ((1, 1000), (2, 1000), (1, 4)):
        monkeypatch.setattr(
            "data_pipeline.build.build.__kwdefaults__", {"overwrite": False, "partition_rows": partition_rows}
        )
        output = tmp_path / f"out{workers}{partition_rows}"
        assert run("build", *options, "--output", output, "--workers", workers).code == 0
        expected = expected or make.hashes(output)
        assert make.hashes(output) == expected
    assert expected is not None
    tables = {f"{name}.parquet" for name in ("vocabulary", "dropped", "tags", "evidence", "duplicates")}
    beside = {name for name in expected if not name.startswith("shards/")}
    assert beside == {"manifest.json", "deny_list.yaml"} | tables
    assert len(expected) - len(beside) == 2 * 6  # nothing but six shards and their indexes


def test_the_vocabulary_is_a_table_of_synsets(build, make):
    _, output = build(make.rows(12))
    table = pq.read_table(output / "vocabulary.parquet").to_pylist()
    dog = next(row for row in table if row["synset"] == "dog.n.01")
    assert (dog["wnid"], dog["lemmas"][0]) == ("n02084071", "dog")


def test_nothing_kept_says_why_and_leaves_nothing(run, make, tmp_path):
    rows = [row | {"caption": "no tags"} for row in make.rows(3)]
    file = make.parquet(tmp_path / "in.parquet", rows)
    result = run("build", "--input", file, "--output", tmp_path / "shards", "--workers", 1)
    assert result.code == 1
    assert "no image was kept of 3: 3 no_hashtags" in result.err
    assert "--keep-unlabelled" in result.err
    assert not (tmp_path / "shards").exists()
