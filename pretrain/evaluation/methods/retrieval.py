"""Image-text retrieval from features: recall at k, median rank, mean recall, both ways, each with its interval.

Shapes: N images, U distinct texts, P pairs (an image and a text of its own), D embedding width. Features are unit
vectors. An image may have several texts and a text several images: see `retrieval_ranks` for what a rank is then.

Recall@k is the share of queries with rank < k; reported median ranks count from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pretrain.evaluation.methods.retrieval_ranks import check_pairs, retrieval_ranks
from pretrain.evaluation.metrics.statistics import Estimate, Floats, Groups, Ints, bootstrap_interval, group_codes

__all__ = [
    "chance_levels",
    "cumulative_match",
    "mean_recall",
    "rank_metrics",
    "resampling_groups",
    "retrieval_metrics",
    "retrieval_ranks",
]

_MAX_CURVE_POINTS = 100


@dataclass(frozen=True)
class ResamplingGroups:
    """Which queries are right or wrong together: an interval resamples whole groups.

    image_N, text_U: (N,), (U,) numbers of groups, counted over both. is_linked: an image and its texts share a group.
    """

    image_N: NDArray[np.int64]
    text_U: NDArray[np.int64]
    is_linked: bool


def usable_ks(ks: Sequence[int], num_images: int, num_texts: int) -> tuple[int, ...]:
    """Those below both numbers of candidates: at or above them recall is 1 for any model."""
    return tuple(k for k in ks if k < min(num_images, num_texts))


def retrieval_metrics(
    image_features: Floats,
    text_features: Floats,
    pairs: Ints,
    *,
    ks: Sequence[int],
    patients: Groups | None = None,
    chunk_size: int = 2048,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """image_to_text_recall@k, text_to_image_recall@k, both median ranks, and mean_recall: the mean of all recalls.

    A query is found when any of its own items is among the first k. `n` is the number of queries. With k at or above
    the number of candidates recall is 1 by definition: see `chance_levels`. Intervals: see `resampling_groups`.
    patients: (N,), of the images. Other arguments and errors as for `retrieval_ranks`.
    """
    image_rank, text_rank = retrieval_ranks(image_features, text_features, pairs, chunk_size=chunk_size)
    groups = resampling_groups(pairs, len(image_features), len(text_features), patients)
    return rank_metrics(
        image_rank, text_rank, groups, ks=ks, num_resamples=num_resamples, confidence=confidence, seed=seed
    )


def rank_metrics(
    image_rank: Ints,
    text_rank: Ints,
    groups: ResamplingGroups,
    *,
    ks: Sequence[int],
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The metrics of `retrieval_metrics` from ranks (N,) and (U,) that count from 0; -1 = not a query."""
    resampling: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    metrics: dict[str, Estimate] = {}
    for direction, ranks, group in (
        ("image_to_text", image_rank, groups.image_N),
        ("text_to_image", text_rank, groups.text_U),
    ):
        rank, of_query = ranks[ranks >= 0], group[ranks >= 0]
        for k in ks:
            metrics[f"{direction}_recall@{k}"] = bootstrap_interval(np.mean, [rank < k], groups=of_query, **resampling)
        metrics[f"{direction}_median_rank"] = bootstrap_interval(np.median, [rank + 1], groups=of_query, **resampling)
    metrics["mean_recall"] = mean_recall(image_rank, text_rank, groups, ks=ks, **resampling)
    return metrics


def mean_recall(
    image_rank: Ints, text_rank: Ints, groups: ResamplingGroups, *, ks: Sequence[int], **resampling: Any
) -> Estimate:
    """Mean of the recalls at `ks` in both directions. resampling: arguments of `bootstrap_interval`."""
    rank = np.concatenate([image_rank, text_rank])
    is_image = np.arange(len(rank)) < len(image_rank)
    is_query = rank >= 0
    # a query's mean over k of its hits; then the mean over queries, each direction with half the weight
    hits = np.mean([rank < k for k in ks], axis=0)
    group = np.concatenate([groups.image_N, groups.text_U])
    hits, is_image = hits[is_query], is_image[is_query]
    # strata: where texts are groups of their own, a resample must still hold some
    strata = is_image.astype(np.int64)
    return bootstrap_interval(
        _mean_of_directions, [hits, is_image], groups=group[is_query], strata=strata, **resampling
    )


def resampling_groups(pairs: Ints, num_images: int, num_texts: int, patients: Groups | None = None) -> ResamplingGroups:
    """One group holds whatever is linked by a caption or by a patient, directly or over others.

    A caption and its images are right or wrong together, and so are a patient's images. Where the links join more than
    half of the images (few generic captions over all patients) resampling such groups means nothing: then images are
    resampled by patient, texts one by one, and `is_linked` is False.
    """
    pair_P2 = check_pairs(pairs, num_images, num_texts)
    patient_N = np.arange(num_images) if patients is None else group_codes(patients)
    num_patients = int(patient_N.max()) + 1
    # nodes: images, then texts, then patients
    start = np.concatenate([pair_P2[:, 0], np.arange(num_images)])
    end = np.concatenate([num_images + pair_P2[:, 1], num_images + num_texts + patient_N])
    num_nodes = num_images + num_texts + num_patients
    links = coo_array((np.ones(len(start), dtype=bool), (start, end)), shape=(num_nodes, num_nodes))
    _, component = connected_components(links, directed=False)
    component = component.astype(np.int64)
    if np.bincount(component[:num_images]).max() <= max(num_images / 2, 1):
        return ResamplingGroups(component[:num_images], component[num_images : num_images + num_texts], is_linked=True)
    return ResamplingGroups(patient_N, num_patients + np.arange(num_texts), is_linked=False)


def chance_levels(
    pairs: Ints, num_texts: int, ks: Sequence[int] = (1, 5, 10), num_images: int | None = None
) -> dict[str, float]:
    """Expected recalls of a random order of the candidates; same keys as `retrieval_metrics`, medians left out.

    pairs: as for `retrieval_ranks`. num_images: of all candidates, where `pairs` is (P, 2).
    """
    num_images = len(pairs) if num_images is None else num_images
    image_P, text_P = check_pairs(pairs, num_images, num_texts).T
    levels: dict[str, float] = {}
    for direction, query_P, num_candidates in (
        ("image_to_text", image_P, num_texts),
        ("text_to_image", text_P, num_images),
    ):
        num_own, num_queries = np.unique(np.unique(query_P, return_counts=True)[1], return_counts=True)
        for k in ks:
            drawn = min(k, num_candidates)
            # hypergeometric: the chance that none of a query's m items is among those drawn
            missed = [comb(num_candidates - m, drawn) / comb(num_candidates, drawn) for m in num_own.tolist()]
            levels[f"{direction}_recall@{k}"] = float(1 - np.average(missed, weights=num_queries))
    return levels | {"mean_recall": float(np.mean(list(levels.values())))}


def cumulative_match(rank: Ints, num_candidates: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """k and recall@k, for up to 100 values of k spaced evenly in their logarithm, from 1 to all candidates.

    rank: from 0; -1 = not a query.
    """
    k = np.unique(np.geomspace(1, num_candidates, _MAX_CURVE_POINTS).round().astype(np.int64))
    rank = np.sort(rank[rank >= 0])
    return k, np.searchsorted(rank, k) / len(rank)


def _mean_of_directions(hits: Floats, is_image: NDArray[np.bool_]) -> float:
    return float((hits[is_image].mean() + hits[~is_image].mean()) / 2)
