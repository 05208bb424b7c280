"""Learning-rate schedules: step -> multiplier of the peak rate, pure functions."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def warmup_cosine(warmup: int, total: int) -> Schedule:
    """Linear from 0 over `warmup` steps, then half a cosine to 0 at `total` (MAE, recipes §2.5)."""
    return lambda step: (
        _warm(step, warmup) if step < warmup else 0.5 * (1 + math.cos(math.pi * _past(step, warmup, total)))
    )


def warmup_linear(warmup: int, total: int) -> Schedule:
    """Linear from 0 over `warmup` steps, then linear to 0 at `total` (WSP, recipes §6.3)."""
    return lambda step: _warm(step, warmup) if step < warmup else 1 - _past(step, warmup, total)


def constant(warmup: int, total: int) -> Schedule:
    """Linear from 0 over `warmup` steps, then 1."""
    return lambda step: _warm(step, warmup) if step < warmup else 1.0


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "cosine": warmup_cosine,
    "linear": warmup_linear,
    "constant": constant,
}


def _warm(step: int, warmup: int) -> float:
    return (step + 1) / warmup  # the first step already moves


def _past(step: int, warmup: int, total: int) -> float:
    return min(1.0, (step - warmup) / max(1, total - warmup))
