import math
import random
from collections import Counter

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.resample import CAP, EPOCH_FACTOR, Repeats, solve_threshold


def corpus(seed: int, images: int = 400, synsets: int = 60) -> list[set[int]]:
    """Labels of images, their synsets as frequent as words."""
    random_ = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(synsets)]
    return [set(random_.choices(range(synsets), weights, k=random_.randint(1, 4))) for _ in range(images)]


def mean_repeat_by_definition(labels: list[set[int]], threshold: float, cap: float) -> float:
    """r(I) = max over h of clip(sqrt(t / f(h)), 1, cap), image by image."""
    images_with = Counter(synset for image in labels for synset in image)
    frequency = {synset: number / len(labels) for synset, number in images_with.items()}
    return sum(max(min(cap, max(1, math.sqrt(threshold / frequency[h]))) for h in image) for image in labels) / len(
        labels
    )


def histogram(labels: list[set[int]]) -> Counter[int]:
    images_with = Counter(synset for image in labels for synset in image)
    return Counter(min(images_with[synset] for synset in image) for image in labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [1.0001, EPOCH_FACTOR, 3, 12, 19.9])
def test_the_solved_threshold_gives_the_asked_mean_by_the_definition(seed, factor):
    labels = corpus(seed)
    threshold = solve_threshold(histogram(labels), factor)
    assert mean_repeat_by_definition(labels, threshold, CAP) == pytest.approx(factor, rel=1e-9)
    assert Repeats(threshold, len(labels)).mean(histogram(labels)) == pytest.approx(factor, rel=1e-9)


def test_the_exact_solution_is_the_one_a_bisection_finds():
    labels = corpus(9)
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_repeat_by_definition(labels, middle, 5) < 2.5 else (low, middle)
    assert solve_threshold(histogram(labels), 2.5, cap=5) == pytest.approx(low, rel=1e-9)


def test_equally_frequent_synsets_are_all_repeated_alike():
    threshold = solve_threshold({7: 70}, 2.0)
    assert Repeats(threshold, 70).of(7) == pytest.approx(2.0)


def test_rare_images_meet_the_cap():
    assert Repeats(threshold=1.0, images=10**6).of(1) == CAP


def test_a_factor_of_one_repeats_nothing():
    threshold = solve_threshold({1: 3, 50: 100}, 1.0)
    assert [Repeats(threshold, 103).of(rarest) for rarest in (0, 1, 50)] == [1, 1, 1]


def test_the_largest_mean_is_the_cap_itself():
    threshold = solve_threshold({1: 3, 50: 100}, CAP)
    assert Repeats(threshold, 103).mean({1: 3, 50: 100}) == pytest.approx(CAP)


@pytest.mark.parametrize("factor", [0.5, 21])
def test_an_impossible_factor_names_its_limits(factor):
    with pytest.raises(UsageError, match="from 1 to 20"):
        solve_threshold({1: 3}, factor)


def test_no_labelled_image_needs_no_threshold():
    assert solve_threshold({}, EPOCH_FACTOR) == 0
    assert Repeats(0.0, 0).mean({}) == 1
