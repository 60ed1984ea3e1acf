"""What the finished runs of the learning experiment say: each arm's metrics, and paired differences between arms.

A cell is a (fold, seed). Arms are compared on the cells that all of them have finished, so on the same held-out images
with the same first weights. The rows of all cells are pooled; an image stands in them once a seed, and a resample draws
lesions or patients with all their rows. So a metric is averaged over seeds, and its interval says how far it would move
with other lesions and patients. It does not cover the chance of training, so each seed's difference stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.metrics.statistics import Estimate, balanced_accuracy, bootstrap_interval

Cell = tuple[int, int]  # (fold, seed)
Results = Mapping[str, Mapping[Cell, Mapping[str, Any]]]  # arm -> cell -> what the run wrote


def read_results(directory: Path) -> dict[str, dict[Cell, dict[str, Any]]]:
    """Of all runs that are finished."""
    results: dict[str, dict[Cell, dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault(result["arm"], {})[result["fold"], result["seed"]] = result
    return results


def common_cells(results: Results, arms: Sequence[str]) -> list[Cell]:
    """Those that every one of the arms has finished."""
    cells = [set(results.get(arm, {})) for arm in arms]
    return sorted(set.intersection(*cells))


@dataclass(frozen=True)
class Rows:
    """One arm's held-out images over some cells; N rows, one an image and seed."""

    label_N: NDArray[np.int64]
    group_N: NDArray[np.str_]  # lesion or patient; folds share none
    seed_N: NDArray[np.int64]
    predicted_N: NDArray[np.int64]
    predicted_own_wording_N: NDArray[np.int64]
    image_hit_N: NDArray[np.float64]
    text_hit_N: NDArray[np.float64]
    text_weight_N: NDArray[np.float64]  # 1 / images of the caption: a caption is one query

    @classmethod
    def of(cls, runs: Mapping[Cell, Mapping[str, Any]], cells: Sequence[Cell]) -> Rows:
        def column(name: str) -> NDArray[Any]:
            return np.concatenate([np.asarray(runs[cell][name]) for cell in cells])

        sizes = [len(runs[cell]["label"]) for cell in cells]
        return cls(
            label_N=column("label"),
            group_N=np.concatenate([[f"{fold}:{g}" for g in runs[fold, seed]["group"]] for fold, seed in cells]),
            seed_N=np.repeat([seed for _, seed in cells], sizes),
            predicted_N=column("predicted"),
            predicted_own_wording_N=column("predicted_own_wording"),
            image_hit_N=column("image_hit"),
            text_hit_N=column("text_hit"),
            text_weight_N=1.0 / column("num_owners"),
        )


# ---------------------------------------------------------------------------------------------- metrics


def _mean_recall(image_hit: NDArray[Any], text_hit: NDArray[Any], text_weight: NDArray[Any]) -> float:
    """Both directions with half the weight, as `retrieval.retrieval_metrics` has it; folds pooled."""
    return float((image_hit.mean() + np.average(text_hit, weights=text_weight)) / 2)


#: name -> (statistic of some columns, those columns of an arm's rows)
METRICS: dict[str, tuple[Callable[..., float], Callable[[Rows], tuple[NDArray[Any], ...]]]] = {
    "zero_shot": (balanced_accuracy, lambda rows: (rows.label_N, rows.predicted_N)),
    "mean_recall": (_mean_recall, lambda rows: (rows.image_hit_N, rows.text_hit_N, rows.text_weight_N)),
    "zero_shot_own_wording": (balanced_accuracy, lambda rows: (rows.label_N, rows.predicted_own_wording_N)),
}


def estimate(rows: Rows, metric: str) -> Estimate:
    """The metric with its 95 % interval over lesions and patients."""
    statistic, columns = METRICS[metric]
    return bootstrap_interval(statistic, columns(rows), groups=rows.group_N, strata=rows.label_N)


@dataclass(frozen=True)
class Difference:
    """Of one arm to another, on the same images and first weights."""

    interval: Estimate
    by_seed: tuple[float, ...]

    @property
    def is_resolved(self) -> bool:
        """The interval leaves 0 out and every seed, of at least two, says the same."""
        same_sign = all(each > 0 for each in self.by_seed) or all(each < 0 for each in self.by_seed)
        return len(self.by_seed) > 1 and same_sign and (self.interval.low > 0 or self.interval.high < 0)


def difference(first: Rows, second: Rows, metric: str) -> Difference:
    """second - first, both on the same resampled lesions and patients.

    Raises ValueError where the two do not hold the same images in the same order.
    """
    if not (np.array_equal(first.group_N, second.group_N) and np.array_equal(first.label_N, second.label_N)):
        raise ValueError("the two arms were not evaluated on the same images")
    statistic, columns = METRICS[metric]
    num = len(columns(first))

    def subtract(*both: NDArray[Any]) -> float:
        return statistic(*both[num:]) - statistic(*both[:num])

    both = (*columns(first), *columns(second))
    by_seed = [subtract(*(column[first.seed_N == seed] for column in both)) for seed in np.unique(first.seed_N)]
    interval = bootstrap_interval(subtract, both, groups=first.group_N, strata=first.label_N)
    return Difference(interval, tuple(by_seed))


# ---------------------------------------------------------------------------------------------- table


def compare(results: Results, arms: Sequence[str], references: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Prints a table of `arms` on their common cells; returns its numbers.

    `references`: for each arm the arms it is compared with, which are arms of the table.
    """
    cells = common_cells(results, arms)
    if not cells:
        return {}
    rows = {arm: Rows.of(results[arm], cells) for arm in arms}
    seeds, folds = sorted({seed for _, seed in cells}), sorted({fold for fold, _ in cells})
    num_groups = len(set(rows[arms[0]].group_N.tolist()))
    print(f"\n{len(cells)} cells (folds {folds}, seeds {seeds}), {num_groups} lesions or patients")
    table: dict[str, Any] = {}
    for metric in METRICS:
        print(f"\n{metric:24} {'value':>7} {'95 % interval':16} differences (by seed; * = no 0 in it, seeds agree)")
        for arm in arms:
            value = estimate(rows[arm], metric)
            entry = table.setdefault(arm, {})[metric] = {"value": _rounded(value)}
            print(f"{arm:24} {value.value:7.4f} [{value.low:.4f}, {value.high:.4f}]", end="")
            for reference in references.get(arm, ()):
                found = difference(rows[reference], rows[arm], metric)
                entry[f"vs_{reference}"] = _rounded(found.interval)
                entry[f"vs_{reference}_by_seed"] = [round(each, 4) for each in found.by_seed]
                i, mark = found.interval, "*" if found.is_resolved else " "
                listed = ", ".join(f"{each:+.3f}" for each in found.by_seed)
                print(f"  vs {reference} {i.value:+.4f} [{i.low:+.4f}, {i.high:+.4f}]{mark} ({listed})", end="")
            print()
    return {"num_cells": len(cells), "folds": folds, "seeds": seeds, "arms": table}


def _rounded(value: Estimate) -> list[float]:
    return [round(value.value, 4), round(value.low, 4), round(value.high, 4)]
