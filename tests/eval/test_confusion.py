"""The file of mistakes: what it counts, in which order, and that it is whole JSON."""

import json

import pytest
import torch
from sklearn.metrics import confusion_matrix

from eval.classes import Classes
from eval.confusion import confusion

CLASSES = Classes(
    (("poodle",), ("corgi",), ('a "quoted" name',), ("tabby",), ("unseen",)),
    ("poodle.n.01", "corgi.n.01", None, "tabby.n.01", "lamp.n.01"),
    "a test",
    "5" * 64,
)


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(97, 5, generator=generator), torch.randint(4, (97,), generator=generator)


def test_counts_are_those_of_scikit_learns_matrix(scored):
    scores, labels = scored
    found = json.loads(confusion(scores, labels, CLASSES))
    matrix = confusion_matrix(labels, scores.argmax(1), labels=range(5))
    assert found["images"] == 97
    assert [entry["right"] for entry in found["classes"]] == matrix.diagonal().tolist()
    assert [entry["images"] for entry in found["classes"]] == matrix.sum(1).tolist()
    assert found["classes"][4]["accuracy"] is None  # no picture, no accuracy
    for label in range(4):
        assert found["classes"][label]["accuracy"] == pytest.approx(matrix[label, label] / matrix[label].sum())
    pairs = {(pair["truth"], pair["guess"]): pair["count"] for pair in found["pairs"]}
    expected = {(a, b): int(matrix[a, b]) for a in range(5) for b in range(5) if a != b and matrix[a, b]}
    assert pairs == expected


def test_the_most_confused_come_first_with_names_synsets_and_their_distance(scored):
    scores, labels = scored
    pairs = json.loads(confusion(scores, labels, CLASSES))["pairs"]
    counts = [pair["count"] for pair in pairs]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 1
    of = {(pair["truth"], pair["guess"]): pair for pair in pairs}
    assert of[0, 1]["names"] == ["poodle", "corgi"]
    assert (of[0, 1]["synsets"], of[0, 1]["distance"], of[0, 1]["common"]) == (
        ["poodle.n.01", "corgi.n.01"], 2, "dog.n.01",
    )  # fmt: skip
    assert of[2, 3]["names"] == ['a "quoted" name', "tabby"]
    assert (of[2, 3]["distance"], of[2, 3]["common"]) == (None, None)
    assert of[0, 1]["share"] == pytest.approx(of[0, 1]["count"] / int((labels == 0).sum()))


def test_a_perfect_classifier_confuses_nothing():
    found = json.loads(confusion(torch.eye(5), torch.arange(5), CLASSES))
    assert found["pairs"] == [] and all(entry["accuracy"] == 1 for entry in found["classes"])
