"""Which pictures are copies of each other: exact ones by their bytes, near ones by the bits of their perceptual hash.

    256 bits ─▶ 16 bands of 16 bits ─▶ buckets ─▶ pairs at most T bits apart ─▶ which one stays

Two hashes that differ in fewer than 16 bits agree in a whole band, and two that differ in fewer than 32 agree in all
but one bit of a band (Norouzi et al., 2012, multi-index hashing): every pair is found, none is looked for everywhere.
Up to 14 bits two whole bands agree, which makes the work grow as N does: that is why the default is 14.
A second look (look.py) parts what has the same shape only. Arrays only, no files. Letters: N hashes, M pairs.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

BYTES: Final = 32  # of a hash
BANDS: Final = 16
BAND_BITS: Final = 16
LARGEST_DISTANCE: Final = 2 * BANDS - 1  # beyond it a pair may agree in no band, not even but for one bit
PAIRS_AT_ONCE: Final = 1 << 18  # compared in memory, 80 bytes each

TRAINING: Final = 1  # bits of `kinds`: whose pictures have this hash
EVALUATION: Final = 2

Ints = NDArray[np.int64]


class Hashes(NamedTuple):
    """Distinct hashes, each with a number of its own."""

    ids: Ints  # N
    words: NDArray[np.uint64]  # N 4
    kinds: NDArray[np.uint8]  # N

    @property
    def bands(self) -> NDArray[np.uint16]:
        return self.words.view(np.uint16)  # N 16


class Pairs(NamedTuple):
    """Two numbers and how many bits their hashes are apart."""

    first: Ints  # M
    second: Ints  # M
    distance: NDArray[np.uint8]  # M


class Limits(NamedTuple):
    """How many bits may differ; -1 finds nothing."""

    near: int  # between training pictures
    evaluation: int  # between a training and an evaluation picture

    @property
    def radius(self) -> int:
        """How many bits of a band may differ."""
        return max(0, max(self) // BANDS)


# -------------------------------------------------------------------------------------------------------------- hashes


def distances(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> Ints:
    """Differing bits, over the last axis."""
    return np.bitwise_count(first ^ second).sum(axis=-1, dtype=np.int64)


def looks_apart(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The largest difference in any cell, over the last axis."""
    return (np.maximum(first, second) - np.minimum(first, second)).max(axis=-1, initial=0)


def leaders(looks: NDArray[np.uint8], limit: int) -> Ints:
    """For pictures of one hash, in the order of preference: the first one that looks as good as the same."""
    found = np.full(len(looks), -1, np.int64)
    waiting = np.arange(len(looks))
    while len(waiting):
        same = looks_apart(looks[waiting], looks[waiting[0]]) <= limit
        found[waiting[same]] = waiting[0]
        waiting = waiting[~same]
    return found


# --------------------------------------------------------------------------------------------------------------- pairs


def pairs_within(hashes: Hashes, band: int, limits: Limits) -> Iterator[Pairs]:
    """The pairs of a block that this band is the first to find."""
    if max(limits) <= BANDS - 2:
        yield from _by_two_bands(hashes, band, limits)
        return
    hashes = _sorted(hashes, band)
    runs = _runs(hashes.bands[:, band].astype(np.int64))
    yield from _verified(hashes, hashes, _within(runs), range(band), limits)
    if limits.radius:
        for bit in range(BAND_BITS):
            left, right = _partners(runs, runs, 1 << bit)
            lower = runs.value[left] & (1 << bit) == 0  # each two buckets once
            candidates = _expand(runs, runs, left[lower], right[lower])
            yield from _verified(hashes, hashes, candidates, range(band), limits)


def _by_two_bands(hashes: Hashes, band: int, limits: Limits) -> Iterator[Pairs]:
    """Up to 14 bits apart, two bands agree. Buckets of 32 bits hold few strangers however many hashes there are."""
    bands = np.ascontiguousarray(hashes.bands.T)  # 16 N
    for second in range(band + 1, BANDS):
        order = np.argsort(bands[second], kind="stable")
        order = order[np.argsort(bands[band][order], kind="stable")]  # twice 16 bits: a radix sort each
        runs = _runs(bands[band][order].astype(np.uint32) << BAND_BITS | bands[second][order])
        candidates = ((order[i], order[j]) for i, j in _within(runs))
        earlier = [*range(band), *range(band + 1, second)]
        yield from _verified(hashes, hashes, candidates, earlier, limits)


def pairs_between(first: Hashes, second: Hashes, band: int, bit: int, limits: Limits) -> Iterator[Pairs]:
    """The same for two blocks whose hashes differ in this bit of the band, and in no other of it."""
    first, second = _sorted(first, band), _sorted(second, band)
    left, right = (_runs(hashes.bands[:, band].astype(np.int64)) for hashes in (first, second))
    candidates = _expand(left, right, *_partners(left, right, 1 << bit))
    yield from _verified(first, second, candidates, range(band), limits)


class _Runs(NamedTuple):
    """Stretches of equal band values in a sorted block."""

    value: NDArray[Any]
    start: Ints
    count: Ints


def _sorted(hashes: Hashes, band: int) -> Hashes:
    order = np.argsort(hashes.bands[:, band], kind="stable")
    return Hashes(hashes.ids[order], hashes.words[order], hashes.kinds[order])


def _runs(values: NDArray[Any]) -> _Runs:
    start = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.empty(0, np.int64)
    return _Runs(values[start], start, np.diff(start, append=len(values)))


def _within(runs: _Runs) -> Iterator[tuple[Ints, Ints]]:
    """Every two positions of a run."""
    several = np.flatnonzero(runs.count > 1)
    for i, j in _expand(runs, runs, several, several):
        upper = i < j
        yield i[upper], j[upper]


def _partners(left: _Runs, right: _Runs, flip: int) -> tuple[Ints, Ints]:
    """Positions of runs whose values differ in `flip` alone."""
    wanted = left.value ^ flip
    place = np.minimum(np.searchsorted(right.value, wanted), max(0, len(right.value) - 1))
    found = np.flatnonzero(right.value[place] == wanted) if len(right.value) else np.empty(0, np.int64)
    return found, place[found]


def _expand(left: _Runs, right: _Runs, at: Ints, to: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Every position of run `at` with every one of run `to`, some at a time however long the runs are."""
    width = right.count[to]
    height = np.maximum(1, PAIRS_AT_ONCE // np.maximum(width, 1))  # of a tile: that many rows of the left run
    tiles = -(-left.count[at] // height)
    run = np.repeat(np.arange(len(at)), tiles)
    row = (np.arange(len(run)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * height[run]
    rows = np.minimum(height[run], left.count[at][run] - row)
    start_left, start_right, width = left.start[at][run] + row, right.start[to][run], width[run]
    size = rows * width
    group = (np.cumsum(size) - size) // PAIRS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(run)]
    for low, high in itertools.pairwise(edges):
        sizes = size[low:high]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        across = np.repeat(width[low:high], sizes)
        yield (
            np.repeat(start_left[low:high], sizes) + within // across,
            np.repeat(start_right[low:high], sizes) + within % across,
        )


def _verified(
    left: Hashes,
    right: Hashes,
    candidates: Iterator[tuple[Ints, Ints]],
    earlier: Sequence[int],
    limits: Limits,
) -> Iterator[Pairs]:
    """Those near enough that no `earlier` band has found."""
    for i, j in candidates:
        distance = distances(left.words[i], right.words[j])
        close = distance <= max(limits)
        i, j, distance = i[close], j[close], distance[close]
        wanted = distance <= _limit(left.kinds[i], right.kinds[j], limits)
        differing = np.bitwise_count(left.bands[i] ^ right.bands[j])[:, list(earlier)]
        wanted &= ~(differing <= limits.radius).any(axis=1)
        first, second = left.ids[i[wanted]], right.ids[j[wanted]]
        if len(first):
            yield Pairs(np.minimum(first, second), np.maximum(first, second), distance[wanted].astype(np.uint8))


def _limit(first: NDArray[np.uint8], second: NDArray[np.uint8], limits: Limits) -> Ints:
    """What counts between pictures of these kinds."""
    training = (first & second & TRAINING) != 0
    across = ((first & TRAINING != 0) & (second & EVALUATION != 0)) | (
        (first & EVALUATION != 0) & (second & TRAINING != 0)
    )
    return np.maximum(np.where(training, limits.near, -1), np.where(across, limits.evaluation, -1))


# ---------------------------------------------------------------------------------------------------------- resolution


def choose(pairs: Pairs, count: int) -> tuple[Ints, Ints, NDArray[np.uint8]]:
    """Who is removed, for whom, and how far away that one is. Numbers are places in the order of preference.

    In that order, each stays unless one that stays is among its pairs: nobody is removed for the copy of a copy.
    """
    first, second = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    order = np.argsort(second, kind="stable")
    stays = bytearray(b"\1") * count
    for better, worse in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if stays[better]:  # final: all its own pairs came before
            stays[worse] = 0
    kept = np.frombuffer(stays, np.uint8).astype(bool)
    counts = kept[first] & ~kept[second]
    first, second, distance = first[counts], second[counts], pairs.distance[counts]
    order = np.lexsort((first, distance, second))  # the nearest of those that stay, then the one preferred most
    removed, at = np.unique(second[order], return_index=True)
    return removed, first[order][at], distance[order][at]
