"""Is the highest score one of those that count as right? Among all outputs, or among some of them only.

    V2, Sketch, C, SI-Score    one right output, among all
    ReaL, ObjectNet (b)        several may be right, among all
    A, R                       one, among the 200 classes of the set
    ObjectNet (a)              several may be right, among all those of its 113 classes

Letters: B images, S outputs of the head, A outputs that are asked, M outputs that may be right (padded with -1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.errors import DataError


def predictions(logits: Tensor, asked: Tensor | None = None) -> Tensor:
    """The output with the highest score, among `asked` (A, ascending) if given: B S -> B.

    Of equal scores the first counts. Raises DataError for scores that are nan or infinite.
    """
    refuse_nan(logits)
    if asked is None:
        return logits.argmax(dim=1)
    return asked[logits[:, asked].argmax(dim=1)]


def refuse_nan(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise DataError(
            "the classifier's scores hold nan or infinity, and no accuracy follows: its weights are damaged, "
            "or too large for the precision; try --precision fp32"
        )


def right(predicted: Tensor, accepted: Tensor) -> Tensor:
    """B and B M -> B, bool."""
    return (predicted[:, None] == accepted).any(dim=1)


def padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """Lists of outputs as rows of equal length, filled up with -1, which no prediction is."""
    longest = max((len(own) for own in lists), default=0)
    return torch.tensor([[*own, *[-1] * (longest - len(own))] for own in lists], dtype=torch.long).reshape(-1, longest)


def chance(accepted: Tensor, asked: int) -> float:
    """How often a guess among `asked` outputs is right, on average over the images. accepted B M."""
    return (accepted >= 0).sum(dim=1).double().mean().item() / asked
