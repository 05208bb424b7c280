"""Means with 95 % intervals: over training seeds where there are several, else over draws, else over evaluation images.

Student's t for what was repeated, Wilson's interval for a share of images. No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Two-sided 95 % quantiles of Student's t, by degrees of freedom; beyond 30 the normal's is within 2 %.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T95 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
Z95 = 1.960

SEEDS, DRAWS, IMAGES, NOTHING = "training seeds", "low-shot draws", "evaluation images", ""


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval, and what was repeated to get it."""

    mean: float
    low: float
    high: float
    over: str  # SEEDS, DRAWS, IMAGES, or NOTHING: one value without an interval
    count: int  # how many of those

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def t_interval(values: Sequence[float], over: str) -> Score:
    """Mean ± t·s/√k; needs two values or more."""
    mean, k = fmean(values), len(values)
    t = T95[k - 2] if k - 2 < len(T95) else Z95
    half = t * stdev(values) / math.sqrt(k)
    return Score(mean, mean - half, mean + half, over, k)


def wilson_interval(value: float, n: int) -> Score:
    """Wilson's interval for a share of `n` images: the sampling error of the evaluation set alone."""
    if n <= 0:
        return Score(value, 0.0, 1.0, IMAGES, n)
    centre = (value + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(value * (1 - value) / n + Z95**2 / (4 * n * n))
    return Score(value, max(0.0, centre - half), min(1.0, centre + half), IMAGES, n)


def score(by_run: Sequence[Sequence[float]], n: int) -> Score:
    """Per run, the value of every draw -> mean, with an interval over training seeds where there are several."""
    means = [fmean(values) for values in by_run]
    if len(means) > 1:
        return t_interval(means, SEEDS)
    if len(by_run[0]) > 1:
        return t_interval(by_run[0], DRAWS)
    return wilson_interval(means[0], n)


def plain(by_run: Sequence[Sequence[float]], n: int) -> Score:
    """The same for values that are no shares: a single one has no interval, for only its images know its spread."""
    means = [fmean(values) for values in by_run]
    if len(means) > 1 or len(by_run[0]) > 1:
        return score(by_run, n)
    return Score(means[0], means[0], means[0], NOTHING, n)
