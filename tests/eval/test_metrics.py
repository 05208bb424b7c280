"""Metrics against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score, top_k_accuracy_score

from eval.metrics import classification, mean_per_class, ranks, topk


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(83, 11, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(11, (83,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_topk_is_that_of_scikit_learn(scores, labels, k):
    expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=np.arange(11))
    assert topk(scores, labels, k) == pytest.approx(expected)


def test_mean_per_class_is_the_macro_recall_of_scikit_learn(scores, labels):
    predictions = scores.argmax(1)
    expected = recall_score(labels.numpy(), predictions.numpy(), average="macro")
    assert mean_per_class(predictions, labels, 11) == pytest.approx(expected)


def test_mean_per_class_leaves_out_classes_without_images():
    assert mean_per_class(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), classes=5) == pytest.approx(0.75)


def test_equal_scores_are_ordered_as_argmax_orders_them(labels):
    """A collapsed encoder scores every class alike; that is one class right, not all."""
    flat = torch.zeros(len(labels), 11)
    assert topk(flat, labels, 1) == pytest.approx((labels == 0).double().mean().item())
    assert ranks(flat, labels).equal(labels)


def test_classification_agrees_with_its_parts(scores, labels):
    values = classification(scores, labels)
    assert values == {
        "top1": topk(scores, labels, 1),
        "top5": topk(scores, labels, 5),
        "mean_per_class": mean_per_class(scores.argmax(1), labels, 11),
    }


def test_top5_of_five_classes_says_nothing_and_is_left_out(labels):
    assert set(classification(torch.randn(83, 5), labels % 5)) == {"top1", "mean_per_class"}


def test_nan_is_not_an_accuracy(scores, labels):
    scores[3, 4] = torch.nan
    with pytest.raises(ValueError, match="nan or infinity"):
        topk(scores, labels, 1)
