"""Training images held out to choose a hyper-parameter on: never the evaluation data.

Letters: N images, D width.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from eval import logistic
from eval.metrics import topk

PATIENCE: Final = 2  # weaker strengths in a row that are worse than the best end the search


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """True for a random `share` of every class: at least one image of a class that has two, never all of a class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    place = positions_in_class(labels.cpu()[order])
    rank = torch.empty_like(place)
    rank[order] = place  # a random number 0, 1, 2, … inside the class
    counts = torch.bincount(labels.cpu())[labels.cpu()]
    held = (counts * share).round().long().clamp(min=1)
    return (rank < torch.minimum(held, counts - 1)).to(labels.device)


def positions_in_class(labels: Tensor) -> Tensor:
    """How many earlier entries have the same label. labels N -> N."""
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    starts = torch.searchsorted(ordered, ordered)  # where the run of equal labels begins
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels), device=labels.device) - starts
    return place


class Choice(NamedTuple):
    """A strength, its top-1 on the held-out images, and the head that had it; None where nothing was tried."""

    l2: float
    top1: float | None = None
    head: logistic.LinearHead | None = None


def choose_l2(
    features: Tensor,
    labels: Tensor,
    held: Tensor,
    classes: int,
    strengths: Sequence[float],
    iterations: int,
    tolerance: float = 1e-5,
) -> Choice:
    """The strength with the best top-1 on the held-out images; of equal ones the strongest.

    Tried from the strongest on, each fit starting where the stronger one ended; ends after PATIENCE worse ones.
    """
    if len(strengths) == 1:
        return Choice(strengths[0])
    if not held.any():  # one image a class: nothing to choose on
        return Choice(sorted(strengths)[len(strengths) // 2])
    best, head, worse = Choice(max(strengths)), None, 0
    x, y = features[~held], labels[~held]
    for l2 in sorted(strengths, reverse=True):
        head = logistic.fit(x, y, classes, l2, start=head, iterations=iterations, tolerance=tolerance)
        top1 = topk(head(features[held]), labels[held], 1)
        worse = worse + 1 if best.top1 is not None and top1 < best.top1 else 0
        if best.top1 is None or top1 > best.top1:
            best = Choice(l2, top1, head)
        if worse == PATIENCE:
            break
    return best
