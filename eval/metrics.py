"""Scores from predictions: pure functions, fractions in 0..1.

Letters: B images, S classes.
"""

from typing import Final

import torch
from torch import Tensor

NEVER: Final = -1e30  # the score of a class that is never guessed


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one, per image: 0 is a hit. scores B S, labels B -> B.

    Equal scores are ordered by class index, as in `argmax`: a collapsed encoder that gives every class the same score
    must not count as right. All classes come before one that is never guessed, also where few others are left.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("scores hold nan or infinity; no accuracy can be read from them")
    own = scores.gather(1, labels[:, None])  # B 1
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]  # B S
    rank = ((scores > own) | ((scores == own) & before)).sum(dim=1)
    return rank.masked_fill(own[:, 0] == NEVER, scores.shape[1])


def topk(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of images whose class is among the k highest scores."""
    return (ranks(scores, labels) < k).double().mean().item()


def mean_per_class(predictions: Tensor, labels: Tensor, classes: int) -> float:
    """Accuracy of each class, averaged over the classes that have an image. predictions B, labels B."""
    images = torch.bincount(labels, minlength=classes)
    right = torch.bincount(labels[predictions == labels], minlength=classes)
    seen = images > 0
    return (right[seen].double() / images[seen]).mean().item()


def classification(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """top1, top5 (where there are more than five classes) and mean_per_class of B S scores."""
    rank, classes = ranks(scores, labels), scores.shape[1]
    values = {"top1": (rank < 1).double().mean().item()}
    if classes > 5:
        values["top5"] = (rank < 5).double().mean().item()
    values["mean_per_class"] = mean_per_class(torch.where(rank == 0, labels, -1), labels, classes)
    return values
