"""Paired statistics of two ways of training that were evaluated on the same images: intervals and tests. No scipy.

    difference = right[a] - right[b]  # S N: training seeds, images; 1: only a is right, -1: only b, 0: both or neither
    bootstrap_means({"d": difference}, draws=5000, seed=0)["d"]  # over resampled seeds and images
    over_images(difference)           # tests for these weights: McNemar, and signs swapped at random
    over_seeds(difference.mean(1))    # tests for the way of training: Student's t, and every swap of signs
    holm([0.01, 0.04, 0.03])          # p-values of a family, corrected

What each answers: a test over images asks whether these very weights differ beyond the sampling of evaluation images; a
test over seeds whether another training would show the difference again. The second is what a claim about a method
needs, and three seeds can rarely give it. Letters: S seeds, N images, B draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

EXACT = 14  # seeds up to which every swap of signs is counted: 16,384
CELLS = 1 << 24  # numbers in memory at a time while images are resampled


@dataclass(frozen=True)
class OverImages:
    """Tests for given weights: is one right more often than the other, beyond the sampling of images?"""

    images: int
    only_first: int  # images that the first alone has right, over all seeds
    only_second: int
    mcnemar: float | None  # exact two-sided p; None with several seeds or draws, whose answers are not independent
    permutation: float  # two-sided p with the signs of images swapped at random


@dataclass(frozen=True)
class OverSeeds:
    """Tests for the way of training, from one difference a seed."""

    seeds: int
    mean: float
    deviation: float | None  # sample standard deviation; None with one seed
    t: float | None  # two-sided p of the paired t-test; None where there is no spread to divide by
    signs: float  # two-sided p with the signs of seeds swapped: exact up to EXACT seeds


# ----------------------------------------------------------------------------------------------------------- bootstrap


def bootstrap_means(values: Mapping[str, np.ndarray], draws: int, seed: int) -> dict[str, np.ndarray]:
    """Means of every S N array over resampled seeds and images, B each; the same seeds and images for all of them.

    Seeds and images cross (each seed is asked about each image), so both are resampled on their own: the pigeonhole
    bootstrap (Owen, 2007), which errs on the wide side. Of S seeds S - 1 are drawn: drawing S would make the spread
    between seeds too small by (S - 1) / S, a third with three seeds (Rao and Wu, 1988). One seed is always itself, and
    the interval is then over images alone.
    """
    arrays = {name: np.asarray(array, dtype=np.float64) for name, array in values.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1:
        raise ValueError(f"paired values have one shape, not {sorted(shapes)}")
    seeds, images = shapes.pop()
    taken = max(1, seeds - 1)
    # Images with the same answers throughout are drawn together: a few hundred kinds instead of 50,000 images.
    kinds, counts = np.unique(np.concatenate(list(arrays.values())), axis=1, return_counts=True)  # len(arrays)*S K, K
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
    piece = max(1, CELLS // len(counts))
    for start in range(0, draws, piece):
        size = min(piece, draws - start)
        of_seeds = rng.multinomial(taken, np.full(seeds, 1 / seeds), size) / taken  # b S
        of_kinds = rng.multinomial(images, counts / images, size) / images  # b K
        for place, name in enumerate(arrays):
            means = of_kinds @ kinds[place * seeds : (place + 1) * seeds].T  # b S
            found[name].append((of_seeds * means).sum(axis=1))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def percentiles(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------------------- tests


def over_images(difference: np.ndarray, draws: int = 10_000, seed: int = 0) -> OverImages:
    """Tests of S N differences (1, 0, -1, or shares of draws) for the weights at hand; seeds are averaged per image."""
    seeds, images = difference.shape
    first, second = int((difference > 0).sum()), int((difference < 0).sum())
    one_answer = seeds == 1 and bool(np.isin(difference, (-1, 0, 1)).all())
    exact = mcnemar(first, second) if one_answer else None
    return OverImages(images, first, second, exact, swapped(difference.mean(axis=0), draws, seed))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: of images that one alone has right, each is as likely either's."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def swapped(difference: np.ndarray, draws: int, seed: int) -> float:
    """Two-sided p of the mean of N paired differences: how often random signs give one as far from 0.

    Images on which both agree never change the sum and are left out. The observed signs count as one of the draws, so
    p is never 0 (Phipson and Smyth, 2010).
    """
    values = difference[difference != 0]
    observed = abs(values.sum())
    rng = np.random.default_rng(seed)
    piece, extreme = max(1, CELLS // max(1, len(values))), 0
    for start in range(0, draws, piece):
        signs = rng.integers(0, 2, (min(piece, draws - start), len(values)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ values) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + draws)


def over_seeds(differences: Sequence[float] | np.ndarray, draws: int = 10_000, seed: int = 0) -> OverSeeds:
    """Tests of S paired differences, one a training seed."""
    values = np.asarray(differences, dtype=np.float64)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    spread = deviation is not None and deviation > 1e-12
    p = student(float(values.mean()) / (deviation / math.sqrt(len(values))), len(values) - 1) if spread else None  # type: ignore[operator]
    signs = every_swap(values) if len(values) <= EXACT else swapped(values, draws, seed)
    return OverSeeds(len(values), float(values.mean()), deviation, p, signs)


def every_swap(values: np.ndarray) -> float:
    """The exact form of `swapped`: 2^S swaps. Its smallest p is 2 / 2^S: 0.25 with three seeds, below 0.05 from six."""
    signs = np.array(list(product((1, -1), repeat=len(values))))  # 2^S S
    return float((np.abs(signs @ values) >= abs(values.sum()) - 1e-12).mean())


def student(t: float, freedom: int) -> float:
    """Two-sided p of Student's t with whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, cosine) if freedom % 2 else (1.0, 1.0)
    for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if freedom % 2 == 0:
        inside = sine * total
    else:
        inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    return max(0.0, 1 - abs(inside))


def holm(values: Sequence[float]) -> list[float]:
    """p-values of a family, corrected so that all together err as often as one would (Holm, 1979)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected
