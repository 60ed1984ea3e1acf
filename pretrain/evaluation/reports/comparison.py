"""The page of several models: values with the best marked, ranks, differences with p-values, curves side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.evaluation.comparison.compare import Comparison, Difference, Entry, PValues, Ranks
from pretrain.evaluation.reports.charts import critical_difference_figure, curves_figure, themed
from pretrain.evaluation.reports.page import NO_INTERVAL, Table, TableRow, lacks_interval, listed, squeezed, write_page
from pretrain.evaluation.results import TASK_TITLES, Curve, Metric, TaskResult

MAX_CHARTS = 24
_MAX_LISTED = 60  # rows of leakage


@dataclass(frozen=True)
class Cell:
    """One model on one set; `metric` None where it was not evaluated."""

    metric: Metric | None
    name: str  # of the metric
    is_best: bool  # by `metric`
    without: Metric | None  # of the images that the model was not trained on; None where it was on none, or not known


@dataclass(frozen=True)
class TaskComparison:
    task: str
    title: str
    datasets: tuple[str, ...]
    metric_names: dict[str, str]  # set -> metric
    cells: dict[str, tuple[Cell, ...]]  # model -> a cell a set
    scale: tuple[float, float]  # of the cells' plots
    ranks: Ranks | None
    ranks_chart: dict[str, Any] | None
    runs: tuple[str, ...]  # models that do not differ, as text
    differences: Table | None
    has_without: bool  # some cell has a value without the overlap
    about_intervals: str  # why a value has none; empty where each has one


def write_comparison(path: Path, comparison: Comparison) -> Path:
    """Write `comparison` as one self-contained page; returns its path. Equal data give equal bytes."""
    tasks = [name for name in TASK_TITLES if any(entry.result.task(name) for entry in comparison.entries)]
    num_models, num_sets = len(comparison.models), len(comparison.datasets)
    return write_page(
        path,
        "comparison.html",
        title=f"{num_models} models on {num_sets} data set{'s' if num_sets > 1 else ''}",
        comparison=comparison,
        tasks=[_task_comparison(comparison, task) for task in tasks],
        charts=_efficiency_charts(comparison)[:MAX_CHARTS],
        leakage=_leakage(comparison),
    )


# ---------------------------------------------------------------------------------------------- a task


def _task_comparison(comparison: Comparison, task: str) -> TaskComparison:
    ranks = next((ranks for ranks in comparison.ranks if ranks.task == task), None)
    datasets = tuple(data.name for data in comparison.datasets if _of_set(comparison, task, data.name))
    columns = {name: _column(comparison, task, name, ranks) for name in datasets}
    cells = {model.label: tuple(columns[name][model.label] for name in datasets) for model in comparison.models}
    metrics = [metric for row in cells.values() for cell in row for metric in (cell.metric, cell.without) if metric]
    has_chart = ranks is not None and ranks.critical_difference is not None and len(ranks.mean_rank) > 2
    return TaskComparison(
        task=task,
        title=TASK_TITLES[task],
        datasets=datasets,
        metric_names={name: next(iter(columns[name].values())).name for name in datasets},
        cells=cells,
        scale=_scale(metrics),
        ranks=ranks,
        ranks_chart=themed(critical_difference_figure, ranks) if has_chart else None,
        runs=tuple(listed(run) for run in ranks.not_different if len(run) > 1) if ranks is not None else (),
        differences=_differences(comparison, task),
        has_without=any(cell.without for row in cells.values() for cell in row),
        about_intervals=NO_INTERVAL if any(map(lacks_interval, metrics)) else "",
    )


def _of_set(comparison: Comparison, task: str, dataset: str) -> list[tuple[Entry, TaskResult]]:
    found = ((entry, entry.result.task(task)) for entry in comparison.entries if entry.dataset == dataset)
    return [(entry, result) for entry, result in found if result is not None]


def _column(comparison: Comparison, task: str, dataset: str, ranks: Ranks | None) -> dict[str, Cell]:
    """A cell a model. All are of one metric: that of the ranks, or the first model's primary one."""
    results = {entry.model: result for entry, result in _of_set(comparison, task, dataset)}
    primary = next(iter(results.values())).primary
    name = ranks.metrics.get(dataset, primary) if ranks is not None else primary
    metrics = {model: result.metrics.get(name) for model, result in results.items()}
    values = {model: metric.value for model, metric in metrics.items() if metric and metric.value is not None}
    lower = any(metric.lower_is_better for metric in metrics.values() if metric)
    best = (min if lower else max)(values.values()) if len(values) > 1 else None
    without = {model: result.without_overlap.get(name) for model, result in results.items()}
    return {
        label: Cell(metrics.get(label), name, best is not None and values.get(label) == best, without.get(label))
        for label in (model.label for model in comparison.models)
    }


def _scale(metrics: list[Metric]) -> tuple[float, float]:
    """The tenths that hold all intervals of shares."""
    ends = [end for metric in metrics if metric.is_share for end in (metric.low, metric.high, metric.value)]
    known = [end for end in ends if end is not None]
    if not known:
        return 0.0, 1.0
    low, high = math.floor(min(known) * 10 + 1e-9) / 10, math.ceil(max(known) * 10 - 1e-9) / 10
    return (low, high) if high > low else (low, low + 0.1)


def _differences(comparison: Comparison, task: str) -> Table | None:
    given = [difference for difference in comparison.differences if difference.task == task]
    if not given:
        return None
    values = [value for each in given for value in (each.value, each.without_overlap) if value is not None]
    shares = [value for value in values if value.is_share]
    ends = [abs(end) for value in shares for end in (value.low, value.high, value.value) if end is not None]
    widest = math.ceil(max([0.05, *ends]) * 20 - 1e-9) / 20
    return Table(
        label=f"{TASK_TITLES[task]}: differences",
        first="Difference",
        columns=("Value",),
        rows=tuple(row for each in given for row in _difference_rows(each, comparison.confidence)),
        text_columns=("p, bootstrap", "p, permutation", "p, Holm"),
        counted="Rows",
        scale=(-widest, widest),
        reference=0.0,
        is_signed=True,
        more_in="the comparison's JSON",
        stacks=True,
    )


def _difference_rows(given: Difference, confidence: float) -> list[TableRow]:
    """One of all rows, and one of those that neither model was trained on, where there is such a difference."""
    name = f"{given.second} minus {given.first}: {given.metric}, {given.dataset}"
    rows = [_difference_row(name, given, given.value, given.p, confidence)]
    if given.without_overlap is not None and given.p_without_overlap is not None:
        name += ", without overlap"
        rows.append(_difference_row(name, given, given.without_overlap, given.p_without_overlap, confidence))
    return rows


def _difference_row(name: str, given: Difference, value: Metric, p: PValues, confidence: float) -> TableRow:
    better = given.model_copy(update={"value": value}).better
    is_sure = p.holm is not None and p.holm < 1 - confidence
    return TableRow(
        name=name,
        estimates=(value,),
        is_share=value.is_share,
        mark=f"{squeezed(better, 40)} better" if is_sure and better else "",
        texts=(_p_text(p.bootstrap), _p_text(p.permutation), _p_text(p.holm)),
    )


def _p_text(p: float | None) -> str:
    if p is None:
        return "undefined"
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}"


# ---------------------------------------------------------------------------------------------- curves, leakage


def _efficiency_charts(comparison: Comparison) -> list[tuple[str, dict[str, Any]]]:
    """A chart for each set and curve, with all models that have it."""
    charts = []
    for data in comparison.datasets:
        by_name: dict[str, dict[str, Curve]] = {}
        for entry in comparison.entries:
            probe = entry.result.task("probe") if entry.dataset == data.name else None
            for curve in probe.curves if probe else ():
                if curve.kind == "efficiency" and curve.x:
                    by_name.setdefault(curve.name, {})[entry.model] = curve
        for name, curves in by_name.items():
            chart = themed(curves_figure, list(curves.values()), list(curves))
            charts.append((f"{data.name}: {name}", chart))
    return charts


def _leakage(comparison: Comparison) -> list[str]:
    """A sentence for each model and set where training data hold images of the set, or were not compared."""
    sentences = []
    for entry in comparison.entries:
        leakage = entry.result.leakage
        where = f"{entry.model} on {entry.dataset}"
        if leakage is None:
            sentences.append(f"{where}: not compared with its training data.")
        elif leakage.num_overlap:
            sentences.append(
                f"{where}: {leakage.num_overlap:,} of {leakage.num_compared:,} images are in its training data; "
                f"{_shown_without(entry)}."
            )
    more = len(sentences) - _MAX_LISTED
    return sentences[:_MAX_LISTED] + ([f"{more} more are in the evaluations' own pages."] if more > 0 else [])


def _shown_without(entry: Entry) -> str:
    tasks = entry.result.tasks
    has_none = [TASK_TITLES[task.task] for task in tasks if task.primary not in task.without_overlap]
    if len(has_none) == len(tasks):
        return "the values here include them"
    rest = f"; of {listed(has_none)} there is none" if has_none else ""
    return f"the value without them stands below the one with them{rest}"
