"""L-BFGS for a convex function of a matrix, with a preconditioner (Nocedal & Wright, Numerical Optimization, ch. 7).

torch's own begins with a step of 1/|gradient| and finds its way from there by more evaluations; with a matrix that
stands for the curvature, the first step is of about the right length, and nearly every evaluation is an iteration.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

MEMORY: Final = 10  # pairs of (step, change of the gradient)
ENOUGH: Final = 1e-4  # share of the decrease that the slope promises (Armijo)
TRIES: Final = 12  # lengths of one step

Function = Callable[[Tensor], tuple[float, Tensor]]  # point -> value, gradient
Precondition = Callable[[Tensor], Tensor]  # gradient -> about inverse curvature x gradient, symmetric and positive


def minimise(
    function: Function, point: Tensor, precondition: Precondition, iterations: int, tolerance: float
) -> Tensor:
    """The lowest point found; stops when no entry of the gradient is larger than `tolerance`, or nothing is lower."""
    value, gradient = function(point)
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)
    for _ in range(iterations):
        if gradient.abs().max() <= tolerance:
            break
        direction = -_newton(gradient, pairs, precondition)
        slope = _dot(gradient, direction)
        if -slope <= torch.finfo(point.dtype).eps * abs(value):  # less than the value could show
            break
        found = _shorter(function, point, value, direction, slope)
        if found is None:
            break
        there, lower, after = found
        step, change = there - point, after - gradient
        if _dot(step, change) > 0:  # as it must be where the function is convex, but for rounding
            pairs.append((step, change))
        point, value, gradient = there, lower, after
    return point


def _newton(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor]], precondition: Precondition) -> Tensor:
    """Estimated inverse Hessian x gradient, by the two loops of algorithm 7.4."""
    q, shares = gradient.clone(), []
    for step, change in reversed(pairs):
        share = _dot(step, q) / _dot(step, change)
        q -= share * change
        shares.append(share)
    r = precondition(q)
    if pairs:
        step, change = pairs[-1]
        r *= _dot(step, change) / _dot(change, precondition(change))  # eq. 7.20, with the preconditioner
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        r += (share - _dot(change, r) / _dot(step, change)) * step
    return r


def _shorter(
    function: Function, point: Tensor, value: float, direction: Tensor, slope: float
) -> tuple[Tensor, float, Tensor] | None:
    """The first of ever shorter steps that goes down enough; None where none does."""
    length = 1.0
    for _ in range(TRIES):
        there = point + length * direction
        lower, gradient = function(there)
        if lower <= value + ENOUGH * length * slope:
            return there, lower, gradient
        parabola = -slope * length / (2 * (lower - value - slope * length))  # its lowest point, in lengths
        length *= min(max(parabola, 0.1), 0.5)
    return None


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
