"""One training step, to be read in one sitting.

Nothing of ours in it waits for the device (tests/unit/pretrain/test_no_synchronisation.py), unless bad steps are to be
skipped: the loss is read first then. DeepSpeed reads a few scalars in its own step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.data.plan import step_seed
from pretrain.distributed import comm
from pretrain.distributed.engine import full_tensors
from pretrain.models.dual_encoder import Encoded
from pretrain.objectives.base import Term
from pretrain.objectives.features import gather_features, gather_texts, select_regions, texts_of_slots
from pretrain.train.cached import backward_cached
from pretrain.train.schedule import ema_momentum, learning_rate
from pretrain.train.trainer import Trainer


def training_step(trainer: Trainer, batch: Batch, step: int) -> tuple[Tensor, dict[str, Term]]:
    """Updates the weights, or skips a bad step; returns (W x this rank's share of the total loss, terms by label)."""
    config, engine = trainer.config, trainer.engine
    in_parts = config.micro_batch_size not in (None, batch.image_BCHW.shape[0])
    loss, terms, learns = (backward_cached if in_parts else backward_whole)(trainer, batch, step)
    if not learns:
        return loss, terms
    engine.step(learning_rate(config.optimizer, step, config.steps))
    if trainer.max_log_scale is not None:
        engine.clamp_(trainer.model.logit_scale, trainer.max_log_scale)
    if trainer.teacher is not None and trainer.ema is not None:
        student = full_tensors(engine, trainer.model.visual)
        trainer.teacher.follow(student, ema_momentum(trainer.ema, step, config.steps))
    return loss, terms


def backward_whole(trainer: Trainer, batch: Batch, step: int) -> tuple[Tensor, dict[str, Term], bool]:
    """Gradients of one forward over this rank's whole share of the global batch; False: none, the step is bad."""
    torch.manual_seed(step_seed(trainer.config.seed, step, comm.rank()))  # dropout: of the step, not of history
    image_BCHW, packed = trainer.normalise(batch.image_BCHW), batch.packed[0] if trainer.contrastive else None
    encoded = Encoded(**trainer.engine(image_BCHW, packed, batch.visible_BV, batch.masked_BM))

    terms = {}
    if trainer.contrastive:
        text_UD = gather_texts(encoded.text_RD, batch)
        regions = None
        if trainer.sigma is not None:
            regions = select_regions(encoded.patch_BPD, texts_of_slots(text_UD, batch.text_BK), trainer.sigma)
        features = gather_features(batch, encoded.image_BD, text_UD, regions, encoded.logit_scale, encoded.logit_bias)
        terms = {objective.label: objective(features) for objective in trainer.contrastive}
    if trainer.masked_latent is not None and trainer.teacher is not None:
        term = trainer.masked_latent(encoded, trainer.teacher(batch.image_BCHW), batch.visible_BV, batch.masked_BM)
        terms[trainer.masked_latent.label] = term
    loss = trainer.total(terms)
    if learns := trainer.learns_from(step, loss, terms):
        trainer.engine.backward(loss)
    return loss.detach(), terms, learns
