"""kNN and prototypes against loops; the held-out split; linear never looks at the evaluation data."""

import logging
import math

import pytest
import torch

from eval.evaluators import knn, linear
from eval.evaluators.knn import Config, Knn
from eval.features import Encoder, extract
from maws.data.transforms import Preprocess
from tests.eval.conftest import SIDE, atto


@pytest.fixture(scope="module")
def encode():
    return Encoder(atto(), Preprocess(SIDE))


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_knn_is_a_loop_over_neighbours(data, encode):
    cfg = Config(k=(1, 4, 9), temperature=0.1)
    scores = {score.metric: score.value for score in Knn(cfg, data, 0).run(encode)}
    bank, test = extract(encode, data.train), extract(encode, data.test)
    right = dict.fromkeys(cfg.k, 0)
    for query, label in zip(test.features.tolist(), test.labels.tolist(), strict=True):
        near = sorted(
            ((cosine(query, f), c) for f, c in zip(bank.features.tolist(), bank.labels.tolist(), strict=True))
        )
        for k in cfg.k:
            votes = dict.fromkeys(range(7), 0.0)
            for similarity, c in near[::-1][:k]:
                votes[c] += math.exp(similarity / cfg.temperature)
            right[k] += max(votes, key=lambda c: votes[c]) == label
    assert {f"top1@k={k}": count / len(test) for k, count in right.items()}.items() <= scores.items()
    assert max(scores.values()) > 2 / 7  # and the pictures can be told apart


def test_prototypes_are_class_means(data, encode):
    scores = {score.metric: score.value for score in Knn(Config(), data, 0).run(encode)}
    bank, test = extract(encode, data.train), extract(encode, data.test)
    unit = bank.features / bank.features.norm(dim=1, keepdim=True)
    means = [unit[bank.labels == label].mean(0).tolist() for label in range(7)]
    right = sum(
        max(range(7), key=lambda c: cosine(query, means[c])) == label
        for query, label in zip(test.features.tolist(), test.labels.tolist(), strict=True)
    )
    assert scores["prototype/top1"] == pytest.approx(right / len(test))


def test_a_k_larger_than_the_training_set_is_left_out_and_said(data, encode, caplog):
    with caplog.at_level(logging.WARNING):
        names = [score.metric for score in Knn(Config(k=(1, 500)), data, 0).run(encode)]
    assert names == ["top1@k=1", "prototype/top1"]
    assert "leaves out k=[500], there are 42 training images" in caplog.text


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_hold_out_takes_a_share_of_every_class_and_never_all(share):
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])[torch.randperm(18)]
    held = linear.hold_out(labels, share, seed=0)
    for label, size in enumerate((10, 5, 2, 1)):
        count = int(held[labels == label].sum())
        assert count == min(max(round(size * share), 1), size - 1)
    assert held.equal(linear.hold_out(labels, share, seed=0))


def test_positions_in_class_count_from_zero():
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    assert linear.positions_in_class(labels).tolist() == [0, 0, 1, 0, 2, 1]


def test_l2_is_chosen_on_training_images_alone(data, encode, monkeypatch):
    """Whatever the evaluation labels are, the same strength is chosen."""
    import dataclasses

    import numpy as np

    def chosen(labels):
        changed = dataclasses.replace(data, test=dataclasses.replace(data.test, labels=labels))
        return next(iter(linear.Linear(linear.Config(), changed, 0).run(encode))).chosen

    assert chosen(data.test.labels) == chosen(np.roll(data.test.labels, 1))


def test_linear_fits_what_can_be_fitted(data, encode):
    """A linear classifier evaluated on its own training images, hardly regularised, is right."""
    import dataclasses

    same = dataclasses.replace(data, test=data.train)
    scores = {score.metric: score.value for score in linear.Linear(linear.Config(l2=(1e-6,)), same, 0).run(encode)}
    assert scores == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0}


def test_one_image_a_class_leaves_nothing_to_choose_on():
    x, labels = torch.randn(5, 3), torch.arange(5)
    held = linear.hold_out(labels, 0.2, 0)
    assert not held.any()
    assert linear.choose_l2(x, labels, held, 5, (1.0, 0.1, 0.01), 10) == (0.1, None, None)


def test_prototypes_of_a_class_without_images_are_zero():
    means = knn.prototypes(torch.eye(3), torch.tensor([0, 0, 2]), 4)
    assert means[1].abs().sum() == 0 and means[3].abs().sum() == 0
