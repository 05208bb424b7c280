"""A head's answers on a data set, some rows at a time: the scores of half a million pictures would be gigabytes."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from eval.classifier import Classifier
from eval.datasets import Dataset
from eval.features import Encoder, extract

ROWS: Final = 4096  # ours: 16 MiB of float32 scores of 1000 classes


def answers(
    encode: Encoder, classifier: Classifier, dataset: Dataset, rule: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What `rule` makes of the scores (B S -> B) of each readable picture, and its position: N, N on the CPU."""
    found = extract(encode, dataset)
    pieces = [rule(classifier.head_logits(features)).cpu() for features, _ in found.split(ROWS)]
    return torch.cat(pieces) if pieces else torch.empty(0), found.rows.cpu()
