import shutil
from collections import Counter
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import vocabulary
from data_pipeline.errors import DataError, UsageError
from data_pipeline.shardset import ShardSet, VocabularyEntry, write_vocabulary
from data_pipeline.vocabulary import choose, choose_minimum, minimum_for_size
from data_pipeline.wordnet import WordNet

COUNTS = dict(enumerate([90, 40, 40, 40, 7, 7, 3, 1, 1, 1, 1, 1]))


@pytest.mark.parametrize(
    ("size", "minimum"),
    [(1, 90), (2, 90), (3, 40), (4, 40), (5, 40), (6, 7), (7, 3), (9, 3), (10, 1), (12, 1), (99, 1)],
)
def test_a_size_gives_the_threshold_with_the_nearest_number_of_classes(size, minimum):
    assert minimum_for_size(COUNTS, size) == minimum
    classes = {threshold: sum(count >= threshold for count in COUNTS.values()) for threshold in set(COUNTS.values())}
    nearest = min(abs(number - size) for number in classes.values())
    assert abs(classes[minimum] - size) == nearest
    assert minimum == max(threshold for threshold, number in classes.items() if abs(number - size) == nearest)


def test_ties_are_never_split_and_something_always_remains():
    assert minimum_for_size({1: 5, 2: 5, 3: 5}, 1) == 5
    assert minimum_for_size({}, 3) == 1


def test_a_size_and_a_least_count_hold_both():
    assert choose_minimum(COUNTS, 0, "auto", 12) == 1
    assert choose_minimum(COUNTS, 0, "5", 12) == 5
    assert choose_minimum(COUNTS, 0, "5", 1) == 90
    with pytest.raises(UsageError, match="from 1"):
        choose_minimum(COUNTS, 0, "auto", 0)


def test_classes_are_ordered_by_images_and_then_by_wnid(nouns):
    classes = choose({500: 3, 20: 3, 9: 8, 11: 2}, 3, nouns)
    assert [entry.count for entry in classes.entries] == [8, 3, 3]
    assert classes.rows == [9, *sorted((20, 500), key=lambda row: nouns.synset(row).wnid)]
    assert [entry.synset for entry in classes.entries] == [nouns.synset(row).name for row in classes.rows]


@pytest.fixture
def file(nouns, tmp_path):
    path = tmp_path / "vocabulary.parquet"
    vocabulary.write(path, choose({500: 3, 20: 3, 9: 8}, 1, nouns).entries, nouns)
    return path


def test_a_frozen_vocabulary_keeps_its_indices_and_shows_both_counts(file, nouns):
    frozen = choose({500: 3, 20: 3, 9: 8}, 1, nouns)
    again = vocabulary.reuse(file, {500: 10, 77: 4}, nouns)
    assert again.rows == frozen.rows
    assert [(e.index, e.synset) for e in again.entries] == [(e.index, e.synset) for e in frozen.entries]
    assert {row: (e.count, e.frozen_count) for row, e in zip(again.rows, again.entries, strict=True)} == {
        9: (0, 8), 20: (0, 3), 500: (10, 3)
    }  # fmt: skip


def test_a_vocabulary_used_a_third_time_still_names_the_corpus_it_was_chosen_on(file, nouns, tmp_path):
    vocabulary.write(tmp_path / "second.parquet", vocabulary.reuse(file, {500: 10}, nouns).entries, nouns)
    third = vocabulary.reuse(tmp_path / "second.parquet", {9: 1}, nouns)
    assert [(e.count, e.frozen_count) for e in third.entries if e.synset == nouns.synset(9).name] == [(1, 8)]


def test_a_changed_row_is_refused(file, nouns):
    table = pq.read_table(file)
    swapped = table.set_column(1, "synset", pa.array(table["synset"].to_pylist()[::-1]))
    pq.write_table(swapped.replace_schema_metadata(table.schema.metadata), file)
    with pytest.raises(DataError, match="its digest does not fit"):
        vocabulary.read(file, nouns)


def test_another_wordnet_is_refused(file, nouns):
    names = nouns.synsets["synset"].to_pylist()
    names[0], names[1] = names[1], names[0]
    other = WordNet(nouns.synsets.set_column(0, "synset", pa.array(names)), nouns.lemmas, nouns.exceptions)
    with pytest.raises(DataError, match="another WordNet"):
        vocabulary.read(file, other)


def test_files_that_are_no_vocabulary_are_refused(file, nouns, tmp_path):
    write_vocabulary(tmp_path / "old.parquet", [VocabularyEntry(0, "dog.n.01", "n02084071", [], "", 1)])
    with pytest.raises(DataError, match="does not say which WordNet"):
        vocabulary.read(tmp_path / "old.parquet", nouns)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="its columns are x"):
        vocabulary.read(tmp_path / "other.parquet", nouns)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match="cannot be read"):
        vocabulary.read(file, nouns)
    with pytest.raises(UsageError, match="no such file"):
        vocabulary.read(tmp_path / "none.parquet", nouns)


# --------------------------------------------------------------------------------------------------------- whole builds


def test_a_second_set_with_the_classes_of_the_first(build, run, make, tmp_path):
    _, first = build(make.rows(30))
    first = shutil.move(first, tmp_path / "first")
    rows = make.rows(12)
    for row, caption in zip(rows, ["#dog #aardvark", "#aardvark", "#cat #dog", *["#dog"] * 9], strict=True):
        row["caption"] = caption
    manifest, second = build(rows, "--vocabulary", first)
    before, after = ShardSet.open(first).vocabulary, ShardSet.open(second).vocabulary
    assert [(e.index, e.synset) for e in after] == [(e.index, e.synset) for e in before]
    assert [e.frozen_count for e in after] == [e.count for e in before]
    labels = Counter(label for record in make.records(second).values() for label in record["labels"])
    assert {e.index: e.count for e in after if e.count} == labels
    assert manifest["counts"]["dropped"]["not_in_vocabulary"] == 1
    assert manifest["counts"]["synsets_outside"] == 1
    assert manifest["counts"]["classes_without_images"] == sum(e.count == 0 for e in after) > 0
    assert "vocabulary" in manifest["decisions"]
    text = run("inspect", second, "--workers", 1).out
    assert "of a frozen vocabulary" in text
    result = run("build", "--input", tmp_path / "in.parquet", "--output", second, "--vocabulary", second)
    assert (result.code, "copy it first" in result.err) == (2, True)
    strangers = make.parquet(tmp_path / "strangers.parquet", [row | {"caption": "#aardvark"} for row in make.rows(2)])
    result = run("build", "--input", strangers, "--output", tmp_path / "none", "--vocabulary", first, "--workers", 0)
    assert (result.code, "no synset of the others is a class of --vocabulary" in result.err) == (1, True)


def test_the_asked_size_is_met_as_ties_allow(build, make):
    manifest, output = build(make.rows(60), "--vocabulary-size", 2)
    vocabulary_ = ShardSet.open(output).vocabulary
    assert manifest["classes"] == len(vocabulary_)
    assert manifest["counts"]["min_count"] == min(entry.count for entry in vocabulary_)
    assert all(a.count >= b.count for a, b in pairwise(vocabulary_))


@pytest.mark.parametrize("options", [("--epoch-samples", 90), ("--resample", "identity", "--epoch-samples", 90),
                                     ("--resample", "cap", "--epoch-samples", 30)])  # fmt: skip
def test_an_epoch_has_the_asked_number_of_samples(build, make, options):
    rows = make.rows(40)
    for row in rows[:5]:
        row["caption"] = "nothing to see"
    manifest, output = build(rows, "--keep-unlabelled", *options)
    repeats = [record["repeat"] for record in make.records(output).values()]
    assert sum(repeats) == pytest.approx(options[-1])
    assert manifest["resampling"]["samples_per_epoch"] == pytest.approx(options[-1])


def test_cap_weighs_all_labels_of_an_image(build, make):
    manifest, output = build(make.rows(60), "--resample", "cap", "--epoch-factor", "3/4")
    count = {entry.index: entry.count for entry in ShardSet.open(output).vocabulary}
    kept = manifest["resampling"]["threshold"] * 60
    for record in make.records(output).values():
        missed = 1.0
        for label in record["labels"]:
            missed *= 1 - min(1, kept / count[label])
        assert record["repeat"] == pytest.approx(1 - missed)
    assert manifest["resampling"]["mean_repeat"] == pytest.approx(0.75)


def test_materialised_copies_stand_for_the_repeat_factors(build, make, tmp_path):
    _, factors = build(make.rows(40), "--epoch-factor", 2.5)
    factors = shutil.move(factors, tmp_path / "factors")
    manifest, output = build(make.rows(40), "--epoch-factor", 2.5, "--materialise", "--samples-per-shard", 9)
    copies, once = make.records(output), make.records(factors)
    number = Counter(key.partition("+")[0] for key in copies)
    for key, record in once.items():
        assert int(record["repeat"]) <= number[key] <= int(record["repeat"]) + 1
    assert {record["repeat"] for record in copies.values()} == {1.0}
    for key, record in copies.items():
        original = once[key.partition("+")[0]]
        assert record | {"key": 0, "repeat": 0} == original | {"key": 0, "repeat": 0}
    assert manifest["samples"] == len(copies) == manifest["resampling"]["samples_per_epoch"]
    assert [e.count for e in ShardSet.open(output).vocabulary] == [e.count for e in ShardSet.open(factors).vocabulary]
    assert list(ShardSet.open(output).verify()) == []
