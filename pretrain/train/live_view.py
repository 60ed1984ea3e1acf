"""A run on a terminal: how far, its losses by objective, its speed and its newest validation, kept up to date."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table


class LiveView:
    """A block at the bottom of the terminal, readable at 80 columns; what is said scrolls above it."""

    def __init__(self, console: Console, first_step: int, num_steps: int) -> None:
        self._step, self._num_steps = first_step, num_steps
        self._rows: dict[str, str] = {}
        # a thread draws it: twice a second is enough, and takes nothing from the step that could be measured
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)
        self._live.start()

    def advance(self, step: int) -> None:
        self._step = step

    def show(self, values: Mapping[str, float], left_s: float) -> None:
        """The values of a logged step."""
        self._rows |= {"losses": losses_text(values), "speed": f"{speed_text(values)}, {time_text(left_s)} left"}

    def show_validation(self, step: int, values: Mapping[str, float]) -> None:
        self._rows |= {"validation": f"at step {step}: {validation_text(values)}"}

    def say(self, message: str) -> None:
        self._live.console.print(escape(message), highlight=False)

    def stop(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(f"step {self._step}/{self._num_steps}", ProgressBar(self._num_steps, self._step, width=40))
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="bold", no_wrap=True)
        rows.add_column(overflow="fold")
        for name, text in dict(self._rows).items():
            rows.add_row(name, escape(text))
        return Group(bar, rows)


def losses_text(values: Mapping[str, float]) -> str:
    """The total, then every objective's."""
    named = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss")}
    return "  ".join(f"{name} {value:.3f}" for name, value in named.items())


def speed_text(values: Mapping[str, float]) -> str:
    return f"{values['samples_per_s']:.0f} samples/s, {values['reader_wait_fraction']:.0%} waiting for the reader"


def validation_text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in values.items())


def time_text(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
