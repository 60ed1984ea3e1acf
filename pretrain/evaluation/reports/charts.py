"""Charts of the pages, drawn once for light and once for dark, and shown as images.

Series differ in colour, dash and marker together, so that no reader depends on colour alone. The colours are from Okabe
& Ito (2008), the light ones darkened to a contrast of 3 with the page.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from pretrain.evaluation.comparison.compare import Ranks
from pretrain.evaluation.reports.page import harmless, squeezed
from pretrain.evaluation.results import Confusion, Curve
from pretrain.train.curves import Palette, style_axes

MAX_POINTS = 400  # of a curve
MAX_TABLE_CLASSES = 20  # a larger confusion matrix is a picture
_NUM_COMMONEST = 15  # confusions listed beside it
_MAX_LABEL_LENGTH = 60  # characters: a longer name would make the figure as wide
_WIDTH_IN, _HEIGHT_IN = 3.5, 2.7  # 336 px: a phone shows it at its own size

_LIGHT = ("#0b6e8f", "#c44f00", "#00805d", "#a0467c", "#3d4852", "#8a6d00")
_DARK = ("#5cc3e4", "#f0a35e", "#3ecf9f", "#e08fbb", "#c9d3db", "#e5d55a")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")

#: kind of curve -> names of the axes
_AXES = {
    "roc": ("false positive rate", "true positive rate"),
    "reliability": ("predicted probability", "share that is right"),
    "efficiency": ("labels used for training (%)", "value"),
    "cumulative_match": ("rank", "share found up to this rank"),
}


def themed(draw: Callable[..., Figure], *arguments: Any) -> dict[str, Any]:
    """The figure in both palettes as data URIs, for <picture>; `width` and `height` in CSS pixels."""
    chart: dict[str, Any] = {}
    for theme, palette in (("light", Palette.light()), ("dark", Palette.dark())):
        figure = draw(*arguments, palette)
        buffer = io.BytesIO()
        # a fixed salt and no date: the same numbers give the same bytes
        with (
            matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser writes the text, in its own fonts
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = harmless(buffer.getvalue().decode())
        chart[theme] = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        chart["width"], chart["height"] = (round(inches * 96) for inches in figure.get_size_inches())
    return chart


def curves_figure(curves: Sequence[Curve], names: Sequence[str], palette: Palette) -> Figure:
    """Curves of one kind on the same axes, with a legend where there are several. `names`: one a curve."""
    has_legend = len(curves) > 1
    height = _HEIGHT_IN + (0.21 * len(curves) + 0.1 if has_legend else 0)
    figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained", facecolor=palette.background)
    axes = figure.add_subplot()
    style_axes(axes, palette)
    axes.grid(color=palette.grid, linewidth=0.6)
    kind = curves[0].kind
    if kind in ("roc", "reliability"):
        axes.plot([0, 1], [0, 1], color=palette.ink, linewidth=0.8, linestyle=(0, (1, 3)))
    band_alpha = 0.08 if has_legend else 0.15
    lines = [_draw_curve(axes, curve, position, palette, band_alpha) for position, curve in enumerate(curves)]
    _scale_axes(axes, curves)
    x_name, y_name = _AXES[kind]
    axes.set_xlabel("labelled images of each class" if is_shots(curves[0]) else x_name, fontsize=8, color=palette.ink)
    axes.set_ylabel(y_name, fontsize=8, color=palette.ink)
    if has_legend:
        # numbers first: matplotlib leaves out labels that begin with an underscore
        legend = figure.legend(lines, [str(number) for number in range(len(lines))], loc="outside lower left")
        legend.set_frame_on(False)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set(text=squeezed(name, 42), parse_math=False, fontsize=8, color=palette.ink)
    return figure


def confusion_figure(counts: NDArray[np.int64], classnames: Sequence[str], palette: Palette) -> Figure:
    """For many classes. Rows are shaded by their share, so that a rare class is as visible as a common one."""
    num_classes = len(counts)
    labels = [squeezed(name, _MAX_LABEL_LENGTH) for name in classnames]
    side = 0.14 * num_classes
    margin = 0.06 * max(len(label) for label in labels) + 0.4  # for the names
    whole = side + margin + 0.1
    # placed by hand: a layout engine takes seconds for hundreds of names
    figure = Figure(figsize=(whole, whole), facecolor=palette.background)
    axes = figure.add_axes((margin / whole, margin / whole, side / whole, side / whole))
    style_axes(axes, palette)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shade = LinearSegmentedColormap.from_list("share", [palette.line + "00", palette.line + "ff"])
    axes.imshow(shares, cmap=shade, vmin=0, vmax=1, interpolation="none")  # a pixel a cell, enlarged by the browser
    for setter in (axes.set_xticks, axes.set_yticks):
        setter(range(num_classes), labels, fontsize=6, parse_math=False)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("predicted", fontsize=8, color=palette.ink)
    axes.set_ylabel("true", fontsize=8, color=palette.ink)
    return figure


def critical_difference_figure(ranks: Ranks, palette: Palette) -> Figure:
    """Mean ranks on a line, the best to the left; bars join models that do not differ (Demsar, 2006, figure 1)."""
    names, values = list(ranks.mean_rank), list(ranks.mean_rank.values())
    bars = [[ranks.mean_rank[name] for name in run] for run in ranks.not_different if len(run) > 1]
    num, num_left = len(names), (len(names) + 1) // 2
    num_lines = 3 + len(bars) + num_left
    figure = Figure(figsize=(6.4, 0.24 * num_lines), facecolor=palette.background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(len(bars) + num_left + 1, -2))
    axes.set_axis_off()

    def place(rank: float) -> float:
        return 0.3 + 0.4 * (rank - 1) / (num - 1)

    thin: dict[str, Any] = {"color": palette.ink, "linewidth": 0.9}
    text: dict[str, Any] = {"fontsize": 8, "color": palette.ink, "parse_math": False}
    axes.plot([place(1), place(num)], [0, 0], **thin)
    for rank in range(1, num + 1):
        axes.plot([place(rank)] * 2, [0, -0.25], **thin)
        axes.text(place(rank), -0.4, str(rank), ha="center", va="bottom", **text)
    assert ranks.critical_difference is not None
    axes.plot([place(1), place(1 + ranks.critical_difference)], [-1.2, -1.2], **thin, marker="|")
    axes.text(place(1), -1.4, f"critical difference {ranks.critical_difference:.2f}", ha="left", va="bottom", **text)
    for line, bar in enumerate(bars):
        ends = [place(min(bar)) - 0.006, place(max(bar)) + 0.006]
        axes.plot(ends, [0.7 + line] * 2, color=palette.line, linewidth=3.5, solid_capstyle="butt")
    for position, (name, value) in enumerate(zip(names, values, strict=True)):
        is_left = position < num_left
        line = len(bars) + 1 + (position if is_left else num - 1 - position)
        edge = 0.27 if is_left else 0.73
        axes.plot([place(value), place(value), edge], [0, line, line], **thin)
        label = f"{squeezed(name, 28)}  {value:.2f}" if is_left else f"{value:.2f}  {squeezed(name, 28)}"
        axes.text(
            edge + (-0.01 if is_left else 0.01), line, label, ha="right" if is_left else "left", va="center", **text
        )
    return figure


def confusion_view(confusion: Confusion, kept_in: str) -> dict[str, Any]:
    """What `parts.html` shows: the counts as a table, or as a chart where there are many classes.

    `kept_in`: where a reader finds the counts that a chart does not tell.
    """
    is_large = len(confusion.classnames) > MAX_TABLE_CLASSES
    counts = np.array(confusion.counts, dtype=np.int64)
    return {
        "classnames": confusion.classnames,
        "counts": confusion.counts,
        "chart": themed(confusion_figure, counts, confusion.classnames) if is_large else None,
        "kept_in": kept_in,
        "commonest": _commonest(counts, confusion.classnames) if is_large else [],
    }


# ---------------------------------------------------------------------------------------------- parts


def _draw_curve(axes: Axes, curve: Curve, position: int, palette: Palette, band_alpha: float) -> Any:
    colours = _LIGHT if palette == Palette.light() else _DARK
    colour = colours[position % len(colours)]
    kept = _thinned(len(curve.x))
    x, y = np.array(curve.x, float)[kept], np.array(curve.y, float)[kept]
    if curve.low and curve.high:
        low, high = np.array(curve.low, float)[kept], np.array(curve.high, float)[kept]
        axes.fill_between(x, low, high, color=colour, alpha=band_alpha, linewidth=0)
    is_dense = len(x) > 25 or curve.kind == "roc"
    (line,) = axes.plot(
        x,
        y,
        color=colour,
        linewidth=1.5,
        linestyle=_DASHES[position % len(_DASHES)],
        marker=None if is_dense else _MARKERS[position % len(_MARKERS)],
        markersize=4,
    )
    return line


def _scale_axes(axes: Axes, curves: Sequence[Curve]) -> None:
    kind = curves[0].kind
    if kind in ("roc", "reliability"):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        return
    axes.set_xscale("log")
    ticks = sorted({value for curve in curves for value in curve.x if value > 0})
    if kind == "efficiency" and len(ticks) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
    as_percent = kind == "efficiency" and not is_shots(curves[0])
    axes.xaxis.set_major_formatter((lambda value, _: f"{100 * value:g}") if as_percent else "{x:g}")
    if kind == "cumulative_match":
        axes.set_ylim(-0.02, 1.02)


def is_shots(curve: Curve) -> bool:
    """Whether an efficiency curve counts images of a class, and not the share of all labels."""
    return curve.kind == "efficiency" and max(curve.x, default=0) > 1


def _thinned(num_points: int) -> NDArray[np.int64]:
    """Positions of at most MAX_POINTS points, the first and the last among them."""
    return np.unique(np.linspace(0, num_points - 1, min(num_points, MAX_POINTS)).round().astype(np.int64))


def _commonest(counts: NDArray[np.int64], classnames: Sequence[str]) -> list[tuple[str, str, int]]:
    """Confusions (true, predicted, images), the most frequent first."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_NUM_COMMONEST].tolist()
    cells = [divmod(cell, len(counts)) for cell in order]
    return [
        (classnames[row], classnames[column], int(wrong[row, column])) for row, column in cells if wrong[row, column]
    ]
