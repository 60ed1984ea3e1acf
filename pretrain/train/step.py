"""One training step, to be read in one sitting.

Nothing of ours in it waits for the device. (DeepSpeed reads a few scalars in its own step, and a transformers text
tower looks at its padding mask.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import EmaTeacher, TrainConfig
from pretrain.data.batch import Batch
from pretrain.data.plan import step_seed
from pretrain.distributed import comm
from pretrain.distributed.engine import Engine, full_tensors
from pretrain.models.dual_encoder import DualEncoder, Encoded
from pretrain.models.masked import Teacher
from pretrain.models.towers import PixelNormaliser
from pretrain.objectives.base import Objective, Term
from pretrain.objectives.features import gather_features
from pretrain.train.schedule import ema_momentum, learning_rate


@dataclass
class Trainer:
    """What a step needs. `teacher` is set where a masked-latent term is."""

    config: TrainConfig
    engine: Engine
    model: DualEncoder  # the module inside the engine
    normalise: PixelNormaliser
    objectives: list[Objective]
    teacher: Teacher | None
    ema: EmaTeacher | None
    max_log_scale: float


def training_step(trainer: Trainer, batch: Batch, step: int) -> tuple[Tensor, dict[str, Term]]:
    """Updates the weights; returns (W x this rank's share of the total loss, the terms by kind)."""
    config = trainer.config
    torch.manual_seed(step_seed(config.seed, step, comm.rank()))  # dropout: a function of the step, not of history

    image_BCHW = trainer.normalise(batch.image_BCHW)
    target_BTW = None if trainer.teacher is None else trainer.teacher(batch.image_BCHW)
    encoded = Encoded(**trainer.engine(image_BCHW, batch))
    features = gather_features(encoded, batch, target_BTW)

    terms = {objective.kind: objective(features) for objective in trainer.objectives}
    loss = torch.stack([objective.weight * terms[objective.kind].loss for objective in trainer.objectives]).sum()

    trainer.engine.backward(loss)
    trainer.engine.step(learning_rate(config.optimizer, step, config.num_steps))
    trainer.engine.clamp_(trainer.model.logit_scale, trainer.max_log_scale)
    if trainer.teacher is not None and trainer.ema is not None:
        student = full_tensors(trainer.engine, trainer.model.visual)
        trainer.teacher.follow(student, ema_momentum(trainer.ema, step, config.num_steps))
    return loss.detach(), terms
