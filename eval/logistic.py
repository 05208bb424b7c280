"""Multinomial logistic regression on standardised features, by L-BFGS.

Minimises mean cross-entropy + l2/2 * |W|^2 over W and an unpenalised bias; scikit-learn's C is 1 / (l2 * images).
Letters: N images, B of them at a time, D width, S classes.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from eval.lbfgs import Precondition, minimise

PIECE: Final = {"cpu": 1 << 22, "cuda": 1 << 27}  # scores at a time: N S never have to fit; on a CPU, in its cache
RIDGE: Final = 1e-4  # of the preconditioner, beside the features' variance of 1: fewer images than D leave it singular


@dataclass(frozen=True)
class LinearHead:
    """(features - mean) / scale, then a linear layer."""

    mean: Tensor  # D
    scale: Tensor  # D
    weight: Tensor  # S D
    bias: Tensor  # S

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale @ self.weight.T + self.bias


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per column; a constant column keeps scale 1. Raises DataError for nan."""
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    if not (torch.isfinite(mean).all() and torch.isfinite(scale).all()):
        raise DataError("features hold nan or infinity; no classifier can be fitted on them")
    return mean, torch.where(scale > 1e-6 * mean.abs() + 1e-12, scale, torch.ones_like(scale))


def loss_and_gradient(parameters: Tensor, x: Tensor, labels: Tensor, l2: float) -> tuple[float, Tensor]:
    """Value and gradient at `parameters` S D+1 (the bias is the last column); x N D."""
    weight, bias = parameters[:, :-1], parameters[:, -1]
    loss, gradient = 0.0, torch.zeros_like(parameters)
    rows = max(1, PIECE[x.device.type] // len(parameters))
    for piece, right in zip(x.split(rows), labels.split(rows), strict=True):
        error = torch.addmm(bias, piece, weight.T)  # B S
        error -= error.amax(dim=1, keepdim=True)
        own = error.gather(1, right[:, None])
        total = error.exp_().sum(dim=1, keepdim=True)
        loss += float((total.log() - own).double().sum())
        error /= total  # softmax - one-hot is the gradient of cross-entropy
        error.scatter_add_(1, right[:, None], error.new_full((len(right), 1), -1.0))
        gradient[:, :-1].addmm_(error.T, piece)
        gradient[:, -1] += error.sum(dim=0)
    gradient /= len(x)
    gradient[:, :-1] += l2 * weight
    return loss / len(x) + 0.5 * l2 * float(weight.square().sum()), gradient


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    *,
    start: LinearHead | None = None,
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> LinearHead:
    """Fit on all images; `start` is a head from which the search begins (its standardisation is taken over).

    `tolerance` stops when no entry of the gradient is larger. Raises DataError for features that are not finite.
    """
    mean, scale = standardisation(features)
    if start:
        mean, scale = start.mean, start.scale
    x = (features - mean) / scale
    parameters = x.new_zeros(classes, x.shape[1] + 1)
    if start:
        parameters.copy_(torch.cat([start.weight, start.bias[:, None]], dim=1))
    solution = minimise(
        lambda point: loss_and_gradient(point, x, labels, l2),
        parameters,
        curvature(x, classes, l2),
        iterations,
        tolerance,
    )
    return LinearHead(mean, scale, solution[:, :-1].clone(), solution[:, -1].clone())


def curvature(x: Tensor, classes: int, l2: float) -> Precondition:
    """Inverse of the loss's curvature where all classes are equally likely, for every class alike.

    There the Hessian is (I/S - 1/S^2) x (covariance of the features, 1 for the bias) + l2; the second term, which
    couples the classes, is left out. Features that say the same thing twice then do not slow the search down.
    """
    matrix = torch.zeros(x.shape[1] + 1, x.shape[1] + 1, dtype=torch.float64, device=x.device)
    matrix[:-1, :-1] = x.T @ x / (len(x) * classes)
    matrix.diagonal()[:-1] += l2 + RIDGE / classes
    matrix[-1, -1] = 1 / classes
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix)).to(x.dtype)
    return lambda gradient: gradient @ inverse
