"""Senses chosen by what stands around a hashtag, against a slow reading of the formula and against people."""

import csv
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import evidence, hashtags, tag_counts
from data_pipeline.errors import DataError
from data_pipeline.synsets import TagTable, first

ROOT = Path(__file__).resolve().parents[2]
CORPUS = [
    "a tall bird at the lake #crane #bird #marsh",
    "#flamingo #bird #marsh #feather",
    "#heron #bird wading in the marsh",
    "#crane #construction lifting steel",
    "#forklift #construction lifting pallets",
    "#bulldozer #construction site",
    *(f"#{thing} in the {place}" for thing in ("dog", "apple", "piano", "scarf") for place in ("house", "park", "sun")),
]


@pytest.fixture(scope="module")
def table(nouns):
    return TagTable(nouns)


@pytest.fixture(scope="module")
def learned(nouns, table):
    return evidence.fit([(caption, hashtags.extract(caption)) for caption in CORPUS], table, nouns)


def chosen(learned, table, nouns, *captions):
    """Synset of every hashtag of every caption."""
    candidates = table.candidates(pa.array([hashtags.extract(c) for c in captions], pa.list_(pa.string())))
    numbers, probability = learned.choose(candidates, captions)
    tags = candidates.tag.tolist()
    names = [
        nouns.synset(candidates.senses[tag][number]).name if number >= 0 else None
        for tag, number in zip(tags, numbers, strict=True)
    ]
    return names, probability


def test_a_crane_beside_a_bird_is_the_bird_and_beside_construction_the_machine(learned, table, nouns):
    names, probability = chosen(
        learned, table, nouns, "#crane #bird", "#crane #construction", "#crane by the #marsh", "lifting with a #crane"
    )
    assert [name for name in names if name and name.startswith("crane")] == [
        "crane.n.05", "crane.n.04", "crane.n.05", "crane.n.04"
    ]  # fmt: skip
    assert ((probability > 0) & (probability <= 1)).all()


def test_terms_speak_for_senses_they_never_stood_beside(learned, table, nouns):
    """No #crane stood beside #feather, but a #flamingo did, and WordNet has both birds under one synset."""
    names, _ = chosen(learned, table, nouns, "#crane with every #feather in place")
    assert names[0] == "crane.n.05"


def test_without_anything_around_it_a_tag_has_its_prior(learned, table, nouns):
    probability, prior, shares = learned.explain("crane", nouns.senses("crane"), "#crane", ["crane"])
    assert shares == {}
    assert probability == pytest.approx(prior)
    assert prior.sum() == pytest.approx(1)


def test_tags_with_one_sense_or_none_need_no_evidence(learned, table, nouns):
    names, probability = chosen(learned, table, nouns, "#flamingo #asdfgh #bird")
    assert names[:2] == ["flamingo.n.01", None]
    assert probability[:2].tolist() == [1.0, 0.0]


def test_the_score_is_the_formula_read_slowly(learned, nouns):
    """P(c | s) from the root down, by the definition, over sums that walk every pair up its hypernyms."""
    senses, caption, tags = nouns.senses("crane"), "#crane #bird lifting", ["crane", "bird"]
    probability, _, shares = learned.explain("crane", senses, caption, tags)
    names = list(learned._terms)
    parents = nouns.synsets["hypernyms"].to_pylist()

    def way(row):
        return [row, *(way(parents[row][0]) if parents[row] else [])]

    counted, totals = {}, {}
    for term, row, value in zip(learned._pairs.terms, learned._pairs.rows, learned._pairs.values, strict=True):
        for node in way(int(row)):
            counted[names[term], node] = counted.get((names[term], node), 0.0) + value
            totals[node] = totals.get(node, 0.0) + value
    images = learned._terms
    kinds = nouns.synsets["lexname"].to_pylist()
    scores = []
    for rank, sense in enumerate(senses, 1):
        kind = learned._kinds[kinds[sense]] / (kinds.count(kinds[sense]) / len(kinds))
        score = evidence.PRIOR_POWER * math.log(nouns.uses("crane")[sense] + evidence.UNSEEN / rank)
        score += evidence.KIND_POWER * math.log(kind)
        score += evidence.PROPER * ("Crane" in nouns.synset(sense).lemmas)
        for number, term in enumerate(("bird", "lifting")):
            share = p = max(images[term], 0.5) / sum(images.values())
            for node in reversed(way(sense)):
                p = (counted.get((term, node), 0.0) + evidence.SMOOTHING * p) / (
                    totals.get(node, 0.0) + evidence.SMOOTHING
                )
            ratio = min(evidence.CLIP[1], max(evidence.CLIP[0], math.log(p / share)))
            assert shares[term][rank - 1] == pytest.approx(evidence.DAMPING * ratio), (number, term)
            score += evidence.DAMPING * ratio
        scores.append(math.exp(score))
    assert probability == pytest.approx([score / sum(scores) for score in scores])


def test_explaining_and_choosing_agree(learned, table, nouns):
    for caption in CORPUS:
        tags = hashtags.extract(caption)
        candidates = table.candidates(pa.array([tags], pa.list_(pa.string())))
        numbers, probability = learned.choose(candidates, [caption])
        for place, tag in enumerate(tags):
            senses, _ = table.lookup(tag)
            told, _, _ = learned.explain(tag, senses, caption, tags)
            assert int(told.argmax()) == numbers[place]
            assert told.max() == pytest.approx(probability[place])


def test_a_batch_changes_nothing(learned, table, nouns, monkeypatch):
    captions = [*CORPUS, "#bat #cave", "#bat #baseball", "#mouse #keyboard"]
    whole = chosen(learned, table, nouns, *captions)
    monkeypatch.setattr(evidence, "BATCH", 2)
    parts = chosen(learned, table, nouns, *captions)
    assert parts[0] == whole[0]
    assert parts[1] == pytest.approx(whole[1])


def test_what_is_saved_chooses_the_same(learned, table, nouns, tmp_path):
    learned.save(tmp_path / "evidence.parquet")
    again = evidence.Evidence.load(tmp_path / "evidence.parquet", nouns)
    again.save(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "evidence.parquet").read_bytes()
    for ours, theirs in zip(chosen(again, table, nouns, *CORPUS), chosen(learned, table, nouns, *CORPUS), strict=True):
        assert list(ours) == pytest.approx(list(theirs)) if isinstance(ours[0], float) else list(ours) == list(theirs)


def test_a_damaged_file_is_refused(nouns, learned, tmp_path):
    path = tmp_path / "evidence.parquet"
    learned.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot read the evidence"):
        evidence.Evidence.load(path, nouns)


def test_a_caption_without_end_costs_no_more_than_its_first_terms(nouns):
    reader = evidence.Terms(nouns)
    endless = " ".join(f"word{n}" for n in range(5000))
    assert len(reader.around(endless, ["crane", "bird"])) == evidence.MAX_TERMS
    assert reader.around(endless, ["crane", "bird"])[:2] == ["crane", "bird"]


def test_an_empty_corpus_leaves_the_prior(nouns, table):
    learned = evidence.fit([], table, nouns)
    names, _ = chosen(learned, table, nouns, "#dog #snow", "")
    assert names == ["dog.n.01", "snow.n.01"]


def test_evidence_finds_what_people_read_clearly_more_often_than_the_first_sense(nouns, table):
    """On the part of the hand-labelled hashtags that nothing was tuned on; figures in benchmarks/README.md."""
    files = sorted(path for path in (ROOT / "demo/emoji").glob("*.parquet") if path.name[:4] not in ("eval", "trai"))
    rows = [row for path in files for row in pq.read_table(path, columns=["key", "caption"]).to_pylist()]
    images = {row["key"]: (row["caption"], hashtags.extract(row["caption"] or "")) for row in rows}
    with (ROOT / "demo/senses/senses.tsv").open(encoding="utf-8", newline="") as file:
        gold = [row for row in csv.DictReader(file, delimiter="\t") if row["split"] == "test" and row["synsets"]]
    assert len(gold) >= 200
    learned = evidence.fit(images.values(), table, nouns)
    candidates = table.candidates(pa.array([images[row["key"]][1] for row in gold], pa.list_(pa.string())))
    starts = candidates.occurrences.offsets.to_numpy()
    right = {}
    for policy, numbers in (
        ("first", first(candidates)),
        ("evidence", learned.choose(candidates, [images[row["key"]][0] for row in gold])[0]),
    ):
        right[policy] = 0
        for start, row in zip(starts, gold, strict=False):
            place = int(start) + images[row["key"]][1].index(row["hashtag"])
            sense = candidates.senses[candidates.tag[place]][numbers[place]]
            right[policy] += nouns.synset(sense).name in row["synsets"].split()
    assert right["evidence"] - right["first"] >= 0.08 * len(gold)


def test_what_became_of_each_tag_is_counted_whatever_the_batches(table, nouns):
    rows = [["crane", "bird"], ["crane"], ["asdf"], [], ["bird", "crane", "zzz"], ["asdf", "dog"]]
    meant = {"crane": [4, 3, 4], "bird": [0, 0], "dog": [0]}

    def part(some):
        candidates = table.candidates(pa.array(some, pa.list_(pa.string())))
        tags = candidates.tags.to_pylist()
        numbers = [meant[tags[t]][0] if tags[t] in meant else -1 for t in candidates.tag.tolist()]
        return tag_counts.count(candidates, np.array(numbers, np.int64), np.where(np.array(numbers) >= 0, 0.5, 0.0))

    names = nouns.synsets["synset"].combine_chunks()
    whole = tag_counts.add([part(rows)], names)
    assert whole.equals(tag_counts.add([part(rows[:2]), part(rows[2:3]), part(rows[3:])], names))
    found = {row["tag"]: row for row in whole.to_pylist()}
    assert whole["tag"].to_pylist() == ["crane", "asdf", "bird", "dog", "zzz"]
    assert found["crane"]["chosen"] == [0, 0, 0, 0, 3]
    assert found["crane"]["synsets"][4] == "crane.n.05"
    assert found["crane"]["confidence"] == pytest.approx(0.5)
    assert (found["asdf"]["reason"], found["asdf"]["occurrences"], found["asdf"]["synsets"]) == ("unmapped", 2, [])
    assert found["dog"]["reason"] is None
