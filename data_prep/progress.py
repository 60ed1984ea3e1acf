"""Progress of long work: a live bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich import progress as rich_progress

_LINE_EVERY_S = 10.0


class Progress:
    """`with Progress("reading", unit="rows", total=None) as progress: progress.advance(n)`"""

    def __init__(self, description: str, unit: str, total: int | None = None) -> None:
        self._description, self._unit, self._total = description, unit, total
        self._done, self._started = 0, time.monotonic()
        self._last_line = self._started
        self._bar: rich_progress.Progress | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            columns = (
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeElapsedColumn(),
            )
            self._bar = rich_progress.Progress(*columns)
            self._task = self._bar.add_task(self._description, total=self._total)
            self._bar.start()
        return self

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._print_line()

    def _print_line(self) -> None:
        elapsed_s = time.monotonic() - self._started
        total = "" if self._total is None else f"/{self._total}"
        rate = self._done / max(elapsed_s, 1e-9)
        print(f"{self._description}: {self._done}{total} {self._unit}, {rate:.0f}/s", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
