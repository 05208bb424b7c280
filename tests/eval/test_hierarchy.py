"""Distances in WordNet against a walk of their own: over Princeton's file, and with nltk."""

import itertools
import zipfile

import pytest
import torch
from nltk_wordnet import nltk_reader

from data_pipeline import wordnet
from eval.classes import Classes
from eval.hierarchy import Common, Hierarchy, chance_height, hierarchy_scores

ANIMALS = ("poodle.n.01", "corgi.n.01", "dog.n.01", "lion.n.01", "lamp.n.01", "bank.n.01", "rhine.n.01")


def classes(*synsets: str | None) -> Classes:
    return Classes(tuple((str(synset),) for synset in synsets), synsets, "a test", "0" * 64)


def guesses(*labels: int, number: int) -> torch.Tensor:
    """Scores whose highest is at the label given."""
    return torch.eye(number)[list(labels)]


def common(hierarchy: Hierarchy, a: int, b: int) -> Common:
    found = hierarchy.common(a, b)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def parents() -> dict[str, list[str]]:
    """wnid -> wnids of its hypernyms, from data.noun as wndb(5WN) describes it, without any of our code."""
    with zipfile.ZipFile(wordnet.ARCHIVE) as archive:
        lines = archive.read("wordnet/data.noun").decode().splitlines()
    found = {}
    for words in (line.split() for line in lines if not line.startswith(" ")):
        found["n" + words[0]] = ["n" + words[at + 1] for at, word in enumerate(words) if word in ("@", "@i")]
    return found


def paths(parents: dict[str, list[str]], wnid: str) -> list[list[str]]:
    """Every way up to the root."""
    ways = [[wnid, *way] for parent in parents[wnid] for way in paths(parents, parent)]
    return ways or [[wnid]]


def test_heights_and_distances_are_those_of_every_path_walked_by_hand(parents):
    wnids = [f"n{int(word):08d}" for word in ("2113335", "2112826", "2084071", "2123045", "3636248", "9411430")]
    wnids = [wnid for wnid in wnids if wnid in parents]
    assert len(wnids) >= 5
    ways = [paths(parents, wnid) for wnid in wnids]
    hierarchy = Hierarchy(wnids)
    for a, b in itertools.permutations(range(len(wnids)), 2):
        pairs = [(one, two) for one in ways[a] for two in ways[b]]
        shared = {node for one, two in pairs for node in one if node in two}
        distance = min(one.index(node) + two.index(node) for one, two in pairs for node in shared & set(one) & set(two))
        # the height of a node: the longest piece of any class's path that ends in it
        height = {node: max(way.index(node) for all_ in ways for way in all_ if node in way) for node in shared}
        found = common(hierarchy, a, b)
        assert (found.height, found.distance) == (min(height.values()), distance)


@pytest.mark.slow
def test_nltk_finds_the_same_distances_and_common_hypernyms(tmp_path):
    with nltk_reader(tmp_path) as reader:
        hierarchy = Hierarchy(ANIMALS)
        for a, b in itertools.combinations(range(len(ANIMALS)), 2):
            one, two = reader.synset(ANIMALS[a]), reader.synset(ANIMALS[b])
            assert one is not None and two is not None
            found = common(hierarchy, a, b)
            assert found.distance == one.shortest_path_distance(two)
            assert found.synset in {synset.name() for synset in one.common_hypernyms(two)} | {ANIMALS[a], ANIMALS[b]}
        for file in reader._data_file_map.values():  # nltk leaves them open
            file.close()


def test_a_guess_beside_the_truth_is_near_and_one_above_it_nearer():
    hierarchy = Hierarchy(ANIMALS)
    poodle, corgi, dog, lion, lamp = range(5)
    found = {name: common(hierarchy, poodle, other) for name, other in [("corgi", corgi), ("dog", dog), ("lion", lion)]}
    assert (found["dog"].distance, found["dog"].synset, found["dog"].height) == (1, "dog.n.01", 1)
    assert (found["corgi"].distance, found["corgi"].synset) == (2, "dog.n.01")
    assert found["lion"].synset == "carnivore.n.01"
    far = common(hierarchy, poodle, lamp)
    assert far.height > found["lion"].height > found["corgi"].height
    assert far.distance > found["lion"].distance


def test_scores_are_means_over_pictures_and_over_mistakes():
    set_ = classes("poodle.n.01", "corgi.n.01", "dog.n.01", "lion.n.01", None)
    labels = torch.tensor([0, 0, 0, 1, 3, 4, 1])
    scores = guesses(0, 1, 2, 1, 0, 4, 4, number=5)  # right, 2 off, 1 off, right, far, no synset, guess without one
    values = hierarchy_scores(scores, labels, set_)
    hierarchy = Hierarchy(set_.synsets)
    pairs = [common(hierarchy, truth, guess) for truth, guess in [(0, 1), (0, 2), (3, 0)]]
    heights, distances = [pair.height for pair in pairs], [pair.distance for pair in pairs]
    assert distances[:2] == [2, 1] and distances[2] > 4
    everyone = [(a, b, int((labels == a).sum())) for a in range(4) for b in range(4) if a != b]
    chance = sum(n * common(hierarchy, a, b).height for a, b, n in everyone) / sum(n for *_, n in everyone)
    assert values == {
        "hierarchy/chance_height": pytest.approx(chance),
        "hierarchy/compared": pytest.approx(5 / 7),
        "hierarchy/height": pytest.approx(sum(heights) / 5),
        "hierarchy/distance": pytest.approx(sum(distances) / 5),
        "hierarchy/mistake_height": pytest.approx(sum(heights) / 3),
        "hierarchy/mistake_distance": pytest.approx(sum(distances) / 3),
        "hierarchy/within_2": pytest.approx(2 / 3),
        "hierarchy/within_4": pytest.approx(2 / 3),
        "hierarchy/within_8": pytest.approx(1.0 if distances[2] <= 8 else 2 / 3),
    }


def test_no_mistakes_and_no_synsets():
    set_ = classes("poodle.n.01", "corgi.n.01")
    assert hierarchy_scores(guesses(0, 1, number=2), torch.tensor([0, 1]), set_) == {
        "hierarchy/compared": 1.0,
        "hierarchy/height": 0.0,
        "hierarchy/distance": 0.0,
        "hierarchy/chance_height": float(common(Hierarchy(set_.synsets), 0, 1).height),
    }
    assert hierarchy_scores(guesses(0, 1, number=2), torch.tensor([0, 1]), classes(None, "nothing.n.77")) == {}


def test_what_guessing_gives_is_sampled_where_there_are_many_classes(monkeypatch):
    hierarchy, labels = Hierarchy(ANIMALS), torch.arange(len(ANIMALS))
    exact = chance_height(hierarchy, labels)
    monkeypatch.setattr("eval.hierarchy.CHANCE_PAIRS", 40)  # of 49
    sampled = chance_height(hierarchy, labels)
    assert exact is not None and sampled is not None
    assert sampled != exact and sampled == pytest.approx(exact, rel=0.2) and sampled == chance_height(hierarchy, labels)


def test_two_classes_of_one_synset_are_no_distance_apart():
    set_ = classes("poodle.n.01", "poodle.n.01", "dog.n.01")
    assert hierarchy_scores(guesses(1, number=3), torch.tensor([0]), set_)["hierarchy/mistake_distance"] == 0.0
