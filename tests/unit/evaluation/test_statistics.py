"""Metrics against scikit-learn; intervals against simulated populations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from pretrain.evaluation.metrics.statistics import (
    accuracy,
    balanced_accuracy,
    bootstrap_interval,
    group_codes,
    macro_auroc,
    proportion_interval,
    weighted_f1,
)
from pretrain.evaluation.results import Metric


def scored_classes(
    seed: int, num_rows: int = 300, num_classes: int = 6, decimals: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Imbalanced labels and softmax scores that know something of them; few decimals make ties."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_classes, size=num_rows, p=rng.dirichlet(np.full(num_classes, 2.0)))
    logits = rng.normal(size=(num_rows, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, np.round(scores, decimals)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_decisions_equal_scikit_learn(seed: int) -> None:
    labels, scores = scored_classes(seed)
    predicted = scores.argmax(axis=1)
    assert balanced_accuracy(labels, predicted) == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert weighted_f1(labels, predicted) == pytest.approx(f1_score(labels, predicted, average="weighted"), abs=1e-12)
    assert accuracy(labels, predicted) == pytest.approx((labels == predicted).mean(), abs=1e-12)


def test_balanced_accuracy_averages_over_the_classes_present() -> None:
    # classes 1 and 3 are at most predicted: two recalls, 1/2 and 1
    assert balanced_accuracy(np.array([0, 0, 2]), np.array([0, 3, 2])) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_scikit_learn(seed: int) -> None:
    labels, scores = scored_classes(seed)
    exact = scores / scores.sum(axis=1, keepdims=True)
    expected = roc_auc_score(labels, exact, multi_class="ovr", average="macro")
    assert macro_auroc(labels, exact) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decimals", [0, 1, 2])
def test_auroc_counts_ties_as_one_half(decimals: int) -> None:
    labels, scores = scored_classes(seed=7, decimals=decimals)
    per_class = [roc_auc_score(labels == c, scores[:, c]) for c in range(scores.shape[1])]
    assert len(np.unique(scores)) <= 10**decimals + 1
    assert macro_auroc(labels, scores) == pytest.approx(np.mean(per_class), abs=1e-12)


def test_auroc_skips_classes_without_both_kinds_of_row() -> None:
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0], [0.1, 0.9, 0.0]])
    assert macro_auroc(labels, scores) == pytest.approx(0.75)  # 3 of 4 pairs right in both present columns
    assert math.isnan(macro_auroc(np.zeros(4, dtype=int), scores))


def test_interval_is_deterministic_and_depends_on_the_seed() -> None:
    labels, scores = scored_classes(1)
    first, again, other = (
        bootstrap_interval(macro_auroc, [labels, scores], strata=labels, num_resamples=50, seed=seed)
        for seed in (3, 3, 4)
    )
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.value == other.value and first.low < first.value < first.high and first.n == len(labels)


@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.960), (0.68, 0.994)])
def test_width_of_the_interval_of_a_mean(confidence: float, z: float) -> None:
    right = np.arange(900) % 2
    interval = bootstrap_interval(np.mean, [right], num_resamples=4000, confidence=confidence)
    standard_error = 0.5 / 30
    assert interval.high - 0.5 == pytest.approx(z * standard_error, rel=0.08)
    assert 0.5 - interval.low == pytest.approx(z * standard_error, rel=0.08)


def test_large_classes_are_drawn_apart_and_small_ones_together() -> None:
    labels = np.repeat([0, 1, 2], [80, 15, 1])
    # the last lesion holds a row of class 1 and the one of class 2
    groups = [f"lesion {row // 2}" for row in range(96)]
    seen = []

    def num_classes(rows: np.ndarray) -> float:
        seen.append(np.bincount(rows, minlength=3))
        return 0.0

    bootstrap_interval(num_classes, [labels], groups=groups, strata=labels, num_resamples=200)
    counts = np.array(seen[1:])
    assert len(counts) == 200 and (counts[:, 0] == 80).all() and (counts.sum(axis=1) == 96).all()
    assert set(counts[:, 2].tolist()) >= {0, 1, 2}


def test_a_rare_class_that_the_statistic_needs_is_in_every_resample() -> None:
    labels, scores = np.array([0] * 30 + [1]), np.random.default_rng(0).random((31, 2))
    for strata in (labels, None):  # kept, or drawn again until it is there
        found = bootstrap_interval(macro_auroc, [labels, scores], strata=strata, num_resamples=100)
        assert found.low < found.value < found.high


def test_no_interval_where_there_is_nothing_to_draw() -> None:
    """One patient: every resample would be the data itself."""
    labels, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    for strata in (labels, None):
        found = bootstrap_interval(balanced_accuracy, [labels, predicted], groups=["a"] * 3, strata=strata)
        assert found.value == 0.75 and np.isnan(found.low) and np.isnan(found.high)
        assert Metric.of(found).low is None


def test_groups_are_resampled_whole() -> None:
    groups = np.array([5, 5, 5, 8, None, None, 8], dtype=object)
    rows = np.arange(7)
    draws = []
    bootstrap_interval(lambda drawn: draws.append(np.bincount(drawn, minlength=7)) or 0.0, [rows], groups=groups)
    counts = np.array(draws[1:])
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 3] == counts[:, 6]).all()
    assert (counts[:, 4] != counts[:, 5]).any()  # rows without a known group go their own ways
    assert counts[:, [0, 3, 4, 5]].sum(axis=1).tolist() == [4] * 1000  # as many groups as there are
    assert counts.mean(axis=0) == pytest.approx(1, abs=0.12)


def test_coverage_with_and_without_groups() -> None:
    """40 lesions of 4 images that are right or wrong together, true accuracy 0.7: images alone pretend 160 trials."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 4)
    covered = {"groups": 0, "rows": 0}
    num_populations = 200
    for _ in range(num_populations):
        right = np.repeat(rng.random(40) < 0.7, 4)
        for name, given in (("groups", groups), ("rows", None)):
            interval = bootstrap_interval(np.mean, [right], groups=given, num_resamples=200)
            covered[name] += interval.low <= 0.7 <= interval.high
    assert 0.89 <= covered["groups"] / num_populations <= 0.99
    assert covered["rows"] / num_populations <= 0.78


@pytest.mark.parametrize("num_classes", [12, 100])
@pytest.mark.parametrize("metric", [accuracy, balanced_accuracy])
def test_coverage_where_patients_have_several_classes(num_classes: int, metric: Callable[..., float]) -> None:
    """Each patient has a set of classes of its own, most classes have few patients, and right answers go together
    within a patient."""
    rng = np.random.default_rng(3)
    num_covered = 0
    for _ in range(60):
        patients = np.repeat(np.arange(60), 4)
        labels = rng.integers(num_classes, size=240)
        is_right = rng.random(240) < rng.beta(2, 1, size=60)[patients]
        predicted = np.where(is_right, labels, (labels + 1) % num_classes)
        found = bootstrap_interval(metric, [labels, predicted], groups=patients, strata=labels, num_resamples=100)
        num_covered += found.low <= 2 / 3 <= found.high
    assert num_covered >= 48  # of 60


def test_undefined_statistic_is_not_hidden() -> None:
    one_class = bootstrap_interval(macro_auroc, [np.zeros(5, dtype=int), np.random.default_rng(0).random((5, 2))])
    assert math.isnan(one_class.value) and math.isnan(one_class.low) and one_class.n == 5
    labels = np.array([0] * 9 + [1])
    with pytest.raises(ValueError, match="100 resamples in turn leave the statistic undefined; pass strata"):
        bootstrap_interval(lambda rows: 0.0 if len(set(rows)) == 10 else math.nan, [np.arange(10)])
    with pytest.raises(ValueError, match="equally many rows"):
        bootstrap_interval(accuracy, [labels, labels[:5]])


def test_wilson_interval() -> None:
    # p = 0.5, n = 10: (0.5 + z^2/20 +- z sqrt(0.025 + z^2/400)) / (1 + z^2/10) with z = 1.959964
    half = proportion_interval(np.array([True, False] * 5))
    assert (half.low, half.high) == (pytest.approx(0.23659, abs=1e-5), pytest.approx(0.76341, abs=1e-5))
    # p = 1: n / (n + z^2) to 1
    four_of_four = proportion_interval(np.ones(4, dtype=bool))
    assert (
        four_of_four.low == pytest.approx(4 / (4 + 3.841459), abs=1e-6)
        and four_of_four.high == 1.0
        and four_of_four.n == 4
    )
    two_patients = proportion_interval(np.ones(4, dtype=bool), groups=["a", "a", "b", "b"])
    assert two_patients.low == pytest.approx(2 / (2 + 3.841459), abs=1e-6) and two_patients.n == 4
    assert math.isnan(proportion_interval(np.array([], dtype=bool)).value)


def test_group_codes_keep_rows_without_a_group_apart() -> None:
    assert group_codes(["b", None, "a", "b", None]).tolist() == [0, 1, 2, 0, 3]
