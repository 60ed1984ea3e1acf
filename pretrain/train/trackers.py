"""Where metrics go beside metrics.jsonl."""

from __future__ import annotations

from typing import Protocol

from pretrain.config import TrainConfig


class Tracker(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def open_trackers(config: TrainConfig, first_step: int) -> list[Tracker]:
    """On rank 0. Raises InputError, with the remedy, for one that is not installed."""
    return []
