"""One metric by skin tone, sex, age band, site and source: n, value, interval, worst group, gap.

    by_group(rows, metric, statistic, arrays, settings) -> tuple[ByGroup, ...]

    rows       N rows that were evaluated, in the arrays' order
    metric     its name in the result
    statistic  statistic(*arrays) -> float, for any subset of the rows; NaN = undefined there
    arrays     each with N rows first
    settings   num_resamples, confidence, seed, min_group_size

Every task of the evaluation calls it in the same way. Shapes: N rows, R resamples, V values of one attribute.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.metrics.statistics import GroupSampler, group_codes
from pretrain.evaluation.results import ByGroup, Metric

#: In the order of the report. Attributes of other names follow, sorted.
ATTRIBUTES = ("fitzpatrick", "sex", "age_band", "body_site", "source")
_TITLES = {"fitzpatrick": "skin tone (Fitzpatrick type)", "age_band": "age"}
_UNKNOWN = frozenset({"", "unknown"})
_FITZPATRICK = ("I", "II", "III", "IV", "V", "VI")

#: A group's interval is undefined when the statistic is, on more than this share of the resamples.
_MAX_UNDEFINED = 0.05


def attribute_title(attribute: str) -> str:
    """As pages and cards name it."""
    return _TITLES.get(attribute, attribute.replace("_", " "))


def by_group(
    rows: Sequence[Row],
    metric: str,
    statistic: Callable[..., float],
    arrays: Sequence[NDArray[Any]],
    settings: EvaluationSettings,
    *,
    chance: float | None = None,
    is_share: bool = True,
    lower_is_better: bool = False,
) -> tuple[ByGroup, ...]:
    """`metric` over the groups of each attribute that any row has; () where no row has one.

    Whole patients are resampled, from all rows with a value: so a patient with lesions of two sites moves both groups,
    and their difference has the interval of a paired one. A class can be missing from a resample: a group has few
    images of most, and an interval that draws these every time is far too narrow. A resample in which a group is
    undefined is left out of its interval. There is no interval where that happens often, where a group is one patient,
    or where all resamples give one value: of a group without a single error they say nothing of its rate of errors.

    `gap` is the best minus the worst group (worst minus best where lower is better: never negative), among the groups
    of at least `min_group_size` rows. The two are chosen on all rows and then kept, so its interval can reach below 0;
    since they were chosen by their values, it says that some pair differs more readily than a pair fixed beforehand
    would.
    """
    kind = {"is_share": is_share, "lower_is_better": lower_is_better}
    given = (rows, metric, statistic, arrays, settings, chance, kind)
    return tuple(_by_attribute(name, value_N, *given) for name, value_N in values_of(rows).items())


def values_of(rows: Sequence[Row]) -> dict[str, NDArray[np.str_]]:
    """By attribute that any row has, in the order of the report: the value of each row, (N,); "" = not known."""
    names = {name for row in rows for name in row.attributes or () if _value(row, name) is not None}
    ordered = [*(name for name in ATTRIBUTES if name in names), *sorted(names.difference(ATTRIBUTES))]
    return {name: np.array([_value(row, name) or "" for row in rows]) for name in ordered}


def _by_attribute(
    attribute: str,
    value_N: NDArray[np.str_],
    rows: Sequence[Row],
    metric: str,
    statistic: Callable[..., float],
    arrays: Sequence[NDArray[Any]],
    settings: EvaluationSettings,
    chance: float | None,
    kind: dict[str, bool],
) -> ByGroup:
    known = np.flatnonzero(value_N != "")
    names = sorted(set(value_N[known].tolist()), key=lambda value: _place(attribute, value))
    value_K = np.array([names.index(value) for value in value_N[known].tolist()])  # K rows with a value
    arrays_K = [array[known] for array in arrays]
    patient_K = group_codes([rows[row].patient for row in known.tolist()])
    full_V = np.array([statistic(*(array[value_K == code] for array in arrays_K)) for code in range(len(names))])
    draws_RV = _resample(statistic, arrays_K, value_K, patient_K, len(names), settings)
    groups: dict[str, Metric] = {}
    for code, name in enumerate(names):
        own = value_K == code
        has_interval = len(set(patient_K[own])) > 1
        low, high = _interval(draws_RV[:, code], settings.confidence) if has_interval else (None, None)
        groups[name] = Metric(value=full_V[code], low=low, high=high, n=int(own.sum()), chance=chance, **kind)
    worst, gap = _gap(names, full_V, draws_RV, groups, settings, kind)
    return ByGroup(
        attribute=attribute,
        metric=metric,
        groups=groups,
        min_group_size=settings.min_group_size,
        num_unknown=len(rows) - len(known),
        worst=worst,
        gap=gap,
    )


def _resample(
    statistic: Callable[..., float],
    arrays_K: Sequence[NDArray[Any]],
    value_K: NDArray[np.int64],
    patient_K: NDArray[np.int64],
    num_values: int,
    settings: EvaluationSettings,
) -> NDArray[np.float64]:
    """The statistic of each group on each resample, (R, V); NaN where a group is not drawn or undefined."""
    sampler = GroupSampler(patient_K, np.zeros(len(patient_K), dtype=np.int64))
    rng = np.random.default_rng(settings.seed)
    draws_RV = np.full((settings.num_resamples, num_values), np.nan)
    for resample in range(settings.num_resamples):
        drawn = sampler.draw(rng)
        drawn = drawn[np.argsort(value_K[drawn], kind="stable")]  # so that each group is one slice
        ends = np.cumsum(np.bincount(value_K[drawn], minlength=num_values))
        for code, rows in enumerate(np.split(drawn, ends[:-1])):
            if len(rows):
                draws_RV[resample, code] = statistic(*(array[rows] for array in arrays_K))
    return draws_RV


def _gap(
    names: Sequence[str],
    full_V: NDArray[np.float64],
    draws_RV: NDArray[np.float64],
    groups: dict[str, Metric],
    settings: EvaluationSettings,
    kind: dict[str, bool],
) -> tuple[str | None, Metric | None]:
    """The worst group and the distance to the best one; None where fewer than two groups are large enough."""
    sizes = np.array([groups[name].n for name in names])
    eligible = np.flatnonzero((sizes >= settings.min_group_size) & ~np.isnan(full_V))
    if len(eligible) < 2:
        return None, None
    lowest, highest = eligible[full_V[eligible].argmin()], eligible[full_V[eligible].argmax()]
    worst = highest if kind["lower_is_better"] else lowest
    if any(groups[names[code]].low is None for code in (lowest, highest)):
        low, high = None, None
    else:
        low, high = _interval(draws_RV[:, highest] - draws_RV[:, lowest], settings.confidence)
    gap = Metric(
        value=full_V[highest] - full_V[lowest],
        low=low,
        high=high,
        n=int(sizes[lowest] + sizes[highest]),
        is_share=kind["is_share"],
        lower_is_better=True,
    )
    return names[worst], gap


def _interval(draws_R: NDArray[np.float64], confidence: float) -> tuple[float, float] | tuple[None, None]:
    undefined = np.isnan(draws_R)
    if undefined.mean() > _MAX_UNDEFINED or np.ptp(draws_R[~undefined]) == 0:
        return None, None
    low, high = np.quantile(draws_R[~undefined], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _value(row: Row, attribute: str) -> str | None:
    value = (row.attributes or {}).get(attribute)
    return None if value is None or value.strip().casefold() in _UNKNOWN else value


def _place(attribute: str, value: str) -> tuple[int, str]:
    """Sorts I ... VI, and age bands by their first number ("<10" before "10-19"); other values by name."""
    if attribute == "fitzpatrick" and value in _FITZPATRICK:
        return _FITZPATRICK.index(value), value
    number = re.search(r"\d+", value) if attribute == "age_band" else None
    if number is not None:
        return 2 * int(number.group()) - value.startswith("<"), value
    return 10**6, value
