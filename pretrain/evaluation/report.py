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
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pretrain.evaluation.statistics import Estimate

#: name of an objective, "logit_scale", ... -> (step, value)
LossSeries = Mapping[str, Sequence[tuple[int, float]]]

MAX_CHART_POINTS = 400


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
    page = environment.from_string(_PAGE).render(
        report=report,
        style=_STYLE,
        numbers=report_numbers(report),
        charts={name: _themed(_loss_figure, {name: series}) for name, series in report.losses.items()},
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
            name: [[float(step), _json_number(value)] for step, value in zip(*_thin(series), strict=True)]
            for name, series in report.losses.items()
        },
        "per_class_recall": {name: estimate(recall) for name, recall in report.per_class_recall.items()},
        "classnames": list(report.classnames),
        "confusion": None if report.confusion is None else report.confusion.tolist(),
        "limits": list(report.limits),
    }


def plot_losses(series: LossSeries, path: Path) -> None:
    """Write the curves as a PNG, one panel per name; the suffix of `path` may name another format of matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _loss_figure(series, _Palette.light(background="white")).savefig(path, dpi=150)


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


@dataclass(frozen=True)
class _Palette:
    ink: str
    grid: str
    line: str
    background: str = "none"

    @staticmethod
    def light(background: str = "none") -> _Palette:
        return _Palette(ink="#3d4852", grid="#dde3e8", line="#0b6e8f", background=background)

    @staticmethod
    def dark() -> _Palette:
        return _Palette(ink="#b8c4ce", grid="#34404a", line="#5cc3e4")


def _themed(draw: Callable[..., Figure], *arguments: Any) -> dict[str, Any]:
    """The figure in both palettes as data URIs, for <picture>; `width` in CSS pixels."""
    chart: dict[str, Any] = {}
    for theme, palette in (("light", _Palette.light()), ("dark", _Palette.dark())):
        figure = draw(*arguments, palette)
        buffer = io.BytesIO()
        # a fixed salt and no date: the same numbers give the same bytes
        with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        chart[theme] = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
        chart["width"] = round(figure.get_figwidth() * 96)
    return chart


def _style_axes(axes: Axes, palette: _Palette) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=palette.ink, labelsize=8, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(palette.grid)


def _loss_figure(series: LossSeries, palette: _Palette) -> Figure:
    num_columns = min(3, max(1, len(series)))
    num_rows = max(1, math.ceil(len(series) / num_columns))
    figure = Figure(figsize=(3.6 * num_columns, 2.4 * num_rows), layout="constrained", facecolor=palette.background)
    for position, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(num_rows, num_columns, position + 1)
        _style_axes(axes, palette)
        steps, values = _thin(points)
        axes.plot(steps, values, color=palette.line, linewidth=1.4, marker="o" if len(steps) == 1 else None)
        axes.grid(color=palette.grid, linewidth=0.6)
        axes.locator_params(nbins=5)
        axes.yaxis.set_major_formatter("{x:g}")
        # parse_math: a name is data, and "$" in it is no formula
        axes.set_title(name, fontsize=9, color=palette.ink, loc="left", parse_math=False)
        axes.set_xlabel("step", fontsize=8, color=palette.ink)
    return figure


def _thin(points: Sequence[tuple[int, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most MAX_CHART_POINTS points: long series as means of equal runs of steps. A run with a NaN stays a gap."""
    curve = np.array(points, dtype=np.float64).reshape(-1, 2)
    curve[~np.isfinite(curve)] = np.nan
    if len(curve) > MAX_CHART_POINTS:
        run_length = math.ceil(len(curve) / MAX_CHART_POINTS)  # one length for all, or the noise would seem to change
        curve = np.array([curve[start : start + run_length].mean(axis=0) for start in range(0, len(curve), run_length)])
    return curve[:, 0], curve[:, 1]


def _confusion_figure(counts: NDArray[np.int64], classnames: Sequence[str], palette: _Palette) -> Figure:
    """Rows are shaded by their share, so that a rare class is as visible as a common one; cells hold counts."""
    num_classes = len(counts)
    shows_counts = num_classes <= 20
    side = (0.46 if shows_counts else 0.14) * num_classes
    label_side = 0.075 * max(len(name) for name in classnames) + 0.4
    figure = Figure(figsize=(side + label_side, side + label_side), layout="constrained", facecolor=palette.background)
    axes = figure.add_subplot()
    _style_axes(axes, palette)
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
        on_shade = "#ffffff" if palette == _Palette.light() else "#0f1418"
        colour = on_shade if shares[row, column] > 0.5 else palette.ink
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7.5, color=colour)
    return figure


# ---------------------------------------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; --ink: #1d252c; --soft: #5a6772; --line: #d9e0e6; --paper: #ffffff;
  --panel: #f5f7f9; --accent: #0b6e8f; --before: #8a97a3; --notice: #fdf3dc; --notice-ink: #6b4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaef; --soft: #9aa8b4; --line: #34404a; --paper: #12181d;
  --panel: #1a2229; --accent: #5cc3e4; --before: #7d8b97; --notice: #352a10; --notice-ink: #f0cf87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
.note { color: var(--soft); font-size: .85rem; margin: .4rem 0 .8rem; max-width: 46rem; }
.notice { background: var(--notice); color: var(--notice-ink); padding: .6rem .9rem; border-radius: 4px; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
thead th { color: var(--soft); font-weight: 500; font-size: .8rem; white-space: nowrap; }
tbody th { font-weight: 500; }
.n { text-align: right; white-space: nowrap; }
.plot { width: 30%; min-width: 4rem; padding: .2rem .5rem; vertical-align: middle; }
.wide { min-width: 11rem; }
.plot svg { width: 100%; overflow: visible; display: block; }
@media (max-width: 32rem) { th, td { padding-right: .6rem; } .interval { font-size: .7rem; }
  tbody th { min-width: 6.8rem; } }
.interval { display: block; color: var(--soft); font-size: .78rem; }
.key i { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin: 0 .3rem 0 .8rem; }
.key i:first-child { margin-left: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .9rem 1.5rem;
  margin: .9rem 0 0; }
dt { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
.scroll img { max-width: none; }
figcaption { color: var(--soft); font-size: .8rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.2rem;
  margin-top: 1rem; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.card > img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line); }
.card > div { padding: .8rem .9rem 1rem; }
.card h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.card h4 { font-size: .8rem; color: var(--soft); font-weight: 500; margin: .9rem 0 .2rem; }
.card p { margin: .1rem 0 .6rem; font-size: .88rem; overflow-wrap: anywhere; }
.aspect { display: flex; align-items: center; gap: .5rem; color: var(--soft); font-size: .76rem; }
.bar { flex: 0 0 4rem; height: .35rem; background: var(--line); border-radius: 2px; margin-left: auto; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 2px; }
.prediction { display: flex; align-items: center; gap: .5rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
.prediction span:first-child { overflow-wrap: anywhere; }
.hit span:first-child { font-weight: 650; }
li { margin: .3rem 0; max-width: 46rem; }
@media print { .card, figure, tr { break-inside: avoid; } }
"""

_PAGE = """
{%- macro estimate(e, decimals=3) -%}
{{ e.value | number(decimals) }}
{%- if e.low == e.low %}<span class="interval">{{ e.low | number(decimals) }} to {{ e.high | number(decimals) }}</span>
{%- endif %}
{%- endmacro -%}
{%- macro whisker(e, y, colour) -%}
{% if e.value == e.value %}<line x1="{{ e.low | percent }}%" x2="{{ e.high | percent }}%" y1="{{ y }}" y2="{{ y }}"
 stroke="var({{ colour }})" stroke-width="2"/>
<circle cx="{{ e.value | percent }}%" cy="{{ y }}" r="3.5" fill="var({{ colour }})"/>{% endif %}
{%- endmacro -%}
{%- macro picture(chart, alt) -%}
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ chart.dark }}">
<img src="{{ chart.light }}" width="{{ chart.width }}" alt="{{ alt }}"></picture>
{%- endmacro -%}
{%- macro bar(share) -%}
<span class="bar"><i style="width: {{ share | percent }}%"></i></span>{{ share | number(2) }}
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ report.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ report.title }}</h1>
{% if report.subtitle %}
<p class="notice">{{ report.subtitle }}</p>
{% endif %}
{% if report.facts or report.stages_s %}
<h2>Run</h2>
<dl>
{% for name, value in report.facts.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
{% for name, seconds in report.stages_s.items() %}
<div><dt>{{ name }}</dt><dd>{{ "%.1f" | format(seconds) }} s</dd></div>
{% endfor %}
</dl>
{% endif %}
{% if report.metrics %}
<h2>{{ "Before and after training" if has_before else "Results" }}</h2>
<p class="note">Value and {{ "%g" | format(report.confidence * 100) }} % interval; n counts the images or queries.
<span class="key">{% if has_before %}<i style="background: var(--before)"></i>before {% endif %}
<i style="background: var(--accent)"></i>after</span>; dotted: chance; the scale runs from 0 to 1.</p>
<div class="scroll" tabindex="0" role="region" aria-label="metrics"><table>
<thead><tr><th>Metric</th>{% if has_before %}<th class="n">Before</th>{% endif %}<th class="n">After</th>
<th class="n">Chance</th><th class="n">n</th><th></th></tr></thead>
<tbody>
{% for row in report.metrics %}
{% set decimals = 3 if row.is_share else 1 %}
<tr><th>{{ row.name | breakable }}</th>
{% if has_before %}<td class="n">{% if row.before %}{{ estimate(row.before, decimals) }}{% endif %}</td>{% endif %}
<td class="n">{{ estimate(row.after, decimals) }}</td>
<td class="n">{% if row.chance is not none %}{{ row.chance | number(decimals) }}{% endif %}</td>
<td class="n">{{ row.after.n }}</td>
<td class="plot wide">{% if row.is_share %}<svg height="26" aria-hidden="true">
<line x1="0" x2="100%" y1="25" y2="25" stroke="var(--line)"/>
{% if row.chance is not none %}<line x1="{{ row.chance | percent }}%" x2="{{ row.chance | percent }}%" y1="2" y2="25"
 stroke="var(--soft)" stroke-dasharray="2 2"/>{% endif %}
{% if row.before %}{{ whisker(row.before, 8, "--before") }}{% endif %}
{{ whisker(row.after, 17, "--accent") }}</svg>{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if report.losses %}
<h2>Training curves</h2>
<div class="charts">
{% for name, chart in charts.items() %}
<figure>{{ picture(chart, name ~ " by training step") }}
{% if num_not_finite[name] %}<figcaption>{{ num_not_finite[name] }} values are not finite: gaps.</figcaption>{% endif %}
</figure>
{% endfor %}
</div>
{% endif %}
{% if report.per_class_recall %}
<h2>Recall of each class</h2>
<div class="scroll" tabindex="0" role="region" aria-label="recall of each class"><table>
<thead><tr><th>Class</th><th class="n">Images</th><th class="n">Recall</th><th></th></tr></thead>
<tbody>
{% for name, recall in report.per_class_recall.items() %}
<tr><th>{{ name }}</th><td class="n">{{ recall.n }}</td><td class="n">{{ estimate(recall) }}</td>
<td class="plot"><svg height="18" aria-hidden="true"><line x1="0" x2="100%" y1="17" y2="17" stroke="var(--line)"/>
{{ whisker(recall, 8, "--accent") }}</svg></td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if confusion %}
<h2>Confusion matrix</h2>
<p class="note">Counts of images; the shade is the share of the true class (the row).</p>
<div class="scroll" tabindex="0" role="region" aria-label="confusion matrix">
{{ picture(confusion, "confusion matrix; its counts are in the data block of this page") }}</div>
{% endif %}
{% if report.gallery %}
<h2>Examples</h2>
<p class="note">Bars beside texts are their training weights; those beside classes are zero-shot probabilities.</p>
<div class="gallery">
{% for item in report.gallery %}
<article class="card"><img src="{{ item.jpeg | jpeg }}" alt="example image {{ loop.index }}">
<div><h3>{{ item.diagnosis or "no diagnosis" }}</h3>
{% for caption in item.captions %}
<div class="aspect">{{ caption.aspect }}
{% if caption.weight is not none %}{{ bar(caption.weight) }}{% endif %}</div>
<p>{{ caption.text }}</p>
{% endfor %}
{% if item.predictions %}<h4>Zero-shot prediction</h4>{% endif %}
{% for name, share in item.predictions %}
<div class="prediction{{ " hit" if name == item.diagnosis else "" }}"><span>{{ name }}</span>
{{ bar(share) }}</div>
{% endfor %}
</div></article>
{% endfor %}
</div>
{% endif %}
{% if report.limits %}
<h2>Limits</h2>
<ul>
{% for sentence in report.limits %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
{% endif %}
<script type="application/json" id="numbers">{{ numbers | tojson }}</script>
</body>
</html>
"""
