"""Builds a run from its config: reader, towers, objectives, engine. Everything that can be refused is refused here."""

from __future__ import annotations

import math

import numpy as np
import torch

from data_prep.errors import InputError
from data_prep.schema import ASPECTS, Aspect, Sample
from pretrain.config import DataConfig, EmaTeacher, FrozenTeacher, LocalAlignmentObjective, SiglipObjective, TrainConfig
from pretrain.data.diagnoses import build_diagnosis_table
from pretrain.data.manifest import ShardedDataset
from pretrain.data.masks import check_mask
from pretrain.data.reader import BatchDataset, ReaderSpec
from pretrain.data.staging import stage
from pretrain.data.streaming import Reader, StreamReader, check_stream, first_samples, stream_steps_per_epoch
from pretrain.data.texts import choose_bucket_edges
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import TrainTransform
from pretrain.distributed import comm
from pretrain.distributed.engine import build_engine
from pretrain.models.build import PixelNormaliser, build_open_clip, build_tokenizer, image_px
from pretrain.models.dual_encoder import DualEncoder, Needs
from pretrain.models.layers import learning_rate_scales
from pretrain.models.masked import Teacher, build_predictor, ema_teacher, frozen_teacher
from pretrain.objectives.build import build_objectives, find_masked_latent
from pretrain.objectives.masked_latent import MaskedLatent
from pretrain.train.trainer import Trainer

_NUM_SAMPLES_FOR_EDGES = 512


def open_train_data(config: DataConfig) -> ShardedDataset:
    return ShardedDataset(config.train_dir, with_tars=config.stream is None)


def with_num_steps(config: TrainConfig, num_ranks: int | None = None) -> TrainConfig:
    """`num_epochs` turned into `num_steps`, from the number of samples, and of ranks where shards are dealt to them."""
    if config.num_epochs is None:
        return config
    data = open_train_data(config.data)
    steps_per_epoch = len(data) // config.global_batch_size
    if config.data.stream is not None:
        num_ranks = num_ranks or comm.world_size()
        check_stream(data, config.data, config.global_batch_size, num_ranks)
        steps_per_epoch = stream_steps_per_epoch(data.shard_sizes, config.global_batch_size, num_ranks)
    num_steps = config.num_epochs * steps_per_epoch
    if num_steps <= config.optimizer.warmup_steps:
        raise InputError(
            f"num_epochs: {config.num_epochs} epochs of {config.data.train_dir} are {num_steps} steps, no more than "
            f"optimizer.warmup_steps ({config.optimizer.warmup_steps}); lower those, or global_batch_size"
        )
    return config.model_copy(update={"num_steps": num_steps, "num_epochs": None})


def build_dual_encoder(config: TrainConfig, load_pretrained: bool = True) -> DualEncoder:
    """Weights are drawn from the config's seed, so every rank starts equal. CPU, fp32."""
    torch.manual_seed(config.seed)
    sigmoid = any(isinstance(objective, SiglipObjective) for objective in config.objectives)
    clip = build_open_clip(config.model, load_pretrained, with_logit_bias=sigmoid)
    masked = find_masked_latent(config.objectives)
    contrastive = build_objectives(config.objectives)
    needs = Needs(
        contrastive=bool(contrastive),
        image=any(objective.label != getattr(_local_alignment(config), "label", None) for objective in contrastive),
        patches=_local_alignment(config) is not None,
        share_view=masked is not None and masked.share_view,
    )
    return DualEncoder(clip, config.model, needs)


def _local_alignment(config: TrainConfig) -> LocalAlignmentObjective | None:
    return next((o for o in config.objectives if isinstance(o, LocalAlignmentObjective)), None)


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
    model.predictor = build_predictor(model.visual, teacher, masked)
    return teacher


def resolve_bucket_edges(config: TrainConfig, data: ShardedDataset, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Edges of the text buckets: from the config, or from a fixed sample of the manifest's texts."""
    aspects = aspects_read(config)
    if not tokenizer.can_trim or not aspects:
        return (tokenizer.context_length,)
    if config.data.text_bucket_edges is not None:
        check_bucket_edges(config.data.text_bucket_edges, tokenizer.context_length)
        return tuple(sorted(set(config.data.text_bucket_edges) | {tokenizer.context_length}))
    samples = _samples_for_edges(config.data, data)
    num_batches = max(1, len(samples) // config.global_batch_size)
    texts = [
        text
        for first in range(num_batches)  # as a batch has them: distinct within it, repeated over batches
        for text in {
            caption.text
            for sample in samples[first::num_batches]
            for caption in sample.captions
            if caption.aspect in aspects
        }
    ]
    lengths = np.array([len(ids) for ids in tokenizer.encode(texts)])
    return choose_bucket_edges(lengths, config.data.num_text_buckets, tokenizer.context_length)


def _samples_for_edges(config: DataConfig, data: ShardedDataset) -> list[Sample]:
    """Evenly spaced over the data; of a stream its first ones, which rank 0 reads for all."""
    if config.stream is None:
        positions = np.linspace(0, len(data) - 1, num=min(len(data), _NUM_SAMPLES_FOR_EDGES)).astype(int)
        return [sample for position in positions if (sample := data.sound_sample(int(position))) is not None]
    stream = config.stream
    samples: list[Sample] = comm.decided_by_rank_0(lambda: first_samples(data, stream, _NUM_SAMPLES_FOR_EDGES))
    return samples


def has_soft_targets(config: TrainConfig) -> bool:
    return any(getattr(objective, "ontology", None) is not None for objective in config.objectives)


def check_soft_targets(config: TrainConfig) -> None:
    if has_soft_targets(config) and config.data.stream is not None:
        raise InputError("objectives: `ontology` reads samples all over the data, which data.stream cannot; remove one")


def check_bucket_edges(edges: tuple[int, ...], context_length: int) -> None:
    """Raises InputError for an edge that no text can reach."""
    if max(edges, default=0) > context_length:
        raise InputError(
            f"data.text_bucket_edges: {max(edges)} is over the tokenizer's context of {context_length}; leave it out"
        )


def aspects_read(config: TrainConfig) -> tuple[Aspect, ...]:
    """Of the texts that some term needs the features of."""
    read = frozenset[Aspect]().union(*(objective.aspects_read for objective in config.objectives))
    return tuple(aspect for aspect in ASPECTS if aspect in read)


def num_parts(config: TrainConfig, num_ranks: int) -> int:
    """Micro-batches of a step on a rank. Raises InputError for a size that does not divide its images."""
    images_per_rank = config.global_batch_size // num_ranks
    size = config.micro_batch_size or images_per_rank
    if images_per_rank % size:
        raise InputError(
            f"micro_batch_size: {size} does not divide the {images_per_rank} images of a rank (global_batch_size "
            f"{config.global_batch_size} over {num_ranks} rank(s)); choose a divisor"
        )
    return images_per_rank // size


def build_reader(config: TrainConfig, model: DualEncoder, tokenizer: TextTokenizer) -> BatchDataset:
    """Of any step's batch; `build_trainer` makes a stream of it where the config says so."""
    data = open_train_data(config.data)
    check_stream(data, config.data, config.global_batch_size, comm.world_size())
    if config.data.stage_dir is not None:
        data = ShardedDataset(stage(config.data.train_dir, config.data.stage_dir))
    masked = find_masked_latent(config.objectives)
    if masked is not None:
        check_mask(masked.mask, tuple(model.visual.grid_size))
    soft_targets = has_soft_targets(config)
    check_soft_targets(config)
    spec = ReaderSpec(
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        shards_per_block=config.data.shards_per_block,
        bucket_edges=resolve_bucket_edges(config, data, tokenizer),
        aspects_by_term={objective.label: objective.aspects for objective in build_objectives(config.objectives)},
        aspects_read=aspects_read(config),
        diagnoses=build_diagnosis_table(data) if soft_targets else None,
        num_parts=num_parts(config, comm.world_size()),
        mask=None if masked is None else masked.mask,
        patch_grid=None if masked is None else tuple(model.visual.grid_size),
    )
    transform = TrainTransform(image_px(model.visual), config.data.augmentation)
    return BatchDataset(data, spec, transform, tokenizer, comm.rank(), comm.world_size())


def build_trainer(config: TrainConfig, device: torch.device) -> tuple[Trainer, Reader]:
    model = build_dual_encoder(config)
    model.check_batch_norm(comm.world_size(), num_parts(config, comm.world_size()), config)
    teacher = add_masked_latent(model, config)
    batches = build_reader(config, model, build_tokenizer(config.model, model.text))
    reader = batches if config.data.stream is None else StreamReader(batches, config.data)
    model.train()
    images_per_forward = config.global_batch_size // comm.world_size() // reader.spec.num_parts
    engine = build_engine(
        model, config.optimizer, learning_rate_scales(model, config.model), config.engine, images_per_forward, device
    )
    masked, local = find_masked_latent(config.objectives), _local_alignment(config)
    if teacher is not None and config.engine.precision != "fp32":
        # its weights stay fp32, so that an average can move them
        teacher.compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.precision]
    edges, limit = reader.spec.bucket_edges, config.model.max_logit_scale
    trainer = Trainer(
        # with the edges that were chosen, so that the checkpoint and the run's config.yaml hold them
        config=config.model_copy(update={"data": config.data.model_copy(update={"text_bucket_edges": edges})}),
        engine=engine,
        model=model,
        normalise=PixelNormaliser(model.visual, device, model.logit_scale.dtype),
        contrastive=build_objectives(config.objectives),
        masked_latent=None if masked is None else MaskedLatent(masked),
        teacher=None if teacher is None else teacher.to(device),
        ema=masked.teacher if masked is not None and isinstance(masked.teacher, EmaTeacher) else None,
        sigma=None if local is None else local.sigma,
        max_log_scale=None if limit is None or not model.needs.contrastive else math.log(limit),
    )
    return trainer, reader
