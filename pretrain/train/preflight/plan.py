"""`dermvlp train CONFIG --plan`: what a run will be, what it needs, and why it cannot work."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.plan import epoch_order
from pretrain.data.streaming import stream_steps_per_epoch
from pretrain.objectives.build import build_objectives
from pretrain.train.preflight.captions import CaptionFigures, TokenFigures, caption_figures, token_figures
from pretrain.train.preflight.checks import Findings, check_run, ranks_of
from pretrain.train.preflight.memory import (
    STAGES,
    Activations,
    Parts,
    activations,
    feature_bytes,
    logit_bytes,
    state_bytes,
)
from pretrain.train.preflight.towers import Count
from pretrain.train.preflight.traffic import Transfer, step_traffic
from pretrain.train.state import num_parts

_MAX_TIMED = 20_000_000  # samples of which an epoch's order is worked out here, to time it


@dataclass(frozen=True)
class Batch:
    """How a step is cut."""

    global_batch_size: int
    num_ranks: int
    images_per_rank: float
    num_parts: int  # micro-batches of a rank
    images_per_forward: float
    num_samples: int
    steps_per_epoch: int
    num_steps: int | None
    order_s: float | None  # to work out one epoch's order, once


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    stage: int  # as configured
    state: dict[int, Parts]  # by ZeRO stage, then by part
    activations: Activations
    activation_bytes: int  # of one forward
    counts_texts: bool  # False: their lengths are not known, and the activations are those of images alone
    logits: int
    features: int

    def total(self, stage: int) -> int:
        return sum(self.state[stage].values()) + self.activation_bytes + self.logits + self.features


@dataclass(frozen=True)
class Plan:
    run_dir: str
    precision: str
    batch: Batch
    parameters: dict[str, Count]
    knows_text_tower: bool
    captions: CaptionFigures | None
    tokens: TokenFigures | None
    memory: Memory | None
    traffic: list[Transfer] | None
    problems: list[str]
    warnings: list[str]
    not_checked: list[str]

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        if self.memory is not None:
            values["memory"]["total"] = {stage: self.memory.total(stage) for stage in self.memory.state}
        if self.traffic is not None:
            sent = [transfer.sent_bytes(self.batch.num_ranks) for transfer in self.traffic]
            values["traffic"] = [asdict(t) | {"sent_bytes": size} for t, size in zip(self.traffic, sent, strict=True)]
        return values


def make_plan(config: TrainConfig, num_ranks: int | None = None) -> Plan:
    """Figures of what could be looked at, beside every problem that was found.

    Args:
        num_ranks: by default what the launcher says, or the config.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = check_run(config, num_ranks or ranks_of(config), Path(folder))
        captions = tokens = memory = traffic = None
        batch = _batch(config, found)
        if found.data is not None:
            captions = caption_figures(found.data, config, found.num_ranks)
            tokens = _tokens(config, found, captions, batch)
        towers = found.towers
        counts = {} if towers is None else towers.counts()
        if towers is not None:
            memory = _memory(config, found, batch, captions, tokens)
            if captions is not None:
                texts = round(captions.max_texts_of_a_rank)
                traffic = step_traffic(config, counts, towers.embed_dim, texts, found.num_ranks, batch.num_parts)
        return Plan(
            run_dir=str(config.run_dir),
            precision=config.engine.precision,
            batch=batch,
            parameters=counts,
            knows_text_tower=towers is None or towers.knows_text,
            captions=captions,
            tokens=tokens,
            memory=memory,
            traffic=traffic,
            problems=found.problems,
            warnings=found.warnings,
            not_checked=found.not_checked,
        )


def _batch(config: TrainConfig, found: Findings) -> Batch:
    num_samples, steps_per_epoch, order_s = 0, 0, None
    if found.data is not None:
        num_samples = len(found.data)
        steps_per_epoch = num_samples // config.global_batch_size
        if config.data.stream is not None and found.num_ranks and config.global_batch_size % found.num_ranks == 0:
            sizes = found.data.shard_sizes
            steps_per_epoch = stream_steps_per_epoch(sizes, config.global_batch_size, found.num_ranks)
        if num_samples <= _MAX_TIMED:
            order_s = _time_of_order(config, found.data)
    images = config.global_batch_size / found.num_ranks
    try:
        parts = num_parts(config, found.num_ranks)
    except InputError:  # among the problems
        parts = 1
    return Batch(
        global_batch_size=config.global_batch_size,
        num_ranks=found.num_ranks,
        images_per_rank=images,
        num_parts=parts,
        images_per_forward=images / parts,
        num_samples=num_samples,
        steps_per_epoch=steps_per_epoch,
        num_steps=None if found.config is None else found.config.num_steps,
        order_s=order_s,
    )


def _time_of_order(config: TrainConfig, data: ShardedDataset) -> float:
    started = time.perf_counter()
    epoch_order(data.shard_sizes, config.seed, 0, config.data.shards_per_block)
    return time.perf_counter() - started


def _tokens(config: TrainConfig, found: Findings, captions: CaptionFigures, batch: Batch) -> TokenFigures | None:
    if found.tokenizer is None or found.data is None or config.data.stream is not None:
        return None
    try:
        return token_figures(found.data, config, captions, found.tokenizer, batch.num_parts)
    except InputError as error:
        found.refuse(str(error))
        return None


def _memory(
    config: TrainConfig, found: Findings, batch: Batch, captions: CaptionFigures | None, tokens: TokenFigures | None
) -> Memory:
    assert found.towers is not None
    counts, engine, ranks = found.towers.counts(), config.engine, found.num_ranks
    teacher = counts.get("teacher", Count()).total
    module = [count for part, count in counts.items() if part != "teacher"]
    whole = Count(sum(count.trained for count in module), sum(count.frozen for count in module))
    stages = STAGES if engine.kind == "deepspeed" else STAGES[:1]
    state = {stage: state_bytes(whole, teacher, engine, ranks, stage) for stage in stages}
    kept = activations(found.towers.model, config, found.towers.image_px, max(2, found.context_length))
    reads_texts = bool(build_objectives(config.objectives))
    logits = features = 0
    if captions is not None and reads_texts:
        images, sizes = config.global_batch_size, captions.terms
        logits = sum(logit_bytes(o, images, sizes[o.label], ranks) for o in config.objectives if o.label in sizes)
        columns = [size.columns for size in sizes.values()]
        features = feature_bytes(images, captions.texts, columns, found.towers.embed_dim)
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    return Memory(
        stage=stage,
        state=state,
        activations=kept,
        activation_bytes=_of_one_forward(kept, batch, tokens),
        counts_texts=tokens is not None or not reads_texts,
        logits=logits,
        features=features,
    )


def _of_one_forward(kept: Activations, batch: Batch, tokens: TokenFigures | None) -> int:
    """Images and texts together; in parts one after the other, so the larger."""
    images = round(kept.per_image * batch.images_per_forward)
    if tokens is None:
        return images
    texts = round(kept.per_token * tokens.packed_tokens / batch.num_ranks / batch.num_parts)
    return max(images, texts) if batch.num_parts > 1 else images + texts
