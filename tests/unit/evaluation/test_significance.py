"""Paired tests against scipy's exact one and simulated pairs of equal models; ranks against published numbers."""

from __future__ import annotations

import math
from itertools import chain, combinations

import numpy as np
import pytest
from scipy.stats import chi2, permutation_test, wilcoxon

from pretrain.evaluation.metrics.significance import holm, paired_difference, rank_models
from pretrain.evaluation.metrics.statistics import balanced_accuracy


def share(values: np.ndarray) -> float:
    return float(np.mean(values))


@pytest.mark.parametrize("seed", range(4))
def test_exact_swaps_equal_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=10), rng.normal(0.4, size=10)
    expected = permutation_test(
        (second, first), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=np.inf
    )
    found = paired_difference(share, first, second, num_resamples=50)
    assert found.is_exact and found.p_permutation == pytest.approx(expected.pvalue, abs=1e-12)
    assert found.estimate.value == pytest.approx(expected.statistic)


def test_random_swaps_come_near_the_exact_ones() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=11), rng.normal(0.7, size=11)
    exact, drawn = (
        paired_difference(share, first, second, num_resamples=10, num_permutations=num) for num in (2**11, 2**11 - 1)
    )
    assert exact.is_exact and not drawn.is_exact
    assert drawn.p_permutation == pytest.approx(exact.p_permutation, abs=0.03)


def test_rows_where_both_agree_need_no_swaps() -> None:
    first = np.zeros(500)
    second = first.copy()
    second[:6] = 1
    found = paired_difference(share, first, second, num_resamples=200)
    assert found.is_exact and found.p_permutation == 2 / 2**6  # all six one way, or all the other
    assert found.num_groups == 500 and found.estimate.value == pytest.approx(6 / 500)


def test_a_patient_is_one_unit() -> None:
    """Ten patients of 20 images each that are right or wrong together: images alone would be certain."""
    first, second = np.repeat([0, 1, 0, 1, 0, 0, 1, 0, 1, 0], 20), np.repeat([1, 1, 1, 0, 0, 1, 1, 0, 1, 1], 20)
    patients = np.repeat(np.arange(10), 20)
    apart = paired_difference(share, first, second, num_resamples=500)
    together = paired_difference(share, first, second, groups=patients, num_resamples=500)
    assert apart.p_permutation < 0.001 and apart.p_bootstrap < 0.005
    assert together.is_exact and together.p_permutation == pytest.approx(12 / 32)  # 4 of 5 in one direction, or more
    assert together.p_bootstrap > 0.1 and together.estimate.low < 0 < together.estimate.high


def test_equal_models_are_found_different_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    small = {"bootstrap": 0, "permutation": 0}
    num_pairs = 150
    for _ in range(num_pairs):
        mine, theirs = (np.where(rng.random(100) < 0.6, labels, rng.integers(3, size=100)) for _ in range(2))
        found = paired_difference(
            balanced_accuracy, mine, theirs, [labels], strata=labels, num_resamples=100, num_permutations=100
        )
        small["bootstrap"] += found.p_bootstrap < 0.1
        small["permutation"] += found.p_permutation < 0.1
    assert 0.03 <= small["permutation"] / num_pairs <= 0.17
    assert 0.03 <= small["bootstrap"] / num_pairs <= 0.22  # a stratum of ten rows makes it a little too sure


def test_direction_and_undefined() -> None:
    first, second = np.zeros(40), np.ones(40)
    found = paired_difference(share, first, second, num_resamples=100, num_permutations=100)
    assert found.estimate.value == 1 and found.p_bootstrap == pytest.approx(2 / 101)
    assert found.p_permutation == pytest.approx(1 / 101)
    same = paired_difference(share, first, first, num_resamples=20)
    assert same.p_bootstrap == 1 and same.p_permutation == 1 and same.estimate.value == 0
    undefined = paired_difference(lambda values: float("nan"), first, second, num_resamples=20)
    assert math.isnan(undefined.p_permutation) and math.isnan(undefined.estimate.low) and undefined.estimate.n == 40


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03], [0.5, 0.001, 0.001, 0.2, 0.04], [0.6, 0.9], [0.02], []])
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """The definition: p of each hypothesis is the largest Bonferroni p of any set of hypotheses that it is in."""
    numbers = range(len(p_values))
    sets = list(chain.from_iterable(combinations(numbers, size) for size in range(1, len(p_values) + 1)))
    expected = [
        max(min(1.0, len(chosen) * min(p_values[n] for n in chosen)) for chosen in sets if number in chosen)
        for number in numbers
    ]
    assert holm(p_values) == pytest.approx(expected)


@pytest.mark.parametrize(("num_models", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_critical_difference_has_the_published_quantiles(num_models: int, q: float) -> None:
    """Table 5(a) of Demsar (2006)."""
    values = np.random.default_rng(0).random((num_models, 14))
    found = rank_models(values, [False] * 14).critical_difference
    assert found == pytest.approx(q * math.sqrt(num_models * (num_models + 1) / (6 * 14)), rel=5e-4)


def test_ranks_of_the_published_example() -> None:
    """Demsar (2006), table 6: AUC of C4.5 and its variants with parameter m, cf, and both on 14 sets.

    0.9751 is printed as 0.975; the paper ranks what it rounded, and gives this one the better rank.
    """
    values = np.array(
        [
            [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.000, 0.940, 0.619, 0.972, 0.957],
            [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.000, 0.962, 0.666, 0.981, 0.978],
            [0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1.000, 0.965, 0.614, 0.9751, 0.946],
            [0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1.000, 0.962, 0.669, 0.975, 0.970],
        ]
    )
    table = rank_models(values, [False] * 14)
    assert table.mean_rank_M == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert table.critical_difference == pytest.approx(1.25, abs=0.01)  # q 2.569
    # the paper's chi-squared of 9.28, corrected for its ties: one of four models, three of two
    corrected = 9.28 / (1 - (60 + 3 * 6) / (14 * 4 * (4**2 - 1)))
    assert table.friedman_p == pytest.approx(chi2.sf(corrected, df=3), abs=2e-4)
    assert table.not_different == ((3, 1, 2, 0),)


def test_runs_of_models_that_do_not_differ() -> None:
    first_to_last = np.tile(np.arange(6.0)[:, None], (1, 30))  # six models, always in this order
    table = rank_models(first_to_last, [True] * 30)
    assert table.mean_rank_M.tolist() == [1, 2, 3, 4, 5, 6] and table.friedman_p < 1e-6
    assert table.critical_difference == pytest.approx(1.377, abs=0.01)
    assert table.not_different == ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))
    reversed_ = rank_models(first_to_last, [False] * 30)
    assert reversed_.mean_rank_M.tolist() == [6, 5, 4, 3, 2, 1] and reversed_.not_different[0] == (5, 4)


def test_two_models_and_ties() -> None:
    table = rank_models(np.array([[0.5, 0.7, 0.6], [0.5, 0.6, 0.5]]), [False, False, True])
    assert table.ranks_MS.tolist() == [[1.5, 1, 2], [1.5, 2, 1]]
    assert math.isnan(table.friedman_p) and table.not_different == ((0, 1),)
    # with two models the critical difference is that of a sign test; scipy's Wilcoxon test of the same kind agrees
    clear = rank_models(np.stack([np.arange(12.0) + 1, np.arange(12.0)]), [False] * 12)
    assert clear.not_different == () and wilcoxon(np.arange(12.0) + 1, np.arange(12.0)).pvalue < 0.05


def test_no_interval_and_no_bootstrap_p_where_there_is_nothing_to_draw() -> None:
    """One patient: every resample is the data itself, and would look certain."""
    labels = np.arange(6)
    first, second = np.zeros(6, dtype=np.int64), labels
    found = paired_difference(balanced_accuracy, first, second, [labels], groups=["one"] * 6, strata=labels)
    assert found.estimate.value == pytest.approx(5 / 6) and np.isnan(found.estimate.low) and np.isnan(found.p_bootstrap)
    assert found.p_permutation == 1


def test_equal_models_seldom_differ_where_classes_are_many_and_rare() -> None:
    rng = np.random.default_rng(2)
    patients, num_small = np.repeat(np.arange(50), 3), 0
    for _ in range(30):
        labels = rng.integers(80, size=150)
        skill = rng.beta(2, 1, size=50)[patients]
        outputs = [np.where(rng.random(150) < skill, labels, (labels + 1) % 80) for _ in range(2)]
        found = paired_difference(
            balanced_accuracy,
            *outputs,
            [labels],
            groups=patients,
            strata=labels,
            num_resamples=100,
            num_permutations=50,
        )
        num_small += found.p_bootstrap < 0.05
    assert num_small <= 6  # of 30
