"""How often an image is seen per epoch, so that rare synsets are not drowned (Mahajan et al., 2018; MAWS §4.1).

    f(h) = images with synset h / labelled images        w(I) = weight of the image's source, 1 unless given
    r(h) = clip(phi(t / f(h)), 1, cap)                   repeat(I) = w(I) · max of r(h) over the synsets h of image I

`sqrt` and `identity` are phi; with them r(I) depends on the rarest synset of an image only. `none` is r = 1. `cap` is
the balancing of MetaCLIP (arXiv 2309.16671, algorithm 1): instead of repeating the tail it thins the head. A synset
keeps each of its images with probability min(1, t / f(h)), independently; an image stays if any synset keeps it:

    r(I) = 1 - product over h of (1 - min(1, t / f(h)))

Their t is a number of matches (20,000 of 400 million), ours the share of the labelled images: t = 20,000 / images.
The loader rounds r up or down anew every epoch, so an image with r < 1 is left out of some epochs, not of all.

What the factor of an image depends on is its signature: () without synsets, else the count of its rarest synset, or all
counts for `cap`. A histogram {signature: sum of weights} is all that the threshold needs. With x = phi(t), each r(h) is
linear in x between two breakpoints, so the length of the epoch is piecewise linear and t follows exactly; for `cap` it
grows with t and is bisected until the two ends are neighbouring numbers.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from data_pipeline.errors import UsageError

EPOCH_FACTOR: Final = 5 / 3  # 3.0B images become epochs of 5.0B samples (MAWS §4.1)
CAP: Final = 20.0  # recipes §5.2(8): against classes of one image
POWERS: Final = {"sqrt": 0.5, "identity": 1.0}  # phi(x) = x ** power
METHODS: Final = (*POWERS, "cap", "none")

Signature = tuple[int, ...]


def signature(method: str, counts: Sequence[int]) -> Signature:
    """What of the counts of an image's synsets its repeat factor depends on."""
    if method == "cap":
        return tuple(sorted(counts))
    return (min(counts),) if counts else ()


@dataclass(frozen=True)
class Repeats:
    """Repeat factors by the counts of an image's synsets."""

    threshold: float  # t, a share of the labelled images
    images: int  # labelled images
    method: str = "sqrt"
    cap: float = CAP

    def of(self, counts: Sequence[int]) -> float:
        """r(I) before weights; images without synsets are seen once."""
        if not counts or self.method == "none":
            return 1.0
        if self.method == "cap":
            return 1.0 - math.prod(1.0 - min(1.0, self.threshold * self.images / count) for count in sorted(counts))
        return min(self.cap, max(1.0, (self.threshold * self.images / min(counts)) ** POWERS[self.method]))

    def samples(self, histogram: Mapping[Signature, float]) -> float:
        """Expected samples of an epoch: the sum of weight times factor."""
        return math.fsum(weight * self.of(counts) for counts, weight in histogram.items())


def solve_threshold(
    histogram: Mapping[Signature, float],
    images: int,
    *,
    samples: float | None = None,
    factor: float = EPOCH_FACTOR,
    method: str = "sqrt",
    cap: float = CAP,
) -> float:
    """The threshold with which an epoch has `samples` samples, images without synsets included, or with which
    resampling makes the labelled part `factor` times as long. 0 where nothing is to be repeated.

    Raises UsageError where no threshold gives that many, with the limits.
    """
    labelled = {counts: weight for counts, weight in histogram.items() if counts and weight > 0}
    once = math.fsum(labelled.values())
    fixed = math.fsum(weight for counts, weight in histogram.items() if not counts)
    if samples is None and not once:
        return 0.0
    wanted = once * factor if samples is None else samples - fixed
    low, high = (0.0, once) if method == "cap" else (once, once * (1.0 if method == "none" else cap))
    if not low * (1 - 1e-12) <= wanted <= high * (1 + 1e-12):
        raise UsageError(_out_of_reach(samples, factor, method, fixed, once, low, high))
    if method == "none" or not once:
        return 0.0
    if method == "cap":
        return _bisect(labelled, wanted) / images
    return 0.0 if wanted <= once else _interpolate(labelled, images, wanted, POWERS[method], cap)


def _interpolate(labelled: Mapping[Signature, float], images: int, wanted: float, power: float, cap: float) -> float:
    ends = {(counts[0] / images) ** power for counts in labelled}  # x where an image's factor leaves 1 …
    breakpoints = sorted(ends | {cap * end for end in ends})  # … and where it meets the cap
    scales = [((counts[0] / images) ** power, weight) for counts, weight in labelled.items()]

    def total(x: float) -> float:
        return math.fsum(weight * min(cap, max(1.0, x / scale)) for scale, weight in scales)

    low, high = 0, len(breakpoints) - 1  # no factor is above 1 at the first breakpoint, all meet the cap at the last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(breakpoints[middle]) <= wanted else (low, middle)
    left, right = breakpoints[low], breakpoints[high]
    below, above = total(left), total(right)
    x = left if above == below else left + (right - left) * (wanted - below) / (above - below)
    return x ** (1 / power)


def _bisect(labelled: Mapping[Signature, float], wanted: float) -> float:
    """t · images of `cap`: images of a synset that it keeps."""
    lengths: dict[int, list[tuple[Signature, float]]] = {}
    for item in labelled.items():
        lengths.setdefault(len(item[0]), []).append(item)
    groups = [
        (np.array([counts for counts, _ in items], np.float64).T, np.array([weight for _, weight in items]))
        for _, items in sorted(lengths.items())
    ]  # K N, N

    def total(kept: float) -> float:
        parts = []
        for counts, weights in groups:
            missed = np.ones(len(weights))
            for row in counts:  # one after the other: the same bits on any machine
                missed *= 1.0 - np.minimum(1.0, kept / row)
            parts.extend((weights * (1.0 - missed)).tolist())
        return math.fsum(parts)

    low, high = 0.0, float(max(counts[-1] for counts in labelled))  # nothing is kept at the one, all at the other
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if total(middle) <= wanted else (low, middle)
    return high if total(high) <= wanted else low


def _out_of_reach(
    samples: float | None, factor: float, method: str, fixed: float, once: float, low: float, high: float
) -> str:
    if samples is not None:
        reach = f"{_whole(fixed + low)} to {_whole(fixed + high)}"
        return (
            f"--epoch-samples {_whole(samples)}: with --resample {method} an epoch of this set has {reach} samples "
            f"({_whole(fixed + once)} without resampling)"
        )
    return f"--epoch-factor {factor:g}: with --resample {method} it must be from {low / once:g} to {high / once:g}"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


# --------------------------------------------------------------------------------------------------------- materialise


def copies(key: str, repeat: float, seed: int = 0) -> int:
    """Copies of a sample in a set for readers that know no repeat factors: floor(r), and one more with probability
    frac(r), drawn by a hash of the key."""
    digest = hashlib.sha256(f"copies {seed} {key}".encode()).digest()
    draw = (int.from_bytes(digest[:7]) >> 3) / (1 << 53)  # 53 bits: uniform in [0, 1)
    return math.floor(repeat + draw)


def copy_keys(key: str, number: int) -> list[str]:
    """KEY, KEY+2, KEY+3, … sorted; `+` is in no key of a source (shardset.safe_key), so that no copy takes the name of
    another sample, and sorts before everything a key can go on with, so that copies lie side by side."""
    return sorted(key if copy == 1 else f"{key}+{copy}" for copy in range(1, number + 1))
