"""Losses that are not finite, or spikes: named with step and samples, then handled as `bad_steps` says."""

from __future__ import annotations

import math

from torch import Tensor

from data_prep.errors import InputError
from pretrain.config import BadStepConfig
from pretrain.data.batch import Batch
from pretrain.train.record import RunRecord


class GoBack(Exception):  # noqa: N818 (nothing is wrong with the program)
    """To the newest checkpoint before this step, whose batch is passed over then."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


class Guard:
    """Watches the losses of a run without waiting for the device between logged steps."""

    def __init__(self, config: BadStepConfig, record: RunRecord) -> None:
        self.config, self.record = config, record

    def note(self, step: int, loss: Tensor, batch: Batch) -> None:
        """After each step."""

    def check(self, done: int, values: dict[str, float]) -> None:
        """On logged steps. Raises InputError, or GoBack."""
        if not math.isfinite(values["loss"]):
            raise InputError(
                f"step {done}: the loss is {values['loss']}; lower optimizer.lr, or remove the "
                "newest checkpoints and go on"
            )

    def check_before_saving(self) -> None:
        """A checkpoint must not hold the weights of a bad step that was not logged yet."""
