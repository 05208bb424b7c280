"""LARS against its equations, number by number."""

import math

import pytest
import torch
from torch import nn

from eval.lars import Lars

LR, MOMENTUM, TRUST, DECAY = (0.5, 0.3, 0.7, 0.1), 0.9, 0.01, 0.2


def slow(weights: list[float], gradients: list[list[float]], scaled: bool) -> list[float]:
    """One parameter as a list of numbers, over several steps."""
    buffer = [0.0] * len(weights)
    for lr, gradient in zip(LR, gradients, strict=True):
        update = [g + DECAY * w * scaled for g, w in zip(gradient, weights, strict=True)]
        own, step = (math.sqrt(sum(v * v for v in values)) for values in (weights, update))
        ratio = TRUST * own / step if scaled and own > 0 and step > 0 else 1.0
        buffer = [MOMENTUM * b + ratio * u for b, u in zip(buffer, update, strict=True)]
        weights = [w - lr * b for w, b in zip(weights, buffer, strict=True)]
    return weights


def fast(weight: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    parameter = nn.Parameter(weight.clone())
    optimiser = Lars([parameter], LR[0], MOMENTUM, TRUST, DECAY)
    for lr, gradient in zip(LR, gradients, strict=True):
        optimiser.param_groups[0]["lr"] = lr
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("shape", "scaled"), [((2, 3), True), ((2, 1, 2), True), ((5,), False)], ids=["matrix", "three axes", "bias"]
)
@pytest.mark.parametrize("zero", ["nothing", "weight", "gradient", "both"])
def test_steps_are_those_of_the_equations_also_where_a_norm_is_zero(shape, scaled, zero):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw, dtype=torch.float64) * (zero not in ("weight", "both"))
    gradients = torch.randn((len(LR), *shape), generator=draw, dtype=torch.float64)
    if zero in ("gradient", "both"):
        gradients[:2] = 0
    expected = slow(weight.flatten().tolist(), gradients.flatten(1).tolist(), scaled)
    assert fast(weight, gradients).flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_the_first_step_of_a_matrix_is_as_long_as_trust_says_whatever_the_gradient():
    weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    before = weight.detach().clone()
    weight.grad = 1e6 * torch.ones(4, 3)
    Lars([weight], lr=2.0, trust=0.001).step()
    assert float((weight.detach() - before).norm()) == pytest.approx(2.0 * 0.001 * float(before.norm()), rel=1e-4)


def test_a_parameter_without_gradient_stays():
    weight = nn.Parameter(torch.ones(2, 2))
    Lars([weight], lr=1.0, weight_decay=0.5).step()
    assert weight.equal(torch.ones(2, 2))
