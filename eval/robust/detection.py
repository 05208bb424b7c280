"""ImageNet-O: is a picture of a class that the classifier does not know told from those that it knows?

As the authors score it (hendrycks/natural-adv-examples, eval_many_models.py, get_imagenet_o_results): the classifier's
200 outputs of the set's classes are asked; ImageNet-O's 2,000 pictures are the positives, the validation pictures of
these 200 classes the negatives; a picture's anomaly is minus its highest softmax probability (here 1 minus it, which
orders them alike); the score is sklearn's average_precision_score, the area under precision over recall in steps.

Letters: B images, S outputs of the head, A outputs that are asked, T distinct scores.
"""

import torch
from torch import Tensor

from eval.robust.top1 import refuse_nan


def anomaly(logits: Tensor, asked: Tensor) -> Tensor:
    """1 - the highest probability among `asked`: B S, A -> B, float64, in which confident ones still differ.

    Raises DataError for scores that are nan or infinite.
    """
    refuse_nan(logits)
    ordered = logits[:, asked].double().sort(dim=1, descending=True).values  # B A
    others = (ordered[:, 1:] - ordered[:, :1]).exp().sum(dim=1)  # of all but the highest, which has 1
    return others / (1 + others)  # 1 - 1 / (1 + others), without a difference of nearly equal numbers


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Σ (recall_t - recall_{t-1}) precision_t over the distinct scores, highest first. scores B, positive B (bool).

    Images with equal scores come in together. Raises ValueError where one kind is missing.
    """
    if not positive.any() or positive.all():
        raise ValueError("average precision needs pictures of both kinds")
    order = scores.argsort(descending=True, stable=True)
    ordered, hits = scores[order], positive[order].double()
    last = torch.ones_like(ordered, dtype=torch.bool)  # of those with an equal score
    last[:-1] = ordered[1:] != ordered[:-1]
    found = hits.cumsum(0)[last]  # T
    taken = torch.arange(1, len(ordered) + 1, device=scores.device, dtype=torch.double)[last]
    recall = found / found[-1]
    return (torch.diff(recall, prepend=recall.new_zeros(1)) * found / taken).sum().item()
