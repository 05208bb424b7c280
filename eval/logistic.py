"""Multinomial logistic regression on standardised features, by L-BFGS.

Minimises mean cross-entropy + l2/2 * |W|^2 over W and an unpenalised bias; scikit-learn's C is 1 / (l2 * images).
Letters: N images, D width, S classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1 << 16  # images per piece, so that N S logits of a large set never have to fit


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
    """Mean and standard deviation per column; a constant column keeps scale 1."""
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    return mean, torch.where(scale > 1e-6 * mean.abs() + 1e-12, scale, torch.ones_like(scale))


def loss_and_gradient(parameters: Tensor, x: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Value and gradient at `parameters` S D+1 (the bias is the last column); x N D."""
    weight, bias = parameters[:, :-1], parameters[:, -1]
    loss, gradient = x.new_zeros(()), torch.zeros_like(parameters)
    for rows, right in zip(x.split(ROWS), labels.split(ROWS), strict=True):
        log_prob = torch.addmm(bias, rows, weight.T).log_softmax(dim=1)  # B S
        loss -= log_prob.gather(1, right[:, None]).sum()
        error = log_prob.exp_()  # softmax - one-hot is the gradient of cross-entropy
        error.scatter_add_(1, right[:, None], error.new_full((len(right), 1), -1.0))
        gradient[:, :-1].addmm_(error.T, rows)
        gradient[:, -1] += error.sum(dim=0)
    loss, gradient = loss / len(x), gradient / len(x)
    gradient[:, :-1] += l2 * weight
    return loss + 0.5 * l2 * weight.square().sum(), gradient


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

    `tolerance` stops when no entry of the gradient is larger.
    """
    mean, scale = (start.mean, start.scale) if start else standardisation(features)
    x = (features - mean) / scale
    parameters = x.new_zeros(classes, x.shape[1] + 1)
    if start:
        parameters.copy_(torch.cat([start.weight, start.bias[:, None]], dim=1))
    optimiser = torch.optim.LBFGS(
        [parameters],
        max_iter=iterations,
        max_eval=iterations * 2,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, parameters.grad = loss_and_gradient(parameters, x, labels, l2)
        return float(loss)

    with torch.no_grad():
        optimiser.step(closure)
    return LinearHead(mean, scale, parameters[:, :-1].clone(), parameters[:, -1].clone())
