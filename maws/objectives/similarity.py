"""How far predictions are from the target branch's vectors: the losses of LC-MAE Table 5 (recipes §4.1, §4.6).

Axes: R rows of this rank, D features. Every function takes predictions and targets (R D, float32), row by row of the
same picture or patch, and gives one number, the mean over rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maws import dist

Similarity = Callable[[Tensor, Tensor], Tensor]


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the vectors at unit length: 2 - 2 cos (BYOL, eq. 2)."""
    return (2 - 2 * F.cosine_similarity(prediction, target, dim=1)).mean()


def info_nce(prediction: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding one's own target among those of all ranks (van den Oord et al., 2018).

    Every rank gives the same number of rows.
    """
    targets = dist.all_gather_with_grad(F.normalize(target, dim=1))  # W*R D, rows of rank 0 first
    logits = F.normalize(prediction, dim=1) @ targets.T / temperature  # R W*R
    own = torch.arange(len(prediction), device=prediction.device) + dist.rank() * len(prediction)
    return F.cross_entropy(logits, own)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """d^2 / (2 beta) below `beta` and |d| - beta/2 above, of features with mean 0 and variance 1 in each vector.

    As data2vec, whose beta of 2 it is, normalises them. At unit length no difference would reach 2, and the loss would
    be a quarter of `cosine`'s: the paper reports another result for it.
    """
    features = prediction.shape[1:]
    return F.smooth_l1_loss(F.layer_norm(prediction, features), F.layer_norm(target, features), beta=beta)
