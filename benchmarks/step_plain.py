"""The parts of `benchmarks.step` around the plain step: beside open_clip, and what masked latent adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn as nn
from open_clip.loss import ClipLoss
from torch import Tensor

from benchmarks.side_by_side import in_turns
from benchmarks.step_common import Row, Sizes, Timer, make_row, our_step, train_config
from benchmarks.step_workload import Workload
from pretrain.config import BlockMask, ClipObjective, FrozenTeacher, MaskedLatentObjective, ObjectiveConfig
from pretrain.data.batch import Batch
from pretrain.data.reader import BatchDataset
from pretrain.distributed.optimizer import build_optimizer
from pretrain.models.open_clip_config import read_open_clip_config
from pretrain.train.schedule import learning_rate
from pretrain.train.state import build_trainer
from pretrain.train.trainer import Trainer


class BareLoop:
    """open_clip's own model and loss with our trainer's weights and optimizer settings, in a loop of a few lines."""

    def __init__(self, trainer: Trainer) -> None:
        model_cfg = read_open_clip_config(trainer.config.model.name).model_cfg
        self.model = open_clip.CLIP(**model_cfg)
        state = {name.removeprefix("text."): tensor for name, tensor in trainer.model.state_dict().items()}
        self.model.load_state_dict({**state, "logit_scale": state["logit_scale"].squeeze(0)})
        self.model.train()
        self.config = trainer.config
        self.optimizer = build_optimizer(self.model, trainer.config.optimizer, {})
        self.loss = ClipLoss()

    def step(self, image_BCHW: Tensor, token_BL: Tensor, step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.config.steps)
        self.optimizer.zero_grad()
        loss: Tensor = self.loss(*self.model(image_BCHW, token_BL))
        loss.backward()
        if self.config.optimizer.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6052)
        return loss


def read_plain(reader: BatchDataset, num_rounds: int, num_images: int) -> list[Batch]:
    """One batch a round, each with as many captions as images: `ClipLoss` takes a repeated one for a negative."""
    batches: list[Batch] = []
    number = 0
    while len(batches) < num_rounds:
        batch = reader[number]
        number += 1
        if batch.num_texts == num_images:
            batches.append(batch)
    return batches


def vs_open_clip(folder: Path, workload: Workload, sizes: Sizes) -> list[Row]:
    """Packing off: one bucket, padded to the context."""
    num_rounds, num_images, no_packing = sizes.num_rounds_near, sizes.num_images_plain, (77,)
    terms = [ClipObjective()]
    config = train_config(folder, workload.as_prepared, sizes.tower_77, terms, num_images, text_bucket_edges=no_packing)
    trainer, reader = build_trainer(config, torch.device("cpu"))
    reader.tokenizer.can_trim = False
    batches = read_plain(reader, num_rounds, num_images)
    bare = BareLoop(trainer)
    images = [trainer.normalise(batch.image_BCHW).contiguous() for batch in batches]  # as its loader gives them
    tokens = [batch.packed[0].bucket_tokens[0][batch.packed[0].order_R[batch.text_BK[:, 0]]] for batch in batches]
    timer = Timer("vs_open_clip")
    sides = (
        timer.side("open_clip", lambda n: bare.step(images[n], tokens[n], n)),
        timer.side("ours", lambda n: our_step(trainer, batches[n], n)),
    )
    in_turns(sides, 1)  # AdamW's moments are made
    rounds = in_turns(sides, num_rounds)
    timer.check("ours", "open_clip")
    return [make_row("vs_open_clip", [(theirs, ours) for theirs, ours in rounds], lambda theirs, ours: ours / theirs)]


def masked_latent(folder: Path, workload: Workload, sizes: Sizes) -> list[Row]:
    """Against the plain contrastive step: with masked latent beside it, and with both on the masked view."""
    num_rounds, num_images = sizes.num_rounds_near, sizes.num_images_plain
    masked = MaskedLatentObjective(
        teacher=FrozenTeacher(name=sizes.tower_77), mask=BlockMask(ratio=0.5, min_num_patches=sizes.min_block)
    )
    terms: dict[str, list[ObjectiveConfig]] = {
        "plain": [ClipObjective()],
        "masked latent": [ClipObjective(), masked],
        "shared view": [ClipObjective(), masked.model_copy(update={"share_view": True})],
    }
    timer = Timer("masked_latent")

    def side(name: str) -> Callable[[int], float]:
        config = train_config(folder, workload.as_prepared, sizes.tower_77, terms[name], num_images)
        trainer, reader = build_trainer(config, torch.device("cpu"))
        batches = read_plain(reader, num_rounds, num_images)
        return timer.side(name, lambda n: our_step(trainer, batches[n], n))

    sides = [side(name) for name in terms]
    in_turns(sides, 1)
    rounds = in_turns(sides, num_rounds)
    return [
        make_row("masked_latent_cost", [(a, b) for a, b, _ in rounds], lambda plain, both: (both - plain) / plain),
        make_row("joint_view_cost", [(a, b) for a, _, b in rounds], lambda plain, both: both / plain),
    ]
