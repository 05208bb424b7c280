"""The low-shot classifier of MSN: logistic regression without a bias on centred, normalised features (recipes 9.2).

Each feature vector has its own mean taken out and length 1. Minimises mean cross-entropy + l2 / (2 N) |W|^2: the
strength is divided by the number of images. Letters: N images, D width, S classes.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.logistic import loss_and_gradient

ITERATIONS: Final = 300  # at most; the published solver's epochs
TOLERANCE: Final = 1e-5  # on the largest entry of the gradient


@dataclass(frozen=True)
class CentredHead:
    """Centre and normalise each vector, then a linear layer without a bias."""

    weight: Tensor  # S D

    def __call__(self, features: Tensor) -> Tensor:
        return centred(features) @ self.weight.T


def centred(features: Tensor) -> Tensor:
    """Each row without its own mean, at length 1. N D."""
    return F.normalize(features - features.mean(dim=1, keepdim=True), dim=1)


def fit(features: Tensor, labels: Tensor, classes: int, l2: float) -> CentredHead:
    """By L-BFGS, from zero; features N D, labels N."""
    x = centred(features)
    weight = x.new_zeros(classes, x.shape[1])
    optimiser = torch.optim.LBFGS(
        [weight],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        without_bias = torch.cat([weight, weight.new_zeros(classes, 1)], dim=1)
        loss, gradient = loss_and_gradient(without_bias, x, labels, l2 / len(x))
        weight.grad = gradient[:, :-1].contiguous()
        return float(loss)

    with torch.no_grad():
        optimiser.step(closure)
    return CentredHead(weight)
