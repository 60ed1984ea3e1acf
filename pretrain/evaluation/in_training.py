"""The evaluators, while training goes on: what `validation` in a run's config asks for."""

from __future__ import annotations

from pretrain.config import TrainConfig
from pretrain.train.trainer import Trainer, Validator


def make_validator(trainer: Trainer, config: TrainConfig) -> Validator | None:
    """None where the run has no validation. Raises InputError for a split that cannot be evaluated."""
    return None
