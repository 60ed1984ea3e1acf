"""What a step reads of the captions: counted in the index, and tokenised on a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.schema import ASPECT_CODE, MAX_CAPTIONS, NO_ASPECT_CODE, Aspect
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.plan import ORDER_DOMAIN, generator
from pretrain.data.texts import pack, plan_texts
from pretrain.data.tokenize import TextTokenizer
from pretrain.objectives.build import build_objectives
from pretrain.train.state import aspects_read, resolve_bucket_edges

_MAX_COUNTED = 1_000_000  # samples of which the valid captions are counted, evenly spaced
_MAX_TOKENISED = 512  # images of the batch whose texts are tokenised


@dataclass(frozen=True)
class TermSize:
    """What a contrastive term works on, of a global batch."""

    captions: float  # valid slots under its aspects
    columns: float  # the distinct strings among them


@dataclass(frozen=True)
class CaptionFigures:
    """Of a global batch. Where the data are fewer than a batch, of all samples, scaled to the batch."""

    num_slots: int  # K = 11 an image, as they stand in the index
    captions_per_image: float  # valid ones, whatever their aspect, over the data set
    captions: float  # of a step: valid slots under the aspects that some term reads
    texts: float  # of a step: the distinct strings among them, each encoded once
    max_texts_of_a_rank: float
    terms: dict[str, TermSize]  # by label
    is_scaled: bool  # the data hold fewer samples than a batch


@dataclass(frozen=True)
class TokenFigures:
    """Of a global batch, from the texts of a sample of it."""

    tokens_per_text: float  # start and end tokens included, cut at the context
    truncated_fraction: float
    tokens: float  # of the distinct texts of a step, without padding
    packed_tokens: float  # with the padding of the length buckets: what the text tower computes
    padded_tokens: float  # were all slots encoded at the full context
    bucket_edges: tuple[int, ...]


def sample_batch(data: ShardedDataset, config: TrainConfig) -> NDArray[np.int64]:
    """(n,) positions of one batch as the reader's order mixes them: n = `global_batch_size`, or all there are.

    The first batch of the run where one block of shards holds it, else one like it: the order of an epoch of many
    millions of samples is not worked out for this.
    """
    random, sizes = generator(ORDER_DOMAIN, config.seed, 0), data.shard_sizes
    shards = random.permutation(len(sizes))
    enough = int(np.searchsorted(np.cumsum(sizes[shards]), config.global_batch_size)) + 1
    members = shards[: max(enough, config.data.shards_per_block)]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    block = np.concatenate([np.arange(starts[s], starts[s] + sizes[s], dtype=np.int64) for s in members])
    return random.permutation(block)[: config.global_batch_size]


def caption_figures(data: ShardedDataset, config: TrainConfig, num_ranks: int) -> CaptionFigures:
    step = -(-len(data) // _MAX_COUNTED)
    per_image = float((data.index["text_aspect"][::step] != NO_ASPECT_CODE).sum(1).mean())
    aspects, sample_N = aspects_read(config), sample_batch(data, config)
    sample_N = sample_N[: max(1, len(sample_N) // num_ranks) * num_ranks] if len(sample_N) >= num_ranks else sample_N
    rows_N, scale = data.index[sample_N], config.global_batch_size / len(sample_N)
    num_texts, largest = 0, 0
    if aspects:
        ranks = num_ranks if len(sample_N) >= num_ranks else 1
        plan = plan_texts(rows_N["text_hash"], rows_N["text_aspect"], ranks, aspects)
        num_texts, largest = plan.num_texts, int(plan.num_texts_by_rank.max())

    def size(used: tuple[Aspect, ...]) -> TermSize:
        is_used = np.isin(rows_N["text_aspect"], [ASPECT_CODE[aspect] for aspect in used])
        return TermSize(int(is_used.sum()) * scale, len(np.unique(rows_N["text_hash"][is_used])) * scale)

    return CaptionFigures(
        num_slots=MAX_CAPTIONS,
        captions_per_image=per_image,
        captions=size(aspects).captions,
        texts=num_texts * scale,
        max_texts_of_a_rank=largest * scale,
        terms={term.label: size(term.aspects) for term in build_objectives(config.objectives)},
        is_scaled=len(data) < config.global_batch_size,
    )


def token_figures(
    data: ShardedDataset, config: TrainConfig, captions: CaptionFigures, tokenizer: TextTokenizer, num_parts: int
) -> TokenFigures:
    """Tokenises the texts of a sample, packs them as the reader does, and scales both to the texts of a step."""
    aspects: set[Aspect] = set(aspects_read(config))
    sample_N = sample_batch(data, config)[:_MAX_TOKENISED]
    texts = {
        caption.text
        for position in sample_N
        if (sample := data.sound_sample(int(position))) is not None
        for caption in sample.captions
        if caption.aspect in aspects
    }
    ids = tokenizer.encode(sorted(texts))
    edges = resolve_bucket_edges(config, data, tokenizer)
    parts = np.array_split(np.arange(len(ids)), max(1, min(num_parts, len(ids))))
    packed = [pack([ids[text] for text in part], edges, tokenizer.pad_id, tokenizer.can_trim) for part in parts]
    computed = sum(tokens.numel() for part in packed for tokens in part.bucket_tokens)
    scale = captions.texts / max(1, len(ids))
    return TokenFigures(
        tokens_per_text=sum(map(len, ids)) / max(1, len(ids)),
        truncated_fraction=sum(map(tokenizer.is_full, ids)) / max(1, len(ids)),
        tokens=sum(map(len, ids)) * scale,
        packed_tokens=computed * scale,
        padded_tokens=float(config.global_batch_size * MAX_CAPTIONS * tokenizer.context_length),
        bucket_edges=edges,
    )
