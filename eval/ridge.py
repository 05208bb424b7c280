"""big_vision's closed-form classifier on frozen features: a smoke test of seconds (recipes 9.2).

Least squares to +1 for the own class and -1 for every other, on standardised features and one constant feature, with
l2/2 * |W|^2 beside the sum over the images. Letters: N images, D width, S classes.
"""

from typing import Final

import torch
from torch import Tensor

from eval.logistic import LinearHead, standardisation

L2: Final = 2.0**10  # recipes 9.2
BIAS: Final = 100.0  # the constant feature: its weight is as good as free of the penalty


def fit(features: Tensor, labels: Tensor, classes: int, l2: float = L2, bias: float = BIAS) -> LinearHead:
    """The solution for all images, computed in float64. Raises DataError for features that are not finite."""
    mean, scale = standardisation(features)
    x = ((features - mean) / scale).double()  # N D
    x = torch.cat([x, x.new_full((len(x), 1), bias)], dim=1)  # N D+1
    target = x.new_full((len(x), classes), -1.0)
    target.scatter_(1, labels[:, None], 1.0)
    weight = _solve(x, target, l2).to(features.dtype)  # D+1 S
    return LinearHead(mean, scale, weight[:-1].T.contiguous(), bias * weight[-1])


def _solve(x: Tensor, target: Tensor, l2: float) -> Tensor:
    """(x'x + l2)^-1 x' target, by the smaller of x'x and xx'."""
    few = len(x) < x.shape[1]
    gram = x @ x.T if few else x.T @ x
    gram.diagonal().add_(l2)
    factor = torch.linalg.cholesky(gram)
    return x.T @ torch.cholesky_solve(target, factor) if few else torch.cholesky_solve(x.T @ target, factor)
