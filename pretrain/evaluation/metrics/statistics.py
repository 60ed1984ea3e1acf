"""Metrics of classification, and intervals by resampling whole patients or lesions.

The metrics are ours and not scikit-learn's because an interval computes each a thousand times: without its checks of
the input they take a fortieth of the time, AUROC an eightieth (16,000 images, 114 classes), and tests compare them.

Shapes: N rows (images or queries), C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
#: Patient or lesion of each row; None = nothing known, so the row is a group of its own.
Groups = Sequence[Hashable | None] | NDArray[Any]
_FEW_GROUPS = 10  # a stratum of k groups shows (k - 1) / k of its variance
_MAX_DRAWS = 100  # in turn, until the statistic is defined


@dataclass(frozen=True)
class Estimate:
    """A metric with its confidence interval; `n` is the number of rows it was computed from. NaN = undefined."""

    value: float
    low: float
    high: float
    n: int


# ---------------------------------------------------------------------------------------------- metrics


def accuracy(labels: Ints, predicted: Ints) -> float:
    """Share of rows predicted right. `labels`, `predicted`: (N,) integers."""
    return float(np.mean(labels == predicted))


def balanced_accuracy(labels: Ints, predicted: Ints) -> float:
    """Mean recall over the classes present in `labels`. `labels`, `predicted`: (N,) non-negative integers."""
    num_rows = np.bincount(labels)
    num_right = np.bincount(labels, weights=labels == predicted, minlength=len(num_rows))
    present = num_rows > 0
    return float(np.mean(num_right[present] / num_rows[present]))


def weighted_f1(labels: Ints, predicted: Ints) -> float:
    """F1 of each class, averaged with the class's share of `labels` as weight. (N,) non-negative integers.

    F1 is 2 TP / (rows of the class + predictions of the class); a class absent from `labels` has no weight.
    """
    num_classes = int(max(labels.max(), predicted.max())) + 1
    num_rows = np.bincount(labels, minlength=num_classes)
    num_right = np.bincount(labels, weights=labels == predicted, minlength=num_classes)
    num_named = num_rows + np.bincount(predicted, minlength=num_classes)
    f1 = 2 * num_right / np.maximum(num_named, 1)
    return float(np.sum(f1 * num_rows) / len(labels))


def macro_auroc(labels: Ints, scores: Floats) -> float:
    """Mean over classes of the area under the ROC curve, each class against the rest.

    The Mann-Whitney form: the share of (row of the class, other row) pairs that column c puts in the right order, a
    tie counting one half. Classes that every row or no row has are skipped; NaN when none is left.

    labels: (N,) integers in [0, C). scores: (N, C), larger = more likely.
    """
    return prepare_auroc(labels, scores)(np.arange(len(labels)))


def prepare_auroc(labels: Ints, scores: Floats) -> Callable[[Ints], float]:
    """`macro_auroc` of rows drawn with repetition, as a function of their indices.

    Scores are sorted once here and not in every draw. Arguments as for `macro_auroc`.
    """
    num_rows = len(labels)
    classes = []
    for code in np.unique(labels):
        own = np.flatnonzero(labels == code)
        order = np.argsort(scores[:, code])
        in_order = scores[order, code]
        # the rows that tie with an own row lie in [start, end)
        start, end = (np.searchsorted(in_order, scores[own, code], side) for side in ("left", "right"))
        classes.append((own, order, start, end))

    def auroc(drawn: Ints) -> float:
        times = np.bincount(drawn, minlength=num_rows)  # integers: exact in any order
        areas = []
        for own, order, start, end in classes:
            num_positive = int(times[own].sum())
            num_pairs = num_positive * (len(drawn) - num_positive)
            if num_pairs:
                num_below = np.concatenate([[0], np.cumsum(times[order])])
                # pairs within the class are counted as well: one half of all of them is in order
                twice_ordered = int(times[own] @ (num_below[start] + num_below[end])) - num_positive**2
                areas.append(twice_ordered / (2 * num_pairs))
        return float(np.mean(areas)) if areas else float("nan")

    return auroc


# ---------------------------------------------------------------------------------------------- intervals


def bootstrap_interval(
    statistic: Callable[..., float],
    arrays: Sequence[NDArray[Any]],
    *,
    groups: Groups | None = None,
    strata: Ints | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    centred: bool = False,
) -> Estimate:
    """Percentile bootstrap of `statistic(*arrays)`, resampling whole groups within strata (Efron & Tibshirani, 1993).

    Each resample draws as many groups as there are, with replacement, and takes all rows of each. Groups are drawn
    within their stratum, those of small strata together (`GroupSampler`). A resample that leaves the statistic
    undefined, for want of a class, is drawn again. Where there is one group there is nothing to draw, and no interval;
    where every row is right (or wrong) it has no width. Equal arguments give equal intervals.

    arrays: each with N rows first. groups: (N,), None = every row its own. strata: (N,) integers, usually the class.
    centred: move the draws onto the value by the mean of their difference. For a statistic that resampling itself makes
    larger, such as a calibration error: it is 0 or more, and every doubled row adds to it.
    An undefined (NaN) statistic gives an undefined interval. Raises ValueError when the arrays are empty or differ in
    length, or when the statistic is undefined on a resample (pass `strata`).
    """
    _check_lengths(arrays, groups, strata)
    value = float(statistic(*arrays))
    if np.isnan(value):
        return Estimate(value, value, value, len(arrays[0]))
    draws = bootstrap_draws(statistic, arrays, groups=groups, strata=strata, num_resamples=num_resamples, seed=seed)
    if centred:
        draws += value - draws.mean()
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), len(arrays[0]))


def bootstrap_draws(
    statistic: Callable[..., float],
    arrays: Sequence[NDArray[Any]],
    *,
    groups: Groups | None = None,
    strata: Ints | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The statistic of each resample, (num_resamples,); NaN where there is nothing to draw. Arguments and errors as for
    `bootstrap_interval`."""
    num_rows = len(arrays[0])
    _check_lengths(arrays, groups, strata)
    codes = np.arange(num_rows) if groups is None else group_codes(groups)
    sampler = GroupSampler(codes, np.zeros(num_rows, dtype=np.int64) if strata is None else strata)
    if not sampler.has_choice:
        return np.full(num_resamples, np.nan)
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for resample in range(num_resamples):
        for _ in range(_MAX_DRAWS):
            rows = sampler.draw(rng)
            draws[resample] = statistic(*(array[rows] for array in arrays))
            if not np.isnan(draws[resample]):
                break
        else:
            raise ValueError(f"{_MAX_DRAWS} resamples in turn leave the statistic undefined; pass strata")
    return draws


def proportion_interval(is_right: Bools, groups: Groups | None = None, confidence: float = 0.95) -> Estimate:
    """Share of True with Wilson's score interval (Wilson, 1927), for the small counts where a bootstrap collapses.

    Rows of one group are not independent: the number of trials is that of equally large groups which weigh as much
    (Kish, 1965: N^2 / sum of squared sizes), as if a group's rows agreed. is_right: (N,); N = 0 gives NaN.
    """
    num_rows = len(is_right)
    if num_rows == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    share = float(np.mean(is_right))
    sizes = np.ones(num_rows) if groups is None else np.bincount(group_codes(groups))
    num_trials = float(sizes.sum() ** 2 / (sizes**2).sum())
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z**2 / (2 * num_trials)) / (1 + z**2 / num_trials)
    half = z / (1 + z**2 / num_trials) * np.sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2))
    # at 0 and 1 a bound equals the share; rounding must not put it on the other side
    return Estimate(share, float(min(centre - half, share)), float(max(centre + half, share)), num_rows)


def group_codes(groups: Groups) -> NDArray[np.int64]:
    """Number the groups 0, 1, ... in order of appearance; each None gets a number of its own."""
    code_of: dict[Hashable, int] = {}
    codes = np.empty(len(groups), dtype=np.int64)
    for row, group in enumerate(groups):
        codes[row] = code_of.setdefault(("ungrouped", row) if group is None else ("group", group), len(code_of))
    return codes


def _check_lengths(arrays: Sequence[NDArray[Any]], groups: Groups | None, strata: Ints | None) -> None:
    lengths = [len(rows) for rows in (*arrays, groups, strata) if rows is not None]
    if not lengths[0] or len(set(lengths)) > 1:
        raise ValueError(f"arrays, groups and strata must have equally many rows, at least 1: {lengths}")


class GroupSampler:
    """Row indices of random resamples of whole groups within strata. The tables are made once, so that a draw is a few
    numpy calls.

    A group that holds rows of several strata is drawn for the rarest of them, the one that fewest groups hold. Strata
    of fewer than _FEW_GROUPS groups are drawn as one, so that one of them can be missed: each kept apart, they would be
    in every resample with nearly the same groups, and a hundred rare classes would leave an interval without width.
    """

    def __init__(self, codes: NDArray[np.int64], strata: Ints) -> None:
        _, stratum_N = np.unique(strata, return_inverse=True)
        num_strata = int(stratum_N.max()) + 1
        group_H, stratum_H = np.divmod(np.unique(codes * num_strata + stratum_N.ravel()), num_strata)  # who holds what
        order = np.lexsort((np.bincount(stratum_H)[stratum_H], group_H))
        _, first = np.unique(group_H[order], return_index=True)
        drawn_for = stratum_H[order][first]  # (groups,)
        is_small = np.bincount(drawn_for, minlength=num_strata) < _FEW_GROUPS
        drawn_for = np.where(is_small[drawn_for], num_strata, drawn_for)
        self.group_order = np.argsort(drawn_for, kind="stable")  # groups, those of one stratum side by side
        stratum_sizes = np.bincount(drawn_for)
        stratum_sizes = stratum_sizes[stratum_sizes > 0]
        self.has_choice = bool(stratum_sizes.max() > 1)
        self.stratum_size = np.repeat(stratum_sizes, stratum_sizes)
        self.stratum_start = np.repeat(np.cumsum(stratum_sizes) - stratum_sizes, stratum_sizes)
        self.row_order = np.argsort(codes, kind="stable")  # rows, those of one group side by side
        self.group_size = np.bincount(codes)
        self.group_start = np.cumsum(self.group_size) - self.group_size

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        drawn = self.group_order[self.stratum_start + rng.integers(self.stratum_size)]
        sizes = self.group_size[drawn]
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        rows: NDArray[np.int64] = self.row_order[np.repeat(self.group_start[drawn], sizes) + within]
        return rows


# ---------------------------------------------------------------------------------------------- checks of input


def check_features(features: Floats, name: str) -> None:
    """Raise InputError unless `features` is (rows >= 1, width), finite, and of unit rows (to 2 %, for bfloat16)."""
    if features.ndim != 2 or len(features) == 0:
        raise InputError(f"{name}: expected (rows, width) with at least one row, got shape {features.shape}")
    norms = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))  # without a copy in float64
    for is_bad, problem in (
        (~np.isfinite(norms), "are not finite; did training diverge?"),
        (np.abs(norms - 1) > 0.02, "are not unit vectors; normalise them first"),
    ):
        if is_bad.any():
            raise InputError(f"{name}: {is_bad.sum()} rows (first: {is_bad.argmax()}) {problem}")


def check_indices(indices: Ints, name: str, num_rows: int, num_items: int, remedy: str) -> NDArray[np.int64]:
    """`indices` as (num_rows,) int64 in [0, num_items), or InputError naming the first row that is not."""
    indices = np.asarray(indices)
    if indices.shape != (num_rows,) or not np.issubdtype(indices.dtype, np.integer):
        raise InputError(f"{name}: expected {num_rows} integers, got shape {indices.shape} of {indices.dtype}")
    outside = (indices < 0) | (indices >= num_items)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(
            f"{name}: row {row} has {indices[row]}, outside 0 ... {num_items - 1} ({outside.sum()} such rows); {remedy}"
        )
    return indices.astype(np.int64)
