"""The statistics of a comparison against scipy, loops and closed forms."""

import itertools

import numpy as np
import pytest
from scipy import stats

from eval.comparison import paired_statistics
from eval.comparison.paired_statistics import (
    bootstrap_means,
    every_swap,
    holm,
    mcnemar,
    over_images,
    over_seeds,
    percentiles,
    student,
    swapped,
)


def answers(seeds: int, images: int, share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, images)) < share).astype(float)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
def test_students_p_is_scipys(freedom):
    for t in (0.0, 0.3, -1.7, 4.2, 60.0):
        assert student(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)


def test_the_paired_t_test_over_seeds_is_scipys():
    a, b = np.array([0.31, 0.29, 0.35, 0.30]), np.array([0.27, 0.30, 0.28, 0.26])
    assert over_seeds(a - b).t == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_mcnemar_is_the_binomial_test_of_the_images_that_one_alone_has_right():
    for first, second in ((0, 0), (3, 3), (1, 9), (25, 10), (400, 460)):
        expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected)


def test_every_swap_of_signs_is_counted_over_seeds():
    values = [0.03, -0.01, 0.02, 0.05]
    loop = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert every_swap(np.array(values)) == pytest.approx(sum(x >= abs(sum(values)) - 1e-12 for x in loop) / 16)
    assert every_swap(np.array([0.1, 0.2, 0.3])) == 0.25  # three seeds that agree cannot say more


def test_swapping_signs_over_images_agrees_with_mcnemar_and_with_scipy():
    one = answers(1, 300, 0.4, 0) - answers(1, 300, 0.3, 1)
    result = over_images(one, draws=20_000)
    assert result.permutation == pytest.approx(result.mcnemar, abs=0.01)
    assert (result.only_first, result.only_second) == (int((one == 1).sum()), int((one == -1).sum()))
    several = (answers(3, 80, 0.45, 2) - answers(3, 80, 0.35, 3)).mean(axis=0)
    scipys = stats.permutation_test((several, np.zeros(80)), lambda a, b, axis: np.mean(a - b, axis=axis),
                                    permutation_type="samples", n_resamples=5000, vectorized=True,
                                    random_state=0)  # fmt: skip
    assert swapped(several, 20_000, 0) == pytest.approx(scipys.pvalue, abs=0.02)


def test_mcnemar_is_not_asked_about_several_seeds():
    assert over_images(answers(2, 50, 0.5, 0) - answers(2, 50, 0.5, 1)).mcnemar is None


def test_with_one_seed_the_bootstrap_is_scipys_over_images():
    values = answers(1, 200, 0.3, 5)
    low, high = percentiles(bootstrap_means({"a": values}, 20_000, 0)["a"])
    scipys = stats.bootstrap((values[0],), np.mean, method="percentile", n_resamples=9999, random_state=0)
    assert (low, high) == pytest.approx(tuple(scipys.confidence_interval), abs=0.006)


def test_the_bootstrap_resamples_seeds_and_images_like_a_loop_over_their_indices(monkeypatch):
    monkeypatch.setattr(paired_statistics, "CELLS", 1 << 12)  # several pieces
    a, b = answers(3, 40, 0.6, 7), answers(3, 40, 0.4, 8)
    a[1] = np.minimum(1, a[1] + answers(1, 40, 0.5, 9)[0])  # seeds that differ
    ours = bootstrap_means({"a": a, "b": b}, 20_000, 0)
    rng, loop = np.random.default_rng(1), []
    for _ in range(2000):
        seeds, images = rng.integers(0, 3, 2), rng.integers(0, 40, 40)  # S - 1 of S
        loop.append((a - b)[seeds][:, images].mean())
    difference = ours["a"] - ours["b"]
    assert difference.mean() == pytest.approx(np.mean(loop), abs=0.01)
    assert difference.std() == pytest.approx(np.std(loop), rel=0.05)
    assert percentiles(difference) == pytest.approx(np.quantile(loop, [0.025, 0.975]), abs=0.03)


def test_the_spread_between_seeds_is_neither_shrunk_nor_lost():
    """Images that all agree leave only seeds: the bootstrap's variance is the unbiased s²/S, not (S-1)/S of it."""
    shares = np.repeat(np.array([[0.2], [0.5], [0.9]]), 10, axis=1)
    variance = bootstrap_means({"a": shares}, 40_000, 0)["a"].var()
    assert variance == pytest.approx(shares[:, 0].var(ddof=1) / 3, rel=0.03)


def test_holm_is_the_step_down_of_bonferroni():
    values = [0.04, 0.001, 0.03, 0.5]
    assert holm(values) == pytest.approx([0.09, 0.004, 0.09, 0.5])
    loop = {}
    for rank, index in enumerate(np.argsort(values)):
        loop[index] = max([min(1.0, values[index] * (4 - rank)), *loop.values()])
    assert holm(values) == pytest.approx([loop[index] for index in range(4)])
    assert holm([]) == []


def test_differences_without_spread_have_no_t_test():
    assert over_seeds([0.1]).t is None and over_seeds([0.1]).deviation is None
    assert over_seeds([0.1, 0.1, 0.1]).t is None
