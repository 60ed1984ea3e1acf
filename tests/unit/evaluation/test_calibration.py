"""Calibration against scikit-learn's calibration curve and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from pretrain.evaluation.metrics.calibration import adaptive_calibration_error, calibration_error, reliability_curve
from pretrain.evaluation.metrics.statistics import bootstrap_interval


def predictions(seed: int, num_rows: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident: a probability p is right in p squared of the cases."""
    rng = np.random.default_rng(seed)
    probability = rng.uniform(0.2, 1, num_rows)
    return probability, rng.random(num_rows) < probability**2


def loop_over_equal_widths(probability: np.ndarray, is_right: np.ndarray) -> float:
    error = 0.0
    for number in range(15):
        inside = (probability > number / 15) & (probability <= (number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(is_right[inside].mean() - probability[inside].mean())
    return error


@pytest.mark.parametrize("seed", range(4))
def test_equal_widths_equal_a_loop(seed: int) -> None:
    probability, is_right = predictions(seed)
    assert calibration_error(probability, is_right) == pytest.approx(
        loop_over_equal_widths(probability, is_right), abs=1e-12
    )
    assert calibration_error(probability, is_right) > 0.05


def test_equal_counts_equal_scikit_learn() -> None:
    probability, is_right = predictions(0)  # 600 distinct probabilities: 40 in each bin, so its bins weigh the same
    right, mean = calibration_curve(is_right, probability, n_bins=15, strategy="quantile")
    expected = np.abs(right - mean).mean()
    assert len(right) == 15 and adaptive_calibration_error(probability, is_right) == pytest.approx(expected, abs=1e-12)


def test_equal_probabilities_are_one_bin() -> None:
    probability, is_right = np.full(20, 0.6), np.arange(20) < 10
    shuffled = np.random.default_rng(0).permutation(is_right)
    for error in (calibration_error, adaptive_calibration_error):
        assert error(probability, is_right) == pytest.approx(0.1)
        assert error(probability, shuffled) == pytest.approx(0.1)
    assert calibration_error(np.ones(5), np.ones(5, dtype=bool)) == 0
    assert calibration_error(np.ones(4), np.zeros(4, dtype=bool)) == 1


def test_reliability_points_equal_scikit_learn() -> None:
    probability, is_right = predictions(1)
    right, mean = calibration_curve(is_right, probability, n_bins=15, strategy="uniform")
    curve = reliability_curve(probability, is_right)
    assert curve.kind == "reliability"
    np.testing.assert_allclose(curve.x, mean, atol=1e-12)
    np.testing.assert_allclose(curve.y, right, atol=1e-12)
    assert all(low < y < high for low, y, high in zip(curve.low, curve.y, curve.high, strict=True) if 0 < y < 1)
    twice = reliability_curve(np.repeat(probability, 2), np.repeat(is_right, 2), groups=np.arange(1200) // 2)
    np.testing.assert_allclose([twice.low, twice.high], [curve.low, curve.high], atol=1e-12)  # 600 patients, not 1,200


def test_resampling_inflates_the_error_and_centring_takes_it_back() -> None:
    """Of a calibrated model: every resample adds noise, which a plain percentile interval takes for error."""
    rng = np.random.default_rng(0)
    contains = {False: 0, True: 0}
    for _ in range(40):
        probability = rng.uniform(0.2, 1, 200)
        is_right = rng.random(200) < probability
        for centred in contains:
            interval = bootstrap_interval(
                calibration_error, [probability, is_right], num_resamples=100, centred=centred
            )
            contains[centred] += interval.low <= interval.value <= interval.high
    assert contains[True] == 40 and contains[False] < 35
