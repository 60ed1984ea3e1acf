"""Image-text retrieval from features, exact where several images share one caption.

Shapes: N images, U distinct texts, D embedding width. Features are unit vectors.

The rank of a query is the number of wrong items at least as similar as its best right one, so ties count against the
model and a collapsed encoder scores 0, not 1. Recall@k is the share of queries with rank < k; reported median ranks
count from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.statistics import Estimate, Floats, Ints, bootstrap_interval, check_features, check_indices

#: Cosines closer than this are a tie. The product of one pair differs in its last bits with the chunk it is computed
#: in; without a tolerance the ranks of repeated images would depend on the chunk size.
TIE_TOLERANCE = 1e-9


def retrieval_ranks(
    image_features: Floats, text_features: Floats, owner_text: Ints, *, chunk_size: int = 256
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks from 0 of each image's own text among the texts (N,), and of each text's best owner among the images (U,).

    A text that no image owns is a candidate but not a query: its rank is -1. Memory is chunk_size x U float64; the
    N x U similarities never exist at once.

    image_features: (N, D) unit. text_features: (U, D) unit, distinct strings. owner_text: (N,) integers in [0, U).
    Raises InputError for shapes that do not fit, values that are not finite or owners outside the texts.
    """
    owner = _check(image_features, text_features, owner_text)
    if chunk_size < 1:
        raise InputError(f"chunk_size: must be at least 1, got {chunk_size}")
    num_images, num_texts = len(image_features), len(text_features)
    images, texts = image_features.astype(np.float64), text_features.astype(np.float64)
    own_similarity = np.einsum("nd,nd->n", images, texts[owner])
    best_similarity = np.full(num_texts, np.inf)  # nothing reaches a text without owners
    best_similarity[owner] = -np.inf
    np.maximum.at(best_similarity, owner, own_similarity)

    image_rank = np.empty(num_images, dtype=np.int64)
    text_rank = np.zeros(num_texts, dtype=np.int64)
    for start in range(0, num_images, chunk_size):
        rows = slice(start, start + chunk_size)
        similarity = images[rows] @ texts.T
        similarity[np.arange(len(similarity)), owner[rows]] = -np.inf  # what is left is wrong, in both directions
        image_rank[rows] = (similarity >= own_similarity[rows, None] - TIE_TOLERANCE).sum(axis=1)
        text_rank += (similarity >= best_similarity - TIE_TOLERANCE).sum(axis=0)
    text_rank[np.isinf(best_similarity)] = -1
    return image_rank, text_rank


def retrieval_metrics(
    image_features: Floats,
    text_features: Floats,
    owner_text: Ints,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 256,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """image_to_text_recall@k, text_to_image_recall@k, both median ranks, and mean_recall: the mean of all recalls.

    A text is found when any of its images is among the first k. `n` is the number of queries; texts without an image
    are no queries. With k at or above the number of candidates recall is 1 by definition: see `chance_levels`.
    Intervals resample a text together with all its images, since a caption and its images are right or wrong together.
    Arguments and errors as for `retrieval_ranks`.
    """
    image_rank, text_rank = retrieval_ranks(image_features, text_features, owner_text, chunk_size=chunk_size)
    queries = np.flatnonzero(text_rank >= 0)
    text_rank = text_rank[queries]

    def estimate(statistic: Any, arrays: list[NDArray[Any]], groups: NDArray[Any]) -> Estimate:
        return bootstrap_interval(
            statistic, arrays, groups=groups, num_resamples=num_resamples, confidence=confidence, seed=seed
        )

    metrics: dict[str, Estimate] = {}
    for direction, rank, text in (("image_to_text", image_rank, owner_text), ("text_to_image", text_rank, queries)):
        for k in ks:
            metrics[f"{direction}_recall@{k}"] = estimate(np.mean, [rank < k], text)
        metrics[f"{direction}_median_rank"] = estimate(np.median, [rank + 1], text)
    # a query's mean over k of its hits; then the mean over queries, each direction with half the weight
    hits = np.mean([np.concatenate([image_rank, text_rank]) < k for k in ks], axis=0)
    is_image = np.arange(len(hits)) < len(image_rank)
    metrics["mean_recall"] = estimate(_mean_of_directions, [hits, is_image], np.concatenate([owner_text, queries]))
    return metrics


def chance_levels(owner_text: Ints, num_texts: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Expected recalls of a random order of the candidates; same keys as `retrieval_metrics`, medians left out."""
    num_images = len(owner_text)
    num_owners = np.bincount(owner_text, minlength=num_texts)
    levels: dict[str, float] = {}
    for k in ks:
        levels[f"image_to_text_recall@{k}"] = min(k, num_texts) / num_texts
    for k in ks:
        drawn = min(k, num_images)
        # hypergeometric: the chance that none of a text's m images is among those drawn
        found = [1 - comb(num_images - m, drawn) / comb(num_images, drawn) for m in num_owners.tolist() if m]
        levels[f"text_to_image_recall@{k}"] = float(np.mean(found))
    return levels | {"mean_recall": float(np.mean(list(levels.values())))}


def _mean_of_directions(hits: Floats, is_image: NDArray[np.bool_]) -> float:
    return float((hits[is_image].mean() + hits[~is_image].mean()) / 2)


def _check(image_features: Floats, text_features: Floats, owner_text: Ints) -> NDArray[np.int64]:
    check_features(image_features, "image features")
    check_features(text_features, "text features")
    if image_features.shape[1] != text_features.shape[1]:
        raise InputError(f"image features have width {image_features.shape[1]}, text features {text_features.shape[1]}")
    remedy = "each image must own one of the texts"
    return check_indices(owner_text, "owner_text", len(image_features), len(text_features), remedy)
