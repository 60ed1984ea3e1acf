"""Do predicted probabilities mean what they say: calibration error, and the points of a reliability diagram.

Of the predicted class alone: its probability against whether it is right. Shapes: N rows, B bins.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.metrics.statistics import Bools, Floats, Groups, proportion_interval
from pretrain.evaluation.results import Curve

NUM_BINS = 15
Bins = Literal["equal_width", "equal_count"]


def calibration_error(probability: Floats, is_right: Bools, bins: Bins = "equal_width") -> float:
    """Mean distance between probability and share right over the bins, weighted by their rows; in [0, 1].

    With bins of equal width the ECE of Guo et al. (2017, equation 3), 15 bins, each open below and closed above. With
    bins of equal count the adaptive one (Nguyen & O'Connor, 2015): bounds are quantiles of the probabilities, and rows
    with equal probabilities are never parted.

    probability: (N,) of the predicted class. is_right: (N,).
    """
    bin_of = _bin_of(probability, bins)
    distance = np.bincount(bin_of, weights=np.subtract(is_right, probability, dtype=np.float64), minlength=NUM_BINS)
    return float(np.abs(distance).sum() / len(probability))


#: The same with bins of equal count.
adaptive_calibration_error = partial(calibration_error, bins="equal_count")


def reliability_curve(
    probability: Floats, is_right: Bools, groups: Groups | None = None, confidence: float = 0.95
) -> Curve:
    """x: mean probability of a bin of equal width; y: share right there, with Wilson's interval. Empty bins are left
    out."""
    bin_of = _bin_of(probability, "equal_width")
    points = []
    for number in np.unique(bin_of):
        rows = np.flatnonzero(bin_of == number)
        own_groups = None if groups is None else [groups[row] for row in rows.tolist()]
        share = proportion_interval(is_right[rows], own_groups, confidence)
        points.append((float(probability[rows].mean()), share.value, share.low, share.high))
    x, y, low, high = zip(*points, strict=True)
    return Curve(kind="reliability", name="predicted class", x=x, y=y, low=low, high=high)


def _bin_of(probability: Floats, bins: Bins) -> NDArray[np.int64]:
    """0 ... B - 1 for each row."""
    shares = np.linspace(0, 1, NUM_BINS + 1)
    bounds = shares if bins == "equal_width" else np.quantile(probability, shares)
    numbers: NDArray[np.int64] = np.searchsorted(bounds[1:-1], probability)
    return numbers
