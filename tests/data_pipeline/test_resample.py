import math
import random
from collections import Counter, defaultdict
from itertools import product

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.resample import CAP, EPOCH_FACTOR, METHODS, Repeats, copies, copy_keys, signature, solve_threshold


def corpus(seed: int, images: int = 400, synsets: int = 60) -> list[tuple[set[int], float]]:
    """Labels and weights of images, their synsets as frequent as words; every tenth image has none."""
    random_ = random.Random(seed)
    frequency = [1 / (rank + 1) for rank in range(synsets)]
    labels = [set(random_.choices(range(synsets), frequency, k=random_.randint(1, 4))) for _ in range(images)]
    return [(set() if n % 10 == 0 else image, random_.choice((0.25, 1.0, 3.0))) for n, image in enumerate(labels)]


def epoch_by_definition(images: list[tuple[set[int], float]], method: str, threshold: float, cap: float) -> float:
    """Image by image and synset by synset, as the head of resample.py writes it."""
    labelled = sum(bool(labels) for labels, _ in images)
    images_with = Counter(synset for labels, _ in images for synset in labels)
    frequency = {synset: number / labelled for synset, number in images_with.items()}
    total = 0.0
    for labels, weight in images:
        factors = []
        for h in labels:
            if method == "sqrt":
                factors.append(max(1, min(cap, math.sqrt(threshold / frequency[h]))))
            if method == "identity":
                factors.append(max(1, min(cap, threshold / frequency[h])))
            if method == "cap":
                factors.append(min(1, threshold / frequency[h]))
        if method == "cap" and labels:
            kept_by_one = 1.0
            for factor in factors:
                kept_by_one *= 1 - factor
            total += weight * (1 - kept_by_one)
        else:
            total += weight * max(factors, default=1)
    return total


def histogram(images: list[tuple[set[int], float]], method: str) -> tuple[dict[tuple[int, ...], float], int]:
    images_with = Counter(synset for labels, _ in images for synset in labels)
    weights: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for labels, weight in images:
        weights[signature(method, [images_with[synset] for synset in labels])] += weight
    return weights, sum(bool(labels) for labels, _ in images)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "factor"),
    [(m, f) for m in ("sqrt", "identity") for f in (1.0001, EPOCH_FACTOR, 3, 12, 19.9)]
    + [("cap", f) for f in (0.001, 0.3, 0.77, 0.999)],
)
def test_the_solved_threshold_gives_the_asked_factor_by_the_definition(seed, method, factor):
    images = corpus(seed)
    weights, labelled = histogram(images, method)
    threshold = solve_threshold(weights, labelled, factor=factor, method=method)
    with_labels = [image for image in images if image[0]]
    once = sum(weight for _, weight in with_labels)
    assert epoch_by_definition(with_labels, method, threshold, CAP) == pytest.approx(once * factor, rel=1e-9)
    epoch = Repeats(threshold, labelled, method).samples(weights)
    assert epoch == pytest.approx(epoch_by_definition(images, method, threshold, CAP), rel=1e-9)


@pytest.mark.parametrize(("method", "samples"), [("sqrt", 1700), ("identity", 1001), ("cap", 400)])
def test_a_number_of_samples_counts_the_images_without_synsets_too(method, samples):
    images = corpus(4)
    weights, labelled = histogram(images, method)
    threshold = solve_threshold(weights, labelled, samples=samples, method=method)
    assert epoch_by_definition(images, method, threshold, CAP) == pytest.approx(samples, rel=1e-9)


@pytest.mark.parametrize("method", ["sqrt", "identity"])
def test_the_exact_solution_is_the_one_a_bisection_finds(method):
    images = corpus(9)
    weights, labelled = histogram(images, method)
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if epoch_by_definition(images, method, middle, 5) < 1234.5 else (low, middle)
    assert solve_threshold(weights, labelled, samples=1234.5, method=method, cap=5) == pytest.approx(low, rel=1e-9)


def test_five_billion_samples_of_three_billion_images_are_solved_to_the_last_one():
    """Counts as in MAWS §4.1; floats of this size still tell single samples apart."""
    weights = {(count,): float(number) for count, number in ((50, 10**6), (10**4, 4 * 10**8), (10**7, 26 * 10**8))}
    images = int(sum(weights.values()))
    threshold = solve_threshold(weights, images, samples=5e9)
    assert Repeats(threshold, images).samples(weights) == pytest.approx(5e9, abs=1)


def test_cap_keeps_an_image_as_often_as_metaclips_draws_do():
    """Every combination of kept and not kept, weighed by its probability: an image stays if one synset keeps it."""
    counts, images, threshold = (20, 50, 400), 1000, 0.03
    chances = [min(1, threshold * images / count) for count in counts]
    stays = sum(
        math.prod(chance if kept else 1 - chance for chance, kept in zip(chances, draw, strict=True))
        for draw in product((False, True), repeat=3)
        if any(draw)
    )
    assert Repeats(threshold, images, "cap").of(counts) == pytest.approx(stays)
    assert Repeats(threshold, images, "cap").of((50, 400)) == pytest.approx(1 - 0.4 * 0.925)


def test_rare_images_meet_the_cap_and_common_ones_are_never_left_out():
    for method in ("sqrt", "identity"):
        repeats = Repeats(1.0, 10**6, method)
        assert (repeats.of([1]), repeats.of([10**6]), repeats.of([2 * 10**6])) == (CAP, 1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_images_without_synsets_are_seen_once(method):
    assert Repeats(0.01, 1000, method).of([]) == 1


def test_a_factor_of_one_repeats_nothing():
    weights = {(1,): 3.0, (50,): 100.0}
    assert Repeats(solve_threshold(weights, 103, factor=1.0), 103).samples(weights) == 103


def test_the_limits_themselves_can_be_asked_for():
    weights = {(1,): 3.0, (50,): 100.0}
    assert Repeats(solve_threshold(weights, 103, factor=CAP), 103).samples(weights) == pytest.approx(103 * CAP)
    both = {(1, 50): 3.0, (50,): 100.0}
    for factor in (0.0, 1.0):
        threshold = solve_threshold(both, 103, factor=factor, method="cap")
        assert Repeats(threshold, 103, "cap").samples(both) == pytest.approx(103 * factor)


@pytest.mark.parametrize(
    ("method", "asked", "message"),
    [
        ("sqrt", {"factor": 0.5}, "from 1 to 20"),
        ("identity", {"factor": 21}, "from 1 to 20"),
        ("cap", {"factor": 5 / 3}, "from 0 to 1"),
        ("sqrt", {"samples": 99}, r"100 to 2,000 samples \(100 without"),
        ("cap", {"samples": 101}, r"0 to 100 samples"),
        ("none", {"samples": 99}, r"100 to 100 samples"),
    ],
)
def test_an_impossible_epoch_names_its_limits(method, asked, message):
    with pytest.raises(UsageError, match=message):
        solve_threshold({(1,): 100.0}, 100, method=method, **asked)


def test_no_labelled_image_needs_no_threshold():
    assert solve_threshold({}, 0) == 0
    assert solve_threshold({(): 5.0}, 0) == 0
    assert Repeats(0.0, 0).samples({(): 5.0}) == 5


def test_a_source_of_weight_zero_is_never_seen_and_does_not_move_the_threshold():
    weights = {(5,): 10.0, (60,): 80.0}
    assert solve_threshold(weights | {(2,): 0.0}, 100) == solve_threshold(weights, 100)


def test_copies_have_the_mean_of_the_factor_and_are_a_function_of_the_key():
    for repeat in (0.2, 1.0, 1.7, 3.5):
        numbers = [copies(f"k{n}", repeat) for n in range(4000)]
        assert set(numbers) <= {math.floor(repeat), math.ceil(repeat)}
        assert sum(numbers) / 4000 == pytest.approx(repeat, abs=0.03)
        assert numbers == [copies(f"k{n}", repeat) for n in range(4000)]


def test_copies_lie_side_by_side_among_all_other_keys():
    keys = [key for name in ("a", "a-2", "a-b", "a/b", "a1", "b") for key in copy_keys(name, 12)]
    assert keys == sorted(keys)
    assert len(set(keys)) == 72
    assert list(copy_keys("a", 0)) == []
