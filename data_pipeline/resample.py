"""How often an image is seen per epoch, so that rare synsets are not drowned (Mahajan et al., 2018; MAWS §4.1).

    f(h) = images with synset h / labelled images
    r(h) = clip(sqrt(t / f(h)), 1, cap)          r(I) = max of r(h) over the synsets h of image I

r(I) depends on the image only through its rarest synset, so a histogram {count of the rarest synset: images} is all
that the threshold t needs. As a function of sqrt(t), each r is linear between two breakpoints, so the mean is piecewise
linear and t follows exactly.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from data_pipeline.errors import UsageError

EPOCH_FACTOR: Final = 5 / 3  # 3.0B images become epochs of 5.0B samples (MAWS §4.1)
CAP: Final = 20.0  # recipes §5.2(8): against classes of one image


@dataclass(frozen=True)
class Repeats:
    """Repeat factors by the count of an image's rarest synset."""

    threshold: float
    images: int  # labelled images
    cap: float = CAP

    def of(self, rarest: int) -> float:
        """r(I); images without synsets (rarest = 0) are seen once."""
        if rarest == 0 or self.threshold == 0:
            return 1.0
        return min(self.cap, max(1.0, math.sqrt(self.threshold * self.images / rarest)))

    def mean(self, histogram: Mapping[int, int]) -> float:
        total = sum(histogram.values())
        return math.fsum(n * self.of(rarest) for rarest, n in histogram.items()) / total if total else 1.0


def solve_threshold(histogram: Mapping[int, int], epoch_factor: float, cap: float = CAP) -> float:
    """The threshold t whose mean repeat over labelled images is `epoch_factor`; 0 where nothing is to be repeated."""
    if not 1 <= epoch_factor <= cap:
        raise UsageError(
            f"--epoch-factor must be from 1 to {cap:g} (the largest repeat of one image), not {epoch_factor:g}"
        )
    images = sum(histogram.values())
    if images == 0 or epoch_factor == 1:
        return 0.0
    ends = {math.sqrt(rarest / images) for rarest in histogram}  # sqrt(t) where an image's repeat leaves 1 …
    breakpoints = sorted(ends | {cap * end for end in ends})  # … and where it meets the cap

    def mean(root: float) -> float:
        return math.fsum(n * min(cap, max(1.0, root / math.sqrt(h / images))) for h, n in histogram.items()) / images

    low, high = 0, len(breakpoints) - 1  # the mean is 1 at the first breakpoint and `cap` at the last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean(breakpoints[middle]) <= epoch_factor else (low, middle)
    left, right = breakpoints[low], breakpoints[high]
    below, above = mean(left), mean(right)
    root = left if above == below else left + (right - left) * (epoch_factor - below) / (above - below)
    return root * root
