"""The page of a run: what the demo writes after it has trained and evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.reports.charts import confusion_view, themed
from pretrain.evaluation.reports.page import Interval, Table, TableRow, write_page
from pretrain.evaluation.results import Confusion
from pretrain.train.curves import LossSeries, loss_figure, thin

_NUMBERS = "the data block of this page"


@dataclass(frozen=True)
class MetricRow:
    """One line of the before/after table. `chance` is what guessing gives; None where there is no such constant."""

    name: str
    after: Interval
    before: Interval | None = None
    chance: float | None = None
    is_share: bool = True  # in [0, 1], three decimals and a plot; otherwise a quantity such as a median rank


@dataclass(frozen=True)
class GalleryCaption:
    aspect: str
    text: str
    weight: float | None = None  # in [0, 1]; None = this text has no weight


@dataclass(frozen=True)
class GalleryItem:
    """One image with its texts. `predictions`: (class name, probability), the most probable first."""

    jpeg: bytes
    diagnosis: str | None
    captions: tuple[GalleryCaption, ...] = ()
    predictions: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. Parts left empty have no section."""

    title: str
    subtitle: str = ""  # what a reader must not miss, such as that the images are synthetic
    facts: Mapping[str, str] = field(default_factory=dict)  # dataset, samples, model, parameters, engine, ...
    stages_s: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds
    metrics: tuple[MetricRow, ...] = ()
    losses: LossSeries = field(default_factory=dict)
    per_class_recall: Mapping[str, Interval] = field(default_factory=dict)
    confusion: NDArray[np.int64] | None = None  # (C, C), row = true class
    classnames: tuple[str, ...] = ()  # of the confusion matrix
    gallery: tuple[GalleryItem, ...] = ()
    limits: tuple[str, ...] = ()  # plain sentences
    confidence: float = 0.95  # of all the intervals


def write_report(path: Path, report: ReportData) -> None:
    """Write `report` as one self-contained HTML file; an existing file is replaced whole. Equal data, equal bytes."""
    if report.confusion is not None and report.confusion.shape != (len(report.classnames),) * 2:
        raise ValueError(f"confusion is {report.confusion.shape}, but there are {len(report.classnames)} classnames")
    has_before = any(row.before is not None for row in report.metrics)
    write_page(
        path,
        "run.html",
        title=report.title,
        report=report,
        facts={**report.facts, **{name: f"{seconds:.1f} s" for name, seconds in report.stages_s.items()}},
        metrics=_metrics_table(report, has_before),
        per_class=_per_class_table(report),
        numbers=report_numbers(report),
        charts={name: themed(loss_figure, {name: series}) for name, series in report.losses.items()},
        confusion=_confusion(report),
        num_not_finite={name: int((~_finite(series)).sum()) for name, series in report.losses.items()},
        has_before=has_before,
    )


def report_numbers(report: ReportData) -> dict[str, Any]:
    """The page's numbers as JSON values, for programs; NaN and infinity become None.

    Losses are as drawn: long series as means of runs of steps. This is what the page embeds as `script#numbers`.
    """

    def estimate(given: Interval | None) -> dict[str, float | int | None] | None:
        if given is None:
            return None
        bounds = {"value": given.value, "low": given.low, "high": given.high}
        return {**{name: _json_number(value) for name, value in bounds.items()}, "n": given.n}

    return {
        "title": report.title,
        "facts": dict(report.facts),
        "stages_s": dict(report.stages_s),
        "metrics": {
            row.name: {"before": estimate(row.before), "after": estimate(row.after), "chance": row.chance}
            for row in report.metrics
        },
        "losses": {
            name: [[float(step), _json_number(value)] for step, value in zip(*thin(series), strict=True)]
            for name, series in report.losses.items()
        },
        "per_class_recall": {name: estimate(recall) for name, recall in report.per_class_recall.items()},
        "classnames": list(report.classnames),
        "confusion": None if report.confusion is None else report.confusion.tolist(),
        "limits": list(report.limits),
    }


def _metrics_table(report: ReportData, has_before: bool) -> Table:
    columns = ("Before", "After") if has_before else ("Value",)
    rows = tuple(
        TableRow(row.name, (row.before, row.after) if has_before else (row.after,), row.chance, row.is_share)
        for row in report.metrics
    )
    return Table("metrics", "Metric", columns, rows, accented=len(columns) - 1, more_in=_NUMBERS)


def _per_class_table(report: ReportData) -> Table:
    rows = tuple(TableRow(name, (recall,)) for name, recall in report.per_class_recall.items())
    return Table("recall of each class", "Class", ("Recall",), rows, counted="Images", more_in=_NUMBERS)


def _confusion(report: ReportData) -> dict[str, Any] | None:
    if report.confusion is None:
        return None
    counts = tuple(tuple(row) for row in report.confusion.tolist())
    return confusion_view(Confusion(classnames=report.classnames, counts=counts), _NUMBERS)


def _json_number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _finite(series: Sequence[tuple[int, float]]) -> NDArray[np.bool_]:
    return np.isfinite(np.array([value for _, value in series], dtype=np.float64))
