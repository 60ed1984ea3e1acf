"""Metrics of a run: JSON Lines for programs, a line or a live bar for people, a picture of the curves."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.distributed import comm
from pretrain.objectives.base import Term


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records; a last line that was torn by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not JSON; remove it to go on") from None
    return records


class MetricsLog:
    """Rank 0's `metrics.jsonl` and terminal; the other ranks' calls do nothing.

    On resume the lines past the checkpoint are dropped: those steps are done again.
    """

    def __init__(self, run_dir: Path, first_step: int, num_steps: int) -> None:
        self._is_main = comm.rank() == 0
        if not self._is_main:
            return
        path = run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._num_steps = num_steps
        self._started, self._first_step = time.monotonic(), first_step
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._bar.start()
            self._task = self._bar.add_task("training", total=num_steps, completed=first_step)

    def advance(self, step: int) -> None:
        if self._is_main and self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """`step` steps are done."""
        if not self._is_main:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3f}" for name, value in values.items() if name.startswith("loss")
        )
        rate = (step - self._first_step) / (time.monotonic() - self._started)
        left_s = (self._num_steps - step) / max(rate, 1e-9)
        line = f"step {step}/{self._num_steps}  {losses}  {values['samples_per_s']:.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=losses)
        else:
            print(f"{line}  {left_s:.0f} s left", file=sys.stderr, flush=True)

    def write_validation(self, step: int, values: dict[str, float]) -> None:
        """`step` steps are done. A record of its own in metrics.jsonl, with `val/...` names."""

    def say(self, message: str) -> None:
        if self._is_main:
            (self._bar.console.print if self._bar is not None else lambda m: print(m, file=sys.stderr, flush=True))(
                message
            )

    def close(self) -> None:
        if self._is_main:
            if self._bar is not None:
                self._bar.stop()
            self._file.close()
