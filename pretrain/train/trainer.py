"""What a training step works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import EmaTeacher, TrainConfig
from pretrain.distributed.engine import Engine
from pretrain.models.build import PixelNormaliser
from pretrain.models.dual_encoder import DualEncoder
from pretrain.models.masked import Teacher
from pretrain.objectives.base import Objective, Term
from pretrain.objectives.masked_latent import MaskedLatent

#: () -> metrics by name: "val/loss", "val/loss/clip", "val/zero_shot/balanced_accuracy", ... All ranks call it together
#: and get the same values; towers are in training mode again afterwards
Validator = Callable[[], dict[str, float]]

#: (step, W x this rank's share of the loss, the terms by label) -> whether the step is bad. All ranks call it together
#: and get the same answer, for which the device is waited for
IsBad = Callable[[int, Tensor, dict[str, Term]], bool]


@dataclass
class Trainer:
    config: TrainConfig
    engine: Engine
    model: DualEncoder  # the module inside the engine
    normalise: PixelNormaliser
    contrastive: list[Objective]  # those that read Features
    masked_latent: MaskedLatent | None
    teacher: Teacher | None  # where there is a masked-latent term
    ema: EmaTeacher | None
    sigma: float | None  # of the local-alignment term, where there is one
    max_log_scale: float | None
    is_bad: IsBad | None = None  # where bad steps are skipped (train/guard.py)

    def total(self, terms: dict[str, Term]) -> Tensor:
        """The weighted sum of the terms' losses."""
        weights = {objective.label: objective.weight for objective in self.config.objectives}
        return torch.stack([weights[label] * term.loss for label, term in terms.items()]).sum()

    def learns_from(self, step: int, loss: Tensor, terms: dict[str, Term]) -> bool:
        """False for a bad step that is to be skipped."""
        return self.is_bad is None or not self.is_bad(step, loss, terms)
