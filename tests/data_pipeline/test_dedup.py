"""Pairs of near hashes against looking at all pairs, and the choice of who stays against a plain loop."""

import numpy as np
import pytest

from data_pipeline import dedup
from data_pipeline.dedup import EVALUATION, TRAINING, Hashes, Limits, Pairs


def make_hashes(rng, families=50, members=4, most=40, kinds=None) -> Hashes:
    """Random hashes with relatives up to `most` bits away, so that every distance around the limit occurs."""
    bits = np.repeat(rng.integers(0, 2, (families, 256), dtype=np.uint8), members, axis=0)
    for row in bits:
        row[rng.choice(256, rng.integers(0, most), replace=False)] ^= 1
    words = np.unique(np.packbits(bits, axis=1), axis=0).view(np.uint64)
    words = words[rng.permutation(len(words))]
    if kinds is None:
        kinds = np.full(len(words), TRAINING)
    ids = rng.permutation(10 * len(words))[: len(words)]
    return Hashes(ids, words, kinds[: len(words)].astype(np.uint8))


def all_pairs(hashes: Hashes, limits: Limits) -> dict[tuple[int, int], int]:
    found = {}
    for i, one in enumerate(hashes.words):
        for j, other in enumerate(hashes.words[:i]):
            distance = sum(int(a ^ b).bit_count() for a, b in zip(one, other, strict=True))
            mine, theirs = hashes.kinds[i], hashes.kinds[j]
            both = mine & theirs & TRAINING
            across = (mine & TRAINING and theirs & EVALUATION) or (mine & EVALUATION and theirs & TRAINING)
            if (both and distance <= limits.near) or (across and distance <= limits.evaluation):
                found[tuple(sorted((int(hashes.ids[i]), int(hashes.ids[j]))))] = distance
    return found


def banded(hashes: Hashes, limits: Limits, prefix_bits: int = 0) -> list[tuple[int, int, int]]:
    """All blocks of all bands, as the tasks of a build take them."""
    found = []
    for band in range(dedup.BANDS):
        prefix = hashes.bands[:, band] >> (dedup.BAND_BITS - prefix_bits)
        blocks = [Hashes(*(column[prefix == n] for column in hashes)) for n in range(1 << prefix_bits)]
        for number, block in enumerate(blocks):
            parts = list(dedup.pairs_within(block, band, limits))
            for high in range(prefix_bits if limits.radius else 0):
                if not number >> high & 1:
                    bit = dedup.BAND_BITS - prefix_bits + high
                    parts += dedup.pairs_between(block, blocks[number | 1 << high], band, bit, limits)
            found += [tuple(map(int, row)) for part in parts for row in zip(*part, strict=True)]
    return found


@pytest.mark.parametrize("limit", [0, 5, 14, 15, 16, 31])
@pytest.mark.parametrize("prefix_bits", [0, 3])
def test_every_pair_within_the_limit_is_found_once(limit, prefix_bits):
    limits = Limits(limit, -1)
    hashes = make_hashes(np.random.default_rng(limit))
    found = banded(hashes, limits, prefix_bits)
    expected = all_pairs(hashes, limits)
    assert {(a, b): distance for a, b, distance in found} == expected
    assert len(found) == len(expected)
    assert limit < 5 or limit - 2 <= max(expected.values()) <= limit  # the corpus has pairs right at the limit


def test_training_and_evaluation_pictures_have_limits_of_their_own():
    rng = np.random.default_rng(5)
    kinds = rng.choice([TRAINING, EVALUATION, TRAINING | EVALUATION], 200)
    hashes = make_hashes(rng, kinds=kinds)
    for limits in (Limits(8, 20), Limits(-1, 12), Limits(25, -1), Limits(25, 3)):
        found = banded(hashes, limits)
        assert {(a, b): distance for a, b, distance in found} == all_pairs(hashes, limits) != {}
        assert len(found) == len({pair[:2] for pair in found})


def test_thousands_in_one_bucket_are_compared_a_part_at_a_time(monkeypatch):
    """All share two bands; what is in memory at once is counted."""
    monkeypatch.setattr(dedup, "PAIRS_AT_ONCE", 1000)
    bits = np.random.default_rng(1).integers(0, 2, (700, 256), dtype=np.uint8)
    bits[:, :32] = 1
    bits[600:] = bits[:100]
    bits[600:, 40:45] ^= 1
    words = np.packbits(bits, axis=1).view(np.uint64)
    hashes = Hashes(np.arange(700), words, np.full(700, TRAINING, np.uint8))
    most, distances = 0, dedup.distances

    def counted(first, second):
        nonlocal most
        most = max(most, len(first))
        return distances(first, second)

    monkeypatch.setattr(dedup, "distances", counted)
    for limit in (14, 15):  # by two bands, and by one
        pairs = [row for part in dedup.pairs_within(hashes, 0, Limits(limit, -1)) for row in zip(*part, strict=True)]
        assert sorted(pairs) == [(n, 600 + n, 5) for n in range(100)]
    assert 0 < most <= 2000


def loop(pairs: dict[tuple[int, int], int], count: int) -> dict[int, tuple[int, int]]:
    """The rule, word for word: (kept, distance) of each that is removed."""
    kept: list[int] = []
    removed = {}
    for number in range(count):
        near = [(pairs[n, number], n) for n in kept if (n, number) in pairs]
        if near:
            distance, at = min(near)
            removed[number] = (at, distance)
        else:
            kept.append(number)
    return removed


@pytest.mark.parametrize("seed", range(20))
def test_who_stays_is_decided_in_the_order_of_preference(seed):
    rng = np.random.default_rng(seed)
    pairs = {tuple(sorted(map(int, rng.choice(80, 2, replace=False)))): int(rng.integers(0, 16)) for _ in range(150)}
    first, second = np.array(list(pairs)).T
    order = rng.permutation(len(pairs))
    given = Pairs(first[order], second[order], np.array(list(pairs.values()), np.uint8)[order])
    removed, kept, distance = dedup.choose(given, 80)
    found = {int(r): (int(k), int(d)) for r, k, d in zip(removed, kept, distance, strict=True)}
    assert found == loop(pairs, 80)
    assert not set(found) & {k for k, _ in found.values()}  # every copy named stays itself


def test_a_chain_is_not_removed_as_a_whole():
    """a - b - c, each close to the next only: b goes for a, and c, which is far from a, stays."""
    chain = Pairs(np.array([0, 1]), np.array([1, 2]), np.array([9, 9], np.uint8))
    removed, kept, _ = dedup.choose(chain, 3)
    assert (removed.tolist(), kept.tolist()) == ([1], [0])


def test_no_pairs_remove_nobody():
    nothing = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    assert [len(part) for part in dedup.choose(nothing, 5)] == [0, 0, 0]
    empty = Hashes(np.empty(0, np.int64), np.empty((0, 4), np.uint64), np.empty(0, np.uint8))
    assert banded(empty, Limits(31, 31)) == []


def test_the_leader_of_a_picture_is_the_first_that_looks_the_same():
    looks = np.array([[10, 10], [200, 10], [14, 12], [196, 10], [18, 10]], np.uint8)
    assert dedup.leaders(looks, 6).tolist() == [0, 1, 0, 1, 4]  # the last is 8 levels from the first
    assert dedup.leaders(np.empty((0, 2), np.uint8), 6).tolist() == []
    assert dedup.looks_apart(looks[0], looks).tolist() == [0, 190, 4, 186, 8]
