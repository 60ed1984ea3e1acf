"""Ways of doing the same, timed by turns, so that a machine that others use does not favour one of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np


def in_turns(sides: Sequence[Callable[[int], float]], num_rounds: int) -> list[tuple[float, ...]]:
    """What the sides return for a round's number (a rate, a duration), a row a round; who begins changes each round."""
    rows: list[tuple[float, ...]] = []
    for number in range(num_rounds):
        order = [(number + turn) % len(sides) for turn in range(len(sides))]
        results = {side: sides[side](number) for side in order}
        rows.append(tuple(results[side] for side in range(len(sides))))
    return rows


def by_turns(first: Callable[[], float], second: Callable[[], float], num_rounds: int) -> list[tuple[float, float]]:
    """`in_turns` of two that do not ask for the round."""
    return [(a, b) for a, b in in_turns((lambda _: first(), lambda _: second()), num_rounds)]


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Median over the rounds of second / first."""
    return statistics.median(b / a for a, b in pairs)


def bootstrap_interval(
    values: Sequence[float], num_resamples: int = 10_000, coverage: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the median of values by the bootstrap over them (rounds)."""
    draws = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    medians = np.median(np.asarray(values)[draws], axis=1)
    low, high = np.quantile(medians, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
