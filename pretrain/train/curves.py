"""The curves of a run: read from its metrics, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pretrain.train.metrics import read_metrics

#: name of an objective, "logit_scale", ... -> (step, value)
LossSeries = Mapping[str, Sequence[tuple[int, float]]]

MAX_CHART_POINTS = 400


def loss_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The run's losses by objective, then its temperature and learning rate, then its validations' values, by step."""
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    names = [name for name in (steps[-1] if steps else {}) if name.startswith("loss")]
    names += ["logit_scale", "lr"] if steps else []
    curves = {name.removeprefix("loss/"): _series(steps, name) for name in names}
    validations = [record for record in records if "val/loss" in record]
    return curves | {
        name: _series(validations, name) for name in (validations[-1] if validations else {}) if name != "step"
    }


def _series(records: Sequence[Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(record["step"]), float(record[name])) for record in records if name in record]


def plot_losses(series: LossSeries, path: Path) -> None:
    """Write the curves as a PNG, one panel per name; the suffix of `path` may name another format of matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    loss_figure(series, Palette.light(background="white")).savefig(path, dpi=150)


@dataclass(frozen=True)
class Palette:
    ink: str
    grid: str
    line: str
    background: str = "none"

    @staticmethod
    def light(background: str = "none") -> Palette:
        return Palette(ink="#3d4852", grid="#dde3e8", line="#0b6e8f", background=background)

    @staticmethod
    def dark() -> Palette:
        return Palette(ink="#b8c4ce", grid="#34404a", line="#5cc3e4")


def style_axes(axes: Axes, palette: Palette) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=palette.ink, labelsize=8, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(palette.grid)


def loss_figure(series: LossSeries, palette: Palette) -> Figure:
    num_columns = min(3, max(1, len(series)))
    num_rows = max(1, math.ceil(len(series) / num_columns))
    figure = Figure(figsize=(3.6 * num_columns, 2.4 * num_rows), layout="constrained", facecolor=palette.background)
    for position, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(num_rows, num_columns, position + 1)
        style_axes(axes, palette)
        steps, values = thin(points)
        axes.plot(steps, values, color=palette.line, linewidth=1.4, marker="o" if len(steps) == 1 else None)
        axes.grid(color=palette.grid, linewidth=0.6)
        axes.locator_params(nbins=5)
        axes.yaxis.set_major_formatter("{x:g}")
        # parse_math: a name is data, and "$" in it is no formula
        axes.set_title(name, fontsize=9, color=palette.ink, loc="left", parse_math=False)
        axes.set_xlabel("step", fontsize=8, color=palette.ink)
    return figure


def thin(points: Sequence[tuple[int, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most MAX_CHART_POINTS points: long series as means of equal runs of steps. A run with a NaN stays a gap."""
    curve = np.array(points, dtype=np.float64).reshape(-1, 2)
    curve[~np.isfinite(curve)] = np.nan
    if len(curve) > MAX_CHART_POINTS:
        run_length = math.ceil(len(curve) / MAX_CHART_POINTS)  # one length for all, or the noise would seem to change
        curve = np.array([curve[start : start + run_length].mean(axis=0) for start in range(0, len(curve), run_length)])
    return curve[:, 0], curve[:, 1]
