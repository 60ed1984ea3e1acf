"""Are two models different, or several: paired tests on the same rows, and ranks over several sets.

Shapes: N rows, M models, S evaluation sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from pretrain.evaluation.metrics.statistics import Estimate, Groups, Ints, bootstrap_draws, group_codes

# a sum of the same numbers in another order differs in its last bits
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedDifference:
    """Second minus first. P-values are two-sided; NaN where the difference is undefined, `p_bootstrap` (and the
    interval) also where there is nothing to draw."""

    estimate: Estimate
    p_bootstrap: float
    p_permutation: float
    is_exact: bool  # all swaps were tried, not a random part
    num_groups: int


def paired_difference(
    statistic: Callable[..., float],
    first: NDArray[Any],
    second: NDArray[Any],
    shared: Sequence[NDArray[Any]] = (),
    *,
    groups: Groups | None = None,
    strata: Ints | None = None,
    num_resamples: int = 1000,
    num_permutations: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """statistic(*shared, second) - statistic(*shared, first), both on the same rows, with interval and p-values.

    The interval and `p_bootstrap` resample whole groups, for both models at once, as `bootstrap_interval` does:
    p is twice the share of resamples on the other side of 0 (Efron & Tibshirani, 1993, chapter 15, with one added to
    both counts, so that it is never 0). `p_permutation` swaps the two models' outputs on a random half of the groups:
    the share of such swaps with a difference at least as large, under "both models are exchangeable within a patient"
    (Good, 2005). All swaps are tried where the outputs differ on so few groups that there are no more than
    `num_permutations`; then p is exact.

    first, second: (N,) or (N, K) outputs in one unit: predicted classes, hits, ranks. Scores of two models have no
    common unit: give their ranks, which leave AUROC as it is (Venkatraman & Begg, 1996). groups, strata, errors: as
    for `bootstrap_interval`.
    """

    def difference(*arrays: NDArray[Any]) -> float:
        *common, mine, theirs = arrays
        return statistic(*common, theirs) - statistic(*common, mine)

    arrays = [*shared, first, second]
    codes = np.arange(len(first)) if groups is None else group_codes(groups)
    num_groups = int(codes.max()) + 1
    value = difference(*arrays)
    if np.isnan(value):
        nan = float("nan")
        return PairedDifference(Estimate(nan, nan, nan, len(first)), nan, nan, False, num_groups)
    draws = bootstrap_draws(difference, arrays, groups=groups, strata=strata, num_resamples=num_resamples, seed=seed)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    tail = min(np.sum(draws <= _ROUNDING), np.sum(draws >= -_ROUNDING))
    p_bootstrap = float("nan") if np.isnan(low) else min(1.0, 2 * (tail + 1) / (num_resamples + 1))
    differing = np.unique(codes[(first != second).reshape(len(first), -1).any(axis=1)])
    is_exact = len(differing) <= np.log2(num_permutations)
    num_extreme = num_swaps = 0
    for swapped in _swaps(differing, num_groups, None if is_exact else num_permutations, seed):
        swap = swapped[codes].reshape(-1, *[1] * (first.ndim - 1))
        drawn = difference(*shared, np.where(swap, second, first), np.where(swap, first, second))
        num_extreme += abs(drawn) >= abs(value) - _ROUNDING
        num_swaps += 1
    p_permutation = num_extreme / num_swaps if is_exact else (num_extreme + 1) / (num_swaps + 1)
    estimate = Estimate(value, float(low), float(high), len(first))
    return PairedDifference(estimate, float(p_bootstrap), float(p_permutation), bool(is_exact), num_groups)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that bound the chance of any false finding (Holm, 1979), in the order given."""
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values)[order]), 1)
    return adjusted.tolist()


@dataclass(frozen=True)
class RankTable:
    """Ranks from 1, the best; equal values share their mean rank."""

    ranks_MS: NDArray[np.float64]
    mean_rank_M: NDArray[np.float64]
    friedman_p: float  # NaN for two models, for one set, or where all ranks are equal
    critical_difference: float  # of mean ranks, Nemenyi
    not_different: tuple[tuple[int, ...], ...]  # largest runs of models within it, each from the best


def rank_models(values_MS: NDArray[np.float64], lower_is_better_S: Sequence[bool], alpha: float = 0.05) -> RankTable:
    """Ranks of M >= 2 models over S sets, as Demsar (2006) compares classifiers.

    Friedman's test asks whether any model differs (chi-squared form); mean ranks further apart than the critical
    difference q_alpha sqrt(M (M + 1) / (6 S)) differ (Nemenyi). Both take sets for independent.
    """
    num_models, num_sets = values_MS.shape
    signs = np.where(lower_is_better_S, 1.0, -1.0)
    ranks_MS = rankdata(signs * values_MS, axis=0)
    mean_rank_M = ranks_MS.mean(axis=1)
    friedman_p = float("nan")
    if num_models > 2 and num_sets > 1 and np.ptp(ranks_MS, axis=0).any():
        friedman_p = float(friedmanchisquare(*(signs * values_MS)).pvalue)
    quantile = studentized_range.ppf(1 - alpha, num_models, np.inf) / np.sqrt(2)
    critical = float(quantile * np.sqrt(num_models * (num_models + 1) / (6 * num_sets)))
    return RankTable(ranks_MS, mean_rank_M, friedman_p, critical, _runs_within(mean_rank_M, critical))


def _runs_within(mean_rank_M: NDArray[np.float64], critical: float) -> tuple[tuple[int, ...], ...]:
    order = np.argsort(mean_rank_M, kind="stable")
    in_order = mean_rank_M[order]
    ends = np.searchsorted(in_order, in_order + critical + _ROUNDING)
    runs = []
    last_end = 0
    for start, end in enumerate(ends.tolist()):
        if end > last_end and end - start > 1:  # not within an earlier one
            runs.append(tuple(order[start:end].tolist()))
        last_end = max(last_end, end)
    return tuple(runs)


def _swaps(
    differing: NDArray[np.int64], num_groups: int, num_random: int | None, seed: int
) -> Iterator[NDArray[np.bool_]]:
    """Which groups are swapped, (groups,); all ways for the groups that differ, or `num_random` ways."""
    if num_random is None:
        for chosen in product((False, True), repeat=len(differing)):
            swapped = np.zeros(num_groups, dtype=bool)
            swapped[differing] = chosen
            yield swapped
        return
    rng = np.random.default_rng(seed)
    for _ in range(num_random):
        yield rng.random(num_groups) < 0.5
