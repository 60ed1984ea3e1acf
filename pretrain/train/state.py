"""Builds a run from its config: reader, towers, objectives, engine. Everything that can be refused is refused here."""

from __future__ import annotations

import math

import numpy as np
import torch

from data_prep.errors import InputError
from pretrain.config import EmaTeacher, FrozenTeacher, TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.masks import check_mask
from pretrain.data.reader import BatchDataset, ReaderSpec
from pretrain.data.texts import choose_bucket_edges
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import TrainTransform
from pretrain.distributed import comm
from pretrain.distributed.engine import build_engine
from pretrain.models.dual_encoder import DualEncoder
from pretrain.models.masked import Teacher, ema_teacher, frozen_teacher
from pretrain.models.towers import PixelNormaliser, build_open_clip, build_tokenizer, image_px, read_tower_config
from pretrain.objectives.build import build_objectives, find_masked_latent
from pretrain.train.step import Trainer

_NUM_SAMPLES_FOR_EDGES = 512


def build_dual_encoder(config: TrainConfig, load_pretrained: bool = True) -> DualEncoder:
    """Weights are drawn from the config's seed, so every rank starts equal. CPU, fp32."""
    torch.manual_seed(config.seed)
    needs_patches = any(objective.kind == "local_alignment" for objective in config.objectives)
    embed_dim = int(read_tower_config(config.model.name).model_cfg["embed_dim"])
    return DualEncoder(build_open_clip(config.model, load_pretrained), config.model, embed_dim, needs_patches)


def add_masked_latent(model: DualEncoder, config: TrainConfig) -> Teacher | None:
    """Gives the model its predictor and returns the teacher, where there is a masked-latent term."""
    masked = find_masked_latent(config.objectives)
    if masked is None:
        return None
    model.require_droppable_patches()
    if isinstance(masked.teacher, FrozenTeacher):
        teacher = frozen_teacher(masked.teacher, tuple(model.visual.grid_size))
    else:
        teacher = ema_teacher(model.visual)
    model.add_predictor(masked, teacher.visual.token_width)
    return teacher


def resolve_bucket_edges(config: TrainConfig, data: ShardedDataset, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Edges of the text buckets: from the config, or from a fixed sample of the manifest's texts."""
    if not tokenizer.can_trim:
        return (tokenizer.context_length,)
    if config.data.text_bucket_edges is not None:
        edges = sorted(set(config.data.text_bucket_edges) | {tokenizer.context_length})
        if edges[-1] > tokenizer.context_length:
            raise InputError(
                f"data.text_bucket_edges: {edges[-1]} is over the tokenizer's context of {tokenizer.context_length}"
            )
        return tuple(edges)
    positions = np.linspace(0, len(data) - 1, num=min(len(data), _NUM_SAMPLES_FOR_EDGES)).astype(int)
    num_batches = max(1, len(positions) // config.global_batch_size)
    texts = [
        text
        for first in range(num_batches)  # as a batch has them: distinct within it, repeated over batches
        for text in {c.text for position in positions[first::num_batches] for c in data.read_sample(position).captions}
    ]
    lengths = np.array([len(ids) for ids in tokenizer.encode(texts)])
    return choose_bucket_edges(lengths, config.data.num_text_buckets, tokenizer.context_length)


def build_reader(config: TrainConfig, model: DualEncoder, tokenizer: TextTokenizer) -> BatchDataset:
    data = ShardedDataset(config.data.train_dir)
    masked = find_masked_latent(config.objectives)
    if masked is not None:
        check_mask(masked.mask, tuple(model.visual.grid_size))
    spec = ReaderSpec(
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        shards_per_block=config.data.shards_per_block,
        bucket_edges=resolve_bucket_edges(config, data, tokenizer),
        aspects_by_term={o.kind: o.aspects for o in build_objectives(config.objectives) if o.aspects is not None},
        mask=None if masked is None else masked.mask,
        patch_grid=None if masked is None else tuple(model.visual.grid_size),
    )
    transform = TrainTransform(image_px(model.visual), config.data.augmentation)
    return BatchDataset(data, spec, transform, tokenizer, comm.rank(), comm.world_size())


def build_trainer(config: TrainConfig, device: torch.device) -> tuple[Trainer, BatchDataset]:
    model = build_dual_encoder(config)
    model.check_batch_norm(comm.world_size())
    teacher = add_masked_latent(model, config)
    reader = build_reader(config, model, build_tokenizer(config.model, model.text))
    model.train()
    engine = build_engine(model, config.optimizer, config.engine, config.global_batch_size // comm.world_size(), device)
    dtype = model.logit_scale.dtype
    masked = find_masked_latent(config.objectives)
    edges = reader.spec.bucket_edges
    trainer = Trainer(
        # with the edges that were chosen, so that the checkpoint and the run's config.yaml hold them
        config=config.model_copy(update={"data": config.data.model_copy(update={"text_bucket_edges": edges})}),
        engine=engine,
        model=model,
        normalise=PixelNormaliser(model.visual, device, dtype),
        objectives=build_objectives(config.objectives),
        teacher=None if teacher is None else teacher.to(device),
        ema=masked.teacher if masked is not None and isinstance(masked.teacher, EmaTeacher) else None,
        max_log_scale=math.log(config.model.max_logit_scale),
    )
    return trainer, reader
