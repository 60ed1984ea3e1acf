"""Ranks of retrieval, exactly as from all similarities in float64, without ever holding all of them.

Shapes: N images, U distinct texts, P pairs (an image and a text of its own), D embedding width; a tile has b images and
c texts. Features are unit vectors.

The rank of a query is the number of wrong items at least as similar as its best right one, so ties count against the
model and a collapsed encoder scores 0, not 1.

Similarities are computed in float32, tile by tile. Their error is bounded (`_error_bound`); what lies nearer to its
threshold than that is computed again in float64, so the bound costs time and never changes a rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.metrics.statistics import Floats, Ints, check_features, check_indices

#: Cosines closer than this are a tie. The product of one pair differs in its last bits with the tile it is computed
#: in; without a tolerance the ranks of repeated images would depend on the chunk size.
TIE_TOLERANCE = 1e-9

#: Above this share of a tile a whole product in float64 is cheaper than the doubtful pairs one by one.
_MAX_DOUBTFUL = 1 / 200
_PAIRS_AT_ONCE = 4096


def retrieval_ranks(
    image_features: Floats, text_features: Floats, pairs: Ints, *, chunk_size: int = 2048
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks from 0 of each image's best own text among the texts (N,), and of each text's best own image (U,).

    An image without a text, or a text without an image, is a candidate but not a query: its rank is -1. Of a query's
    own items the best counts; the others are neither right nor wrong. Memory is up to 20 bytes x chunk_size ** 2 beside
    the features in float32.

    image_features: (N, D) unit. text_features: (U, D) unit, distinct strings. pairs: (P, 2) integers, image and text;
    or (N,) integers, the one text of each image. chunk_size: images, and texts, of a tile.
    Raises InputError for shapes that do not fit, values that are not finite or pairs outside the features.
    """
    _check(image_features, text_features)
    if chunk_size < 1:
        raise InputError(f"chunk_size: must be at least 1, got {chunk_size}")
    num_images, num_texts = len(image_features), len(text_features)
    pair_P2 = check_pairs(pairs, num_images, num_texts)
    own_P = _similarities(image_features, text_features, pair_P2)
    search = _Search(
        image_features,
        text_features,
        _thresholds(own_P, pair_P2[:, 0], num_images),
        _thresholds(own_P, pair_P2[:, 1], num_texts),
    )
    for image in range(0, num_images, chunk_size):
        first, last = np.searchsorted(pair_P2[:, 0], (image, image + chunk_size))
        for text in range(0, num_texts, chunk_size):
            images, texts = slice(image, image + chunk_size), slice(text, text + chunk_size)
            search.count(images, texts, _pairs_of_tile(pair_P2[first:last], images, texts))
    return search.ranks()


def check_pairs(pairs: Ints, num_images: int, num_texts: int) -> NDArray[np.int64]:
    """`pairs` in either form as distinct (P, 2) int64, sorted by image, then text; or InputError with the first row
    that is wrong."""
    pairs = np.asarray(pairs)
    if pairs.ndim == 2 and pairs.shape[1] == 2:
        remedy = "each pair must name an image and a text of the features"
        image_P = check_indices(pairs[:, 0], "image of the pairs", len(pairs), num_images, remedy)
        text_P = check_indices(pairs[:, 1], "text of the pairs", len(pairs), num_texts, remedy)
    else:
        image_P = np.arange(num_images)
        text_P = check_indices(pairs, "owner_text", num_images, num_texts, "each image must own one of the texts")
    if len(image_P) == 0:
        raise InputError("pairs: none; at least one image must have a text")
    return np.stack(np.divmod(np.unique(image_P * num_texts + text_P), num_texts), axis=1)


class _Search:
    """Counts, over the tiles, the wrong items at or above each query's threshold, in both directions."""

    def __init__(
        self,
        image_ND: Floats,
        text_UD: Floats,
        image_threshold_N: NDArray[np.float64],
        text_threshold_U: NDArray[np.float64],
    ) -> None:
        self._exact = (image_ND, text_UD)
        self._image_ND = np.ascontiguousarray(image_ND, dtype=np.float32)
        self._text_UD = np.ascontiguousarray(text_UD, dtype=np.float32)
        self._threshold = (image_threshold_N, text_threshold_U)
        bound = _error_bound(image_ND.shape[1])
        self._sure = tuple((threshold + bound).astype(np.float32) for threshold in self._threshold)
        self._possible = tuple((threshold - bound).astype(np.float32) for threshold in self._threshold)
        self._rank = tuple(np.zeros(len(threshold), dtype=np.int64) for threshold in self._threshold)

    def count(self, images: slice, texts: slice, own: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
        """One tile. own: rows and columns of its right pairs, which count in neither direction."""
        similarity_bc = self._image_ND[images] @ self._text_UD[texts].T
        similarity_bc[own] = -np.inf
        tile = (images, texts)
        sure = [similarity_bc >= _along(self._sure[side][tile[side]], side) for side in (0, 1)]
        doubtful = [(similarity_bc >= _along(self._possible[side][tile[side]], side)) ^ sure[side] for side in (0, 1)]
        if sum(map(np.count_nonzero, doubtful)) > _MAX_DOUBTFUL * similarity_bc.size:
            similarity_bc = self._exact[0][images].astype(np.float64) @ self._exact[1][texts].astype(np.float64).T
            similarity_bc[own] = -np.inf
            sure = [similarity_bc >= _along(self._threshold[side][tile[side]], side) for side in (0, 1)]
        else:
            for side in (0, 1):
                self._count_exactly(images, texts, doubtful[side], side)
        for side in (0, 1):
            self._rank[side][tile[side]] += np.count_nonzero(sure[side], axis=1 - side)

    def _count_exactly(self, images: slice, texts: slice, doubtful_bc: NDArray[np.bool_], side: int) -> None:
        row, column = np.divmod(np.flatnonzero(doubtful_bc), doubtful_bc.shape[1])
        pair_Q2 = np.stack([images.start + row, texts.start + column], axis=1)
        query_Q = pair_Q2[:, side]
        is_above = _similarities(*self._exact, pair_Q2) >= self._threshold[side][query_Q]
        np.add.at(self._rank[side], query_Q[is_above], 1)

    def ranks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        image_rank, text_rank = (
            np.where(np.isinf(threshold), -1, rank) for threshold, rank in zip(self._threshold, self._rank, strict=True)
        )
        return image_rank, text_rank


def _along(values: Floats, side: int) -> Floats:
    """Values of the images of a tile as a column, of its texts as a row."""
    return values[:, None] if side == 0 else values


def _error_bound(width: int) -> float:
    """How far a product of two unit vectors in float32 can be from the one of their exact values.

    |fl(x.y) - x.y| <= width u / (1 - width u) sum |x_i y_i|, in whatever order it is summed (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); 2 u for rounding the features to float32 and u for the threshold;
    1.1 for the 2 % by which `check_features` lets a norm differ from 1.
    """
    unit_roundoff = 2.0**-24
    return 1.1 * (width + 8) * unit_roundoff


def _thresholds(own_P: NDArray[np.float64], query_P: NDArray[np.int64], num_queries: int) -> NDArray[np.float64]:
    """The similarity from which on a wrong item counts; -inf for what has no right one, and so no rank."""
    best = np.full(num_queries, -np.inf)
    np.maximum.at(best, query_P, own_P)
    return best - TIE_TOLERANCE


def _similarities(image_ND: Floats, text_UD: Floats, pair_Q2: NDArray[np.int64]) -> NDArray[np.float64]:
    """(Q,) of some pairs, in float64."""
    similarity = np.empty(len(pair_Q2))
    for start in range(0, len(pair_Q2), _PAIRS_AT_ONCE):
        image, text = pair_Q2[start : start + _PAIRS_AT_ONCE].T
        left, right = image_ND[image].astype(np.float64), text_UD[text].astype(np.float64)
        similarity[start : start + _PAIRS_AT_ONCE] = np.einsum("qd,qd->q", left, right)
    return similarity


def _pairs_of_tile(
    pair_Q2: NDArray[np.int64], images: slice, texts: slice
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns in the tile of those pairs that lie in it; all have their image there."""
    row, column = pair_Q2[:, 0] - images.start, pair_Q2[:, 1] - texts.start
    is_inside = (column >= 0) & (column < texts.stop - texts.start)
    return row[is_inside], column[is_inside]


def _check(image_features: Floats, text_features: Floats) -> None:
    check_features(image_features, "image features")
    check_features(text_features, "text features")
    if image_features.shape[1] != text_features.shape[1]:
        raise InputError(f"image features have width {image_features.shape[1]}, text features {text_features.shape[1]}")
