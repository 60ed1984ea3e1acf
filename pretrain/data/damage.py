"""Images that turn out undecodable while training: replaced, by a pure function, on every rank alike."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.batch import Batch
from pretrain.data.reader import BatchDataset


class Damage:
    """Replaces damaged samples and keeps their ledger, RUN_DIR/damaged.jsonl."""

    def __init__(self, reader: BatchDataset, run_dir: Path, max_fraction: float) -> None:
        self.reader = reader

    def replaced(self, batch: Batch, step: int) -> Batch:
        """The batch of this step with other samples in the place of damaged ones. All ranks call it."""
        return batch
