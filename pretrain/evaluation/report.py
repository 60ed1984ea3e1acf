"""The result of a run as one HTML page that can be mailed: no script, no external resource, every text escaped.

Captions and class names come from data sets and are not trusted: Jinja2 escapes them, charts are shown as images (where
SVG cannot run script), and the page's own content security policy allows no script at all.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pretrain.evaluation.report_page import PAGE, STYLE
from pretrain.evaluation.statistics import Estimate
from pretrain.train.curves import LossSeries, Palette, loss_figure, style_axes, thin


@dataclass(frozen=True)
class MetricRow:
    """One line of the before/after table. `chance` is what guessing gives; None where there is no such constant."""

    name: str
    after: Estimate
    before: Estimate | None = None
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
    per_class_recall: Mapping[str, Estimate] = field(default_factory=dict)
    confusion: NDArray[np.int64] | None = None  # (C, C), row = true class
    classnames: tuple[str, ...] = ()  # of the confusion matrix
    gallery: tuple[GalleryItem, ...] = ()
    limits: tuple[str, ...] = ()  # plain sentences
    confidence: float = 0.95  # of all the intervals


def write_report(path: Path, report: ReportData) -> None:
    """Write `report` as one self-contained HTML file; an existing file is replaced whole. Equal data, equal bytes."""
    if report.confusion is not None and report.confusion.shape != (len(report.classnames),) * 2:
        raise ValueError(f"confusion is {report.confusion.shape}, but there are {len(report.classnames)} classnames")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "percent": _percent, "breakable": _breakable, "jpeg": _jpeg_uri}
    page = environment.from_string(PAGE).render(
        report=report,
        style=STYLE,
        numbers=report_numbers(report),
        charts={name: _themed(loss_figure, {name: series}) for name, series in report.losses.items()},
        confusion=None if report.confusion is None else _themed(_confusion_figure, report.confusion, report.classnames),
        num_not_finite={name: int((~_finite(series)).sum()) for name, series in report.losses.items()},
        has_before=any(row.before is not None for row in report.metrics),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(page, encoding="utf-8")
    partial_path.replace(path)


def report_numbers(report: ReportData) -> dict[str, Any]:
    """The page's numbers as JSON values, for programs; NaN and infinity become None.

    Losses are as drawn: long series as means of runs of steps. This is what the page embeds as `script#numbers`.
    """

    def estimate(given: Estimate | None) -> dict[str, float | int | None] | None:
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


# ---------------------------------------------------------------------------------------------- numbers


def _number(value: float, decimals: int = 3) -> str:
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "undefined"


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _percent(share: float) -> str:
    return f"{min(max(share, 0.0), 1.0) * 100:.1f}" if math.isfinite(share) else "0"


def _breakable(name: str) -> Markup:
    """Let a long metric name wrap after its underscores on a narrow screen. The parts are escaped by join."""
    return Markup("_<wbr>").join(name.split("_"))


def _jpeg_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _finite(series: Sequence[tuple[int, float]]) -> NDArray[np.bool_]:
    return np.isfinite(np.array([value for _, value in series], dtype=np.float64))


# ---------------------------------------------------------------------------------------------- charts


def _themed(draw: Callable[..., Figure], *arguments: Any) -> dict[str, Any]:
    """The figure in both palettes as data URIs, for <picture>; `width` in CSS pixels."""
    chart: dict[str, Any] = {}
    for theme, palette in (("light", Palette.light()), ("dark", Palette.dark())):
        figure = draw(*arguments, palette)
        buffer = io.BytesIO()
        # a fixed salt and no date: the same numbers give the same bytes
        with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        chart[theme] = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
        chart["width"] = round(figure.get_figwidth() * 96)
    return chart


def _confusion_figure(counts: NDArray[np.int64], classnames: Sequence[str], palette: Palette) -> Figure:
    """Rows are shaded by their share, so that a rare class is as visible as a common one; cells hold counts."""
    num_classes = len(counts)
    shows_counts = num_classes <= 20
    side = (0.46 if shows_counts else 0.14) * num_classes
    label_side = 0.075 * max(len(name) for name in classnames) + 0.4
    figure = Figure(figsize=(side + label_side, side + label_side), layout="constrained", facecolor=palette.background)
    axes = figure.add_subplot()
    style_axes(axes, palette)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shade = LinearSegmentedColormap.from_list("share", [palette.line + "00", palette.line + "ff"])
    axes.imshow(shares, cmap=shade, vmin=0, vmax=1)
    for setter in (axes.set_xticks, axes.set_yticks):
        setter(range(num_classes), classnames, fontsize=8 if shows_counts else 6, parse_math=False)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=palette.grid, linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted", fontsize=8, color=palette.ink)
    axes.set_ylabel("true", fontsize=8, color=palette.ink)
    for row, column in np.argwhere(counts > 0) if shows_counts else ():
        # dark shade wants white in the light theme; the dark theme's shade is bright and wants black
        on_shade = "#ffffff" if palette == Palette.light() else "#0f1418"
        colour = on_shade if shares[row, column] > 0.5 else palette.ink
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7.5, color=colour)
    return figure
