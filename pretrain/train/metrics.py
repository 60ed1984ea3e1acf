"""Metrics of a run: JSON Lines for programs, a line or a live view for people, trackers for teams."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.config import TrainConfig
from pretrain.distributed import comm
from pretrain.objectives.base import Term
from pretrain.train.live_view import LiveView, losses_text, speed_text, time_text, validation_text
from pretrain.train.trackers import describe, open_trackers


def reduce_terms(loss: Tensor, terms: dict[str, Term]) -> dict[str, float]:
    """The step's values over all ranks, in one collective. Waits for the device: call it on logged steps only."""
    names, values = ["loss"], [loss.double()]
    for kind, term in terms.items():
        names.append(f"loss/{kind}")
        values.append(term.loss.detach().double())
    means = len(values)
    for kind, term in terms.items():
        for name, (total, count) in term.statistics.items():
            names.append(f"{kind}/{name}")
            values += [total.detach().double(), count.detach().double()]
    reduced = comm.sum_over_ranks(torch.stack(values)).tolist()
    result = {name: value / comm.world_size() for name, value in zip(names[:means], reduced[:means], strict=True)}
    pairs = zip(reduced[means::2], reduced[means + 1 :: 2], strict=True)
    counted = {name: pair for name, pair in zip(names[means:], pairs, strict=True) if pair[1] > 0}
    result |= {name: total / count for name, (total, count) in counted.items()}
    return result


def to_json(record: Mapping[str, Any]) -> str:
    """One line; a number that is not finite becomes a word ("nan", "inf"), since JSON has none."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records; a last line that was torn by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in record.items()})
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not JSON; remove it to go on") from None
    return records


class MetricsLog:
    """Rank 0's `metrics.jsonl`, terminal and trackers; the other ranks' calls do nothing.

    On resume the lines past the checkpoint are dropped: those steps are done again. Raises InputError, on all ranks,
    for a tracker that cannot start.
    """

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        self._is_main = comm.rank() == 0
        self._num_steps, self._first_step, self._started = config.steps, first_step, time.monotonic()
        self._view: LiveView | None = None
        self._trackers = open_trackers(config, first_step, self.say)
        if not self._is_main:
            return
        path = config.run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        console = Console(stderr=True)
        if sys.stderr.isatty() and not console.is_dumb_terminal:
            self._view = LiveView(console, first_step, config.steps)

    def advance(self, step: int) -> None:
        if self._view is not None:
            self._view.advance(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """`step` steps are done."""
        if not self._is_main:
            return
        self._record(step, values)
        per_step_s = (time.monotonic() - self._started) / (step - self._first_step)
        left_s = (self._num_steps - step) * per_step_s
        if self._view is not None:
            self._view.show(values, left_s)
        else:
            progress = f"step {step}/{self._num_steps}  {losses_text(values)}"
            self.say(f"{progress}  {speed_text(values)}, {time_text(left_s)} left")

    def write_validation(self, step: int, values: dict[str, float]) -> None:
        """`step` steps are done. A record of its own in metrics.jsonl, with `val/...` names."""
        if not self._is_main:
            return
        self._record(step, values)
        if self._view is not None:
            self._view.show_validation(step, values)
        else:
            self.say(f"validation at step {step}: {validation_text(values)}")

    def _record(self, step: int, values: dict[str, float]) -> None:
        self._file.write(to_json({"step": step, **values}) + "\n")
        self._file.flush()
        for tracker in list(self._trackers):
            try:
                tracker.write(step, values)
            except Exception as error:  # of somebody else's library, or the server behind it: no reason to stop
                self._trackers.remove(tracker)
                self.say(f"warning: {tracker.name} failed at step {step} and is left out from here: {describe(error)}")

    def say(self, message: str) -> None:
        if not self._is_main:
            return
        if self._view is not None:
            self._view.say(message)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self._is_main:
            return
        if self._view is not None:
            self._view.stop()
            self._view = None
        self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                self.say(f"warning: {tracker.name} did not end well: {describe(error)}")
