import random

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline import tag_counts
from data_pipeline.synsets import UNMAPPED, TagTable, choose, first

STRINGS = pa.list_(pa.string())


class Decisions:
    """As overrides.py gives them."""

    def __init__(self, nouns):
        self.nouns = nouns
        self.removed: dict[int, str] = {}
        self.force = {"selfie": nouns.senses("photograph")[0]}
        self.forbidden_tags = frozenset({"rake"})

    def apply(self, tag, senses, competing=False):
        if tag == "selfie":
            return tuple(self.nouns.senses("photograph")), None
        if tag == "rake":
            return (), "forbidden"
        return tuple(sense for sense in senses if self.nouns.synset(sense).name != "bat.n.01"), None


@pytest.fixture(scope="module")
def names(nouns):
    return lambda rows: [[nouns.synset(sense).name for sense in row] for row in rows]


def batch(nouns, rows, overrides=None):
    return TagTable(nouns, overrides).candidates(pa.array(rows, STRINGS))


def test_policy_first_takes_the_most_usual_sense_and_synonyms_merge(nouns, names):
    candidates = batch(nouns, [["brownbear", "bat", "happy"], ["ursusarctos", "brownbear"], [], None])
    synsets, counts = choose(candidates, "first")
    assert names(synsets.to_pylist()) == [["brown_bear.n.01", "bat.n.01"], ["brown_bear.n.01"], [], []]
    assert counts == {
        "hashtags": 5,
        "mapped_hashtags": 4,
        "unmapped_hashtags": 1,
        "denied_hashtags": 0,
        "undecided_hashtags": 0,
        "ambiguous_hashtags": 1,
    }


def test_policy_unambiguous_leaves_tags_with_several_senses_alone(nouns, names):
    synsets, counts = choose(batch(nouns, [["bat", "brownbear"], ["bat"]]), "unambiguous")
    assert names(synsets.to_pylist()) == [["brown_bear.n.01"], []]
    assert (counts["mapped_hashtags"], counts["undecided_hashtags"]) == (1, 2)


def test_policy_all_takes_every_sense(nouns, names):
    synsets, _ = choose(batch(nouns, [["bat", "chiropteran"], ["happy"]]), "all")
    assert names(synsets.to_pylist()) == [
        ["bat.n.01", "bat.n.02", "squash_racket.n.01", "cricket_bat.n.01", "bat.n.05"],
        [],
    ]


def test_a_choice_of_ones_own_is_a_sense_per_occurrence(nouns, names):
    candidates = batch(nouns, [["bat"], ["bat", "brownbear"], ["bat", "happy"]])
    synsets, counts = choose(candidates, np.array([3, 0, 0, -1, -1]))
    assert names(synsets.to_pylist()) == [["cricket_bat.n.01"], ["bat.n.01", "brown_bear.n.01"], []]
    assert (counts["undecided_hashtags"], counts["unmapped_hashtags"]) == (1, 1)


@pytest.mark.parametrize("choice", [[5], [0, 0]])
def test_a_choice_that_no_tag_has_is_refused(nouns, choice):
    with pytest.raises(ValueError, match="a sense for each occurrence"):
        choose(batch(nouns, [["bat"]]), np.array(choice))


def test_overrides_decide_before_the_policy(nouns, names):
    candidates = batch(nouns, [["selfie", "bat", "rake", "happy"]], Decisions(nouns))
    synsets, counts = choose(candidates, "first")
    assert names(synsets.to_pylist()) == [["photograph.n.01", "bat.n.02"]]
    assert dict(zip(candidates.tags.to_pylist(), candidates.reasons, strict=True)) == {
        "selfie": None,
        "bat": None,
        "rake": "forbidden",
        "happy": UNMAPPED,
    }
    assert (counts["denied_hashtags"], counts["unmapped_hashtags"]) == (1, 1)


def test_every_policy_gives_what_a_loop_over_the_tags_gives(nouns):
    rng = random.Random(0)
    words = ["bat", "bats", "chiropteran", "dog", "dogs", "cat", "brownbear", "ursusarctos", "happy", "crane", "Ünoun"]
    rows = [rng.choices(words, k=rng.randrange(7)) for _ in range(300)]
    candidates = batch(nouns, rows)
    own = np.array([rng.randrange(-1, len(nouns.senses(tag))) for row in rows for tag in row])
    left = iter(own.tolist())
    expected: dict[str, list] = {"first": [], "all": [], "unambiguous": [], "own": []}
    for row in rows:
        senses = [nouns.senses(tag) for tag in row]
        expected["first"].append([s[0] for s in senses if s])
        expected["all"].append([sense for s in senses for sense in s])
        expected["unambiguous"].append([s[0] for s in senses if len(s) == 1])
        expected["own"].append([s[n] for s in senses if (n := next(left)) >= 0])
    for policy, lists in expected.items():
        synsets, counts = choose(candidates, own if policy == "own" else policy)
        assert synsets.type == pa.list_(pa.int32())
        assert synsets.to_pylist() == [list(dict.fromkeys(row)) for row in lists], policy
        outcomes = ("mapped_hashtags", "unmapped_hashtags", "denied_hashtags", "undecided_hashtags")
        assert counts["hashtags"] == sum(map(len, rows)) == sum(counts[name] for name in outcomes)


def test_tags_of_a_batch_have_the_senses_that_each_has_alone(nouns):
    """Most are no noun, which is seen without looking each up: plurals and odd spellings must not be among those."""
    rng = random.Random(1)
    lemmas = rng.sample(nouns.lemmas["squashed"].to_pylist(), 800)
    irregular = rng.sample(nouns.exceptions["plural"].to_pylist(), 200)
    endings = ("", "s", "es", "ies", "men", "mice", "a", "i", "123", "x")
    plurals = [lemma[: rng.choice((None, -1))] + rng.choice(endings) for lemma in lemmas]
    compounds = [rng.choice(lemmas) + plural for plural in irregular]
    odd = ["Dog", "DOGS", "golden_retriever", "golden-retrievers", "cafés", "犬", "a", "s", "ss", "workmen", "no_noun"]
    tags = sorted({*lemmas, *plurals, *irregular, *compounds, *odd})
    candidates = batch(nouns, [tags])
    assert candidates.senses == [tuple(nouns.senses(tag)) for tag in tags]
    assert 500 < sum(map(bool, candidates.senses)) < len(tags) - 200


def test_a_part_of_a_table_is_looked_up_like_the_whole(nouns):
    rows = pa.array([["bat"], ["dog", "cat"], None, ["bat", "happy"], ["cat"]], STRINGS)
    whole = choose(TagTable(nouns).candidates(rows), "first")[0]
    part = TagTable(nouns).candidates(rows.slice(1, 3))
    assert choose(part, "first")[0].to_pylist() == whole.to_pylist()[1:4]
    assert part.tags.to_pylist() == ["dog", "cat", "bat", "happy"]
    chunks = pa.chunked_array([rows.slice(0, 2), rows.slice(2)])
    assert choose(TagTable(nouns).candidates(chunks), "first")[0].to_pylist() == whole.to_pylist()


def test_no_images_and_no_tags_are_batches_too(nouns):
    for rows in ([], [None, []]):
        candidates = batch(nouns, rows)
        for policy in ("first", "all", "unambiguous"):
            assert choose(candidates, policy)[0].to_pylist() == [[] for _ in rows]
        assert tag_counts.count(candidates, first(candidates), None).num_rows == 0


def test_counts_of_batches_add_up_to_the_counts_of_all(nouns):
    rows = [["bat", "dog"], ["dog"], ["happy", "dog"], ["bat"], []]
    names = nouns.synsets["synset"].combine_chunks()

    def count(some):
        candidates = batch(nouns, some)
        return tag_counts.count(candidates, first(candidates), None)

    added = tag_counts.add([count(rows[:2]), count(rows[2:])], names)
    assert added.equals(tag_counts.add([count(rows)], names))
    assert added.select(["tag", "occurrences", "reason"]).to_pylist() == [
        {"tag": "dog", "occurrences": 3, "reason": None},
        {"tag": "bat", "occurrences": 2, "reason": None},
        {"tag": "happy", "occurrences": 1, "reason": UNMAPPED},
    ]
    senses = [nouns.senses("dog"), nouns.senses("bat"), []]
    assert added["synsets"].to_pylist() == [[nouns.synset(sense).name for sense in found] for found in senses]
    assert tag_counts.add([], names).num_rows == 0


def test_lists_are_mapped_by_policy_first(nouns, names):
    mapped, counts = choose(batch(nouns, [["brownbear", "bat"], []]), "first")
    assert names(mapped.to_pylist()) == [["brown_bear.n.01", "bat.n.01"], []]
    assert counts["ambiguous_hashtags"] == 1
