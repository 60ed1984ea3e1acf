"""Two ways of doing the same, timed by turns, so that a machine that others use does not favour one of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable


def by_turns(first: Callable[[], float], second: Callable[[], float], num_rounds: int) -> list[tuple[float, float]]:
    """What both return (a rate, a duration), one pair a round; who begins changes from round to round."""
    pairs: list[tuple[float, float]] = []
    for number in range(num_rounds):
        if number % 2 == 0:
            a = first()
            b = second()
        else:
            b = second()
            a = first()
        pairs.append((a, b))
    return pairs


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Median over the rounds of second / first."""
    return statistics.median(b / a for a, b in pairs)
