"""The page of one evaluation: one model on one data set, from its evaluation.json.

The page's size has a bound: tables hold MAX_TABLE_ROWS rows, curves MAX_POINTS points, a task MAX_CHARTS charts of a
kind, texts MAX_TEXT_LENGTH characters, and pictures their own limits (`extras.py`). What is left out is said on
the page, and is in evaluation.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from pretrain.evaluation.metrics.groups import attribute_title
from pretrain.evaluation.reports.charts import confusion_view, curves_figure, is_shots, themed
from pretrain.evaluation.reports.extras import ReportExtras
from pretrain.evaluation.reports.page import NO_INTERVAL, Table, TableRow, lacks_interval, shortened, write_page
from pretrain.evaluation.results import (
    RESULT_NAME,
    TASK_TITLES,
    ByGroup,
    Curve,
    EvaluationResult,
    Leakage,
    Metric,
    TaskResult,
    read_result,
)

REPORT_NAME = "report.html"
MAX_CHARTS = 12  # of one kind in one task
MAX_CURVES = 6  # in one chart: as many colours, dashes and markers can be told apart

#: task -> what `per_class` holds, and what its rows are
_PER_CLASS = {
    "concepts": ("AUROC of each concept", "Concept"),
    "multiple_choice": ("Accuracy by kind of question", "Kind"),
}
CURVE_TITLES = {
    "roc": "ROC",
    "reliability": "Reliability",
    "efficiency": "Data efficiency",
    "cumulative_match": "Cumulative match",
}


@dataclass(frozen=True)
class Charts:
    """Curves of one kind."""

    title: str
    shown: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]  # the curves' names, the chart
    num_more: int  # curves without a chart


@dataclass(frozen=True)
class GroupView:
    """One metric by one attribute."""

    title: str
    sentences: tuple[str, ...]
    table: Table
    is_open: bool  # skin tone; the others fold away


@dataclass(frozen=True)
class TaskView:
    """A task's result as tables and charts."""

    result: TaskResult
    title: str
    metrics: Table
    gaps: Table  # of all the groups below
    groups: tuple[GroupView, ...]
    per_class: Table | None
    per_class_title: str
    confusion: dict[str, Any] | None
    charts: tuple[Charts, ...]
    settings: dict[str, str]
    about_intervals: str  # why a value has none; empty where each has one


def write_evaluation_report(folder: Path, extras: ReportExtras | None = None) -> Path:
    """Read `folder`/evaluation.json and write `folder`/report.html, one self-contained page; returns its path.

    `extras`: neighbours and retrieved captions as pictures; None or empty parts have no section. Equal data give equal
    bytes. Raises InputError for a file that is no evaluation, or whose parts do not fit each other.
    """
    result = read_result(folder)
    return write_page(
        folder / REPORT_NAME,
        "evaluation.html",
        title=f"{result.model.name} on {result.dataset.name}",
        result=result,
        overview=_overview(result),
        leakage=_leakage_sentences(result),
        tasks=[_task_view(task, result.leakage, folder) for task in result.tasks],
        primary=_primary_table(result),
        left_out={TASK_TITLES.get(task, task): reason for task, reason in result.left_out.items()},
        failed={TASK_TITLES.get(task, task): reason for task, reason in result.failed.items()},
        extras=extras or ReportExtras(),
        origin=_origin(result),
    )


# ---------------------------------------------------------------------------------------------- what was evaluated


def _overview(result: EvaluationResult) -> dict[str, str]:
    model, data = result.model, result.dataset
    licences = ", ".join(f"{name} {count:,}" for name, count in data.licences.items())
    facts = {
        "model": f"{model.name} ({model.kind.replace('_', ' ')})",
        "parameters": f"{model.num_parameters / 1e6:,.1f} M",
        "input": f"{model.image_px} px",
        "joint space": f"{model.embed_dim} dimensions",
        "data": f"{data.name}, {data.num_images:,} images",
        "rejected": f"{data.num_rejected:,} rows, see rejected.jsonl" if data.num_rejected else "none",
        "licences": licences or "not known",
        "weights' digest": model.digest,
        "data's digest": data.digest,
    }
    return {name: shortened(value) for name, value in facts.items()}


def _origin(result: EvaluationResult) -> dict[str, str]:
    facts = {"evaluated": result.created[:16].replace("T", " "), "took": f"{result.seconds:,.0f} s", **result.versions}
    return {name: shortened(value) for name, value in facts.items()}


def _leakage_sentences(result: EvaluationResult) -> tuple[str, bool]:
    """What a reader must know of it, and whether it is a warning."""
    leakage = result.leakage
    if leakage is None:
        return "Not compared with the training data: the model may have seen these images in training.", True
    against = f"the training data, {shortened(leakage.training_data)}"
    missing = f" {leakage.num_without_hash:,} images could not be compared." if leakage.num_without_hash else ""
    if leakage.num_overlap == 0:
        return f"None of the {leakage.num_compared:,} images tested on was found in {against}.{missing}", bool(missing)
    share = leakage.num_overlap / max(1, leakage.num_compared)
    return (
        f"{leakage.num_overlap:,} of {leakage.num_compared:,} images tested on ({share:.1%}) are in {against}, too: "
        f"{leakage.num_same_pixels:,} with the same pixels, {leakage.num_near:,} as near copies.{missing} "
        "The results without them stand beside the results with them.",
        True,
    )


def _primary_table(result: EvaluationResult) -> Table:
    """The metric of each task by which models are ranked."""
    rows = []
    for task in result.tasks:
        metric = task.metrics[task.primary]
        without = (task.without_overlap.get(task.primary),) if _has_without(result.tasks) else ()
        name = f"{TASK_TITLES[task.task]}: {task.primary}"
        rows.append(TableRow(name, (metric, *without), metric.chance, metric.is_share))
    columns = ("Value", "Without overlap") if _has_without(result.tasks) else ("Value",)
    return Table("main results", "Task and metric", columns, tuple(rows))


def _has_without(tasks: tuple[TaskResult, ...]) -> bool:
    return any(task.without_overlap for task in tasks)


# ---------------------------------------------------------------------------------------------- a task


def _task_view(task: TaskResult, leakage: Leakage | None, folder: Path) -> TaskView:
    title = TASK_TITLES[task.task]
    per_class_title, first = _PER_CLASS.get(task.task, ("Recall of each class", "Class"))
    return TaskView(
        result=task,
        title=title,
        metrics=_metrics_table(task, f"{title}: metrics"),
        gaps=_gaps_table(task.by_group, f"{title}: gaps between groups"),
        groups=tuple(_group_view(group) for group in task.by_group),
        per_class=_metric_rows(task.per_class, per_class_title, first) if task.per_class else None,
        per_class_title=per_class_title,
        confusion=_confusion(task, folder),
        charts=_charts(task.curves),
        settings={name: shortened(_setting(value)) for name, value in task.settings.items()},
        about_intervals=NO_INTERVAL if any(map(lacks_interval, _all_metrics(task))) else "",
    )


def _all_metrics(task: TaskResult) -> Iterator[Metric | None]:
    for metrics in (task.metrics, task.without_overlap, task.per_class, *(given.groups for given in task.by_group)):
        yield from metrics.values()
    yield from (given.gap for given in task.by_group)


def _metrics_table(task: TaskResult, label: str) -> Table:
    columns = ("Value", "Without overlap") if task.without_overlap else ("Value",)
    rows = tuple(
        TableRow(
            name,
            (metric, task.without_overlap.get(name)) if task.without_overlap else (metric,),
            metric.chance,
            metric.is_share,
            mark="primary" if name == task.primary else "",
        )
        for name, metric in task.metrics.items()
    )
    return Table(label, "Metric", columns, rows)


def _metric_rows(metrics: Mapping[str, Metric], label: str, first: str) -> Table:
    rows = tuple(TableRow(name, (metric,), metric.chance, metric.is_share) for name, metric in metrics.items())
    return Table(label, first, ("Value",), rows)


def _gaps_table(groups: tuple[ByGroup, ...], label: str) -> Table:
    rows = tuple(
        TableRow(_group_title(given), (given.gap,), is_share=given.gap.is_share, texts=(given.worst or "",))
        for given in groups
        if given.gap is not None
    )
    return Table(label, "Metric", ("Gap",), rows, text_columns=("Worst",), counted="n, worst and best")


def _group_title(given: ByGroup) -> str:
    return f"{given.metric} by {attribute_title(given.attribute)}"


def _group_view(given: ByGroup) -> GroupView:
    title = _group_title(given)
    least = given.min_group_size or 0
    rows = tuple(
        TableRow(
            name,
            (metric,),
            metric.chance,
            metric.is_share,
            mark="worst" if name == given.worst else "",
            is_few=metric.n < least,
        )
        for name, metric in given.groups.items()
    )
    sentences = []
    if given.gap is not None and given.gap.value is not None:
        decimals = 3 if given.gap.is_share else 1
        interval = "" if given.gap.low is None else f" ({given.gap.low:.{decimals}f} to {given.gap.high:.{decimals}f})"
        sentences.append(f"Best minus worst group: {given.gap.value:.{decimals}f}{interval}.")
    else:
        sentences.append("No gap: fewer than two groups are large enough.")
    if any(row.is_few for row in rows):
        sentences.append(f"Groups of fewer than {least} are grey, and are never called the best or the worst.")
    if given.num_unknown:
        sentences.append(f"{given.num_unknown:,} rows have no value.")
    table = Table(title, "Group", ("Value",), rows)
    return GroupView(title, tuple(sentences), table, is_open=given.attribute == "fitzpatrick")


def _confusion(task: TaskResult, folder: Path) -> dict[str, Any] | None:
    if task.confusion is None:
        return None
    num_classes = len(task.confusion.classnames)
    if {len(task.confusion.counts), *(len(row) for row in task.confusion.counts)} != {num_classes}:
        raise InputError(
            f"{folder / RESULT_NAME}: {task.task}.confusion: its counts do not fit its {num_classes} classnames; "
            "evaluate again"
        )
    return confusion_view(task.confusion, RESULT_NAME)


def _charts(curves: tuple[Curve, ...]) -> tuple[Charts, ...]:
    """By kind, several curves to a chart; those of equal kind over different quantities stand apart."""
    kinds: dict[tuple[str, bool], list[Curve]] = {}
    for curve in curves:
        if curve.x:
            kinds.setdefault((curve.kind, is_shots(curve)), []).append(curve)
    made = []
    for title_of, given in sorted(kinds.items(), key=lambda item: (list(CURVE_TITLES).index(item[0][0]), item[0][1])):
        parts = [given[start : start + MAX_CURVES] for start in range(0, len(given), MAX_CURVES)][:MAX_CHARTS]
        shown = tuple(
            (tuple(curve.name for curve in part), themed(curves_figure, part, [curve.name for curve in part]))
            for part in parts
        )
        title = "Few-shot" if title_of[1] else CURVE_TITLES[title_of[0]]
        made.append(Charts(title, shown, len(given) - sum(len(part) for part in parts)))
    return tuple(made)


def _setting(value: object) -> str:
    return "; ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
