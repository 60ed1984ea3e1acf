"""Which distinct texts a global batch holds, who owns them, which rank encodes them, and how they are packed.

Pure functions of numpy arrays, run by the reader's processes a step ahead of the device. The manifest's index
holds the hash of every text, so each rank plans for all ranks without reading their samples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.schema import ASPECT_CODE, ASPECTS, NO_ASPECT_CODE, Aspect
from pretrain.data.batch import PackedTexts, TermColumns


@dataclass(frozen=True)
class TextPlan:
    """N images, K slots, U distinct texts, ordered by the first slot that holds them: so also by rank."""

    text_NK: NDArray[np.int64]  # into the U texts; U in a slot that is empty or that no term reads
    first_slot_U: NDArray[np.int64]  # flat position in (N, K) of the slot that supplies the text's string
    num_texts_by_rank: NDArray[np.int64]  # (W,): the lowest rank that holds a text encodes it

    @property
    def num_texts(self) -> int:
        return len(self.first_slot_U)

    def supplied_by(self, rank: int) -> slice:
        """The texts that `rank` encodes, a range of the U texts."""
        start = int(self.num_texts_by_rank[:rank].sum())
        return slice(start, start + int(self.num_texts_by_rank[rank]))

    def gathered_rows(self) -> NDArray[np.int64]:
        """(U,) row of each text after a gather in which every rank is padded to the largest count."""
        padded = int(self.num_texts_by_rank.max())
        return np.concatenate([rank * padded + np.arange(n) for rank, n in enumerate(self.num_texts_by_rank)])


def plan_texts(
    hash_NK: NDArray[np.uint64],
    aspect_NK: NDArray[np.uint8],
    world_size: int,
    aspects: Collection[Aspect] = ASPECTS,
) -> TextPlan:
    """Distinct texts under `aspects` of a global batch whose images lie rank-major.

    A text that stands under another aspect too is owned there as well; one that stands there alone is as if empty.
    """
    num_images, num_slots = hash_NK.shape
    is_read_NK = np.isin(aspect_NK, np.array([ASPECT_CODE[aspect] for aspect in aspects], dtype=np.uint8))
    is_read_NK |= (aspect_NK != NO_ASPECT_CODE) & np.isin(hash_NK, hash_NK[is_read_NK])
    valid = np.flatnonzero(is_read_NK.reshape(-1))
    _, first, inverse = np.unique(hash_NK.reshape(-1)[valid], return_index=True, return_inverse=True)
    by_first_slot = np.argsort(first)
    position = np.empty_like(by_first_slot)
    position[by_first_slot] = np.arange(len(by_first_slot))
    text_NK = np.full(num_images * num_slots, len(first), dtype=np.int64)
    text_NK[valid] = position[inverse]
    first_slot = valid[first[by_first_slot]].astype(np.int64)
    slots_per_rank = num_images // world_size * num_slots
    counts = np.bincount(first_slot // slots_per_rank, minlength=world_size).astype(np.int64)
    return TextPlan(text_NK.reshape(num_images, num_slots), first_slot, counts)


def plan_columns(
    plan: TextPlan, aspect_NK: NDArray[np.uint8], aspects_by_term: Mapping[str, Sequence[Aspect]]
) -> dict[str, TermColumns]:
    """For each contrastive term the texts that stand under one of its aspects anywhere in the global batch."""
    num_ranks, num_images = len(plan.num_texts_by_rank), len(plan.text_NK)
    # an image's text counts once, in the first slot that holds it, whatever its aspect: as in `once_per_text`
    pair_NK = np.arange(num_images)[:, None] * (plan.num_texts + 1) + plan.text_NK
    _, first_slot, pair = np.unique(pair_NK, return_index=True, return_inverse=True)
    columns = {}
    for term, aspects in aspects_by_term.items():
        used = np.isin(aspect_NK, [ASPECT_CODE[aspect] for aspect in aspects])
        texts = np.unique(plan.text_NK[used])
        column_of_text = np.full(plan.num_texts + 1, len(texts), dtype=np.int64)
        column_of_text[texts] = np.arange(len(texts))
        slots = np.sort(first_slot[np.unique(pair.reshape(used.shape)[used])])
        by_rank = np.bincount(slots // (used.size // num_ranks), minlength=num_ranks)
        columns[term] = TermColumns(
            text_C=torch.from_numpy(texts),
            column_of_text=torch.from_numpy(column_of_text),
            slot_M=torch.from_numpy(slots),
            num_slots_by_rank=by_rank.tolist(),
        )
    return columns


def pack(tokens: Sequence[NDArray[np.int64]], bucket_edges: Sequence[int], pad_id: int, trim: bool) -> PackedTexts:
    """Token ids of distinct texts into length buckets.

    Every bucket exists on every rank, with a dummy text where it is empty, so that ranks that gather parameters
    inside the text tower (ZeRO-3) run the same number of forwards.

    Args:
        tokens: unpadded ids, each at most `bucket_edges[-1]` long.
        bucket_edges: ascending upper edges of the lengths, fixed for the run.
        trim: cut a bucket at its own longest text; else pad it to its edge.

    Raises ValueError for a text longer than the last edge: it has no bucket.
    """
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    if len(lengths) and lengths.max() > bucket_edges[-1]:
        raise ValueError(f"a text of {lengths.max()} tokens is longer than the last bucket edge {bucket_edges[-1]}")
    bucket_of_text = np.searchsorted(np.asarray(bucket_edges), lengths)
    bucket_tokens, order, num_rows = [], np.zeros(len(tokens), dtype=np.int64), 0
    for bucket, edge in enumerate(bucket_edges):
        members = np.flatnonzero(bucket_of_text == bucket)
        width = int(lengths[members].max()) if trim and len(members) else 2 if trim else edge
        padded = np.full((max(1, len(members)), width), pad_id, dtype=np.int64)
        for row, text in enumerate(members.tolist()):
            padded[row, : lengths[text]] = tokens[text]
        if not len(members):
            # a dummy must have an unpadded token (attention over nothing is NaN), and one of the vocabulary
            padded[0, :] = 0 if pad_id else 1
        order[members] = num_rows + np.arange(len(members))
        num_rows += len(padded)
        bucket_tokens.append(torch.from_numpy(padded))
    return PackedTexts(bucket_tokens, torch.from_numpy(order))


def choose_bucket_edges(lengths: NDArray[np.int64], num_buckets: int, context_length: int) -> tuple[int, ...]:
    """The ascending edges that pad a batch's texts to the fewest tokens; the last is the context.

    Args:
        lengths: token lengths of the distinct texts of a few batches (not of the manifest: short texts that stand
            in every batch count in each).
    """
    edges = [*range(1, context_length), context_length]
    below = np.searchsorted(np.sort(lengths), [0, *edges], side="right")
    ordered = np.concatenate([[0], np.sort(lengths)])

    def padded_tokens(first: int, last: int) -> int:
        """Of one bucket from edge `first` (exclusive, 0 = none) to edge `last`; it is trimmed to its longest text."""
        return int((below[last] - below[first]) * ordered[below[last]])

    # best[e] = (tokens, edges) of the texts up to edge e in at most so many buckets
    best: dict[int, tuple[int, tuple[int, ...]]] = {
        e: (padded_tokens(0, e), (edges[e - 1],)) for e in range(1, len(edges) + 1)
    }
    for _ in range(num_buckets - 1):
        best = {
            e: min(
                [best[e]] + [(best[f][0] + padded_tokens(f, e), (*best[f][1], edges[e - 1])) for f in range(1, e)],
                key=lambda choice: choice[0],
            )
            for e in best
        }
    return best[len(edges)][1]
