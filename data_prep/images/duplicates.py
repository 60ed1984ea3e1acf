"""Which images are copies of one another: equal pixels, or perceptual hashes a few bits apart. Positions and numbers
only; what becomes of copies is decided elsewhere.

Near copies are found by multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012): of max_distance + 1 disjoint bands
of bits, two hashes at most max_distance apart have one in common. So hashes are put into buckets, band by band, and
faiss compares all with all within a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

Positions = NDArray[np.int64]
#: (P,) and (P,) positions, (P,) distance in bits
Pairs = tuple[Positions, Positions, NDArray[np.uint8]]

NUM_BITS = 256
#: Buckets are made to hold about so many hashes: with fewer, the calls cost more than the comparisons.
_BUCKET_SIZE = 500
#: Comparisons in one call, and so the most pairs that come back at once.
_MAX_COMPARISONS = 2**22
#: After so many pairs only those are added that tell something new (see `near_pairs`).
_MAX_PAIRS = 5_000_000


def exact_copies(pixels_N32: NDArray[np.uint8]) -> Positions:
    """(N,) position of the first image with the same SHA-256 of its pixels; its own where it is the first."""
    return _first_equal(np.ascontiguousarray(pixels_N32).view(np.uint64))


def near_pairs(hashes_N4: NDArray[np.uint64], max_distance: int, others_M4: NDArray[np.uint64] | None = None) -> Pairs:
    """Pairs of 256-bit hashes with a Hamming distance of at most `max_distance` (0 to 255), ordered by position: i < j
    within `hashes_N4`, or i in `hashes_N4` and j in `others_M4`.

    Every pair of different hashes is there, between the first images that have them. Equal hashes do not give a pair
    for each two images:

    - within `hashes_N4` each later image is paired with the first of its hash, at distance 0;
    - with `others_M4`, of equal hashes there the first is named; of equal ones in `hashes_N4` the first has all pairs
      and each later one the nearest of these.

    Where many pictures look alike (blank ones, slides), different hashes can give billions of pairs too. After
    5 million, a pair is added only if it joins two clusters that no pair has joined so far or, with `others_M4`, if
    its i had none. So `clusters` of the pairs, and the positions that have a pair, are always those of all pairs.
    """
    hashes_N4 = np.ascontiguousarray(hashes_N4, dtype=np.uint64)
    first_N = _first_equal(hashes_N4)
    is_first_N = first_N == np.arange(len(first_N))
    unique_U, later_L = np.flatnonzero(is_first_N), np.flatnonzero(~is_first_N)
    if others_M4 is None:
        i_P, j_P, distance_P = _search_within(hashes_N4[unique_U], max_distance)
        i_P, j_P = unique_U[i_P], unique_U[j_P]
        copies = (first_N[later_L], later_L, np.zeros(len(later_L), np.uint8))
    else:
        others_M4 = np.ascontiguousarray(others_M4, dtype=np.uint64)
        unique_V = np.unique(_first_equal(others_M4))
        i_P, j_P, distance_P = _search_across(hashes_N4[unique_U], others_M4[unique_V], max_distance)
        i_P, j_P = unique_U[i_P], unique_V[j_P]
        nearest_N = np.full(len(first_N), -1)
        order = np.lexsort((j_P, distance_P))[::-1]
        nearest_N[i_P[order]] = order  # of several values for one position the last, the nearest, stays
        nearest_L = nearest_N[first_N[later_L]]
        later_L, nearest_L = later_L[nearest_L >= 0], nearest_L[nearest_L >= 0]
        copies = (later_L, j_P[nearest_L], distance_P[nearest_L])
    return _joined([(i_P, j_P, distance_P), copies])


def clusters(num: int, first_P: Positions, second_P: Positions) -> Positions:
    """(num,) number of the connected component of each position, from 0 in the order of their first positions."""
    graph = coo_matrix((np.ones(len(first_P), np.int8), (first_P, second_P)), shape=(num, num))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _first_equal(words_NW: NDArray[np.uint64]) -> Positions:
    """(N,) position of the first row that is equal."""
    order = np.lexsort(words_NW.T)  # stable: the first of equal rows comes first
    ordered = words_NW[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first_N = np.empty(len(order), np.int64)
    first_N[order] = order[starts][np.cumsum(starts) - 1]
    return first_N


def _joined(parts: list[Pairs]) -> Pairs:
    empty = np.zeros(0, np.int64)
    i_P, j_P, distance_P = (
        np.concatenate(arrays) for arrays in zip((empty, empty, np.zeros(0, np.uint8)), *parts, strict=True)
    )
    order = np.lexsort((j_P, i_P))
    return i_P[order], j_P[order], distance_P[order]


# ---------------------------------------------------------------------------------------------- search


def _search_within(hashes_N4: NDArray[np.uint64], max_distance: int) -> Pairs:
    """The rows of `hashes_N4` are all different."""
    found: list[Pairs] = []
    num_found = 0
    cluster_N: Positions | None = None  # from _MAX_PAIRS on
    keys_BN = _keys(hashes_N4, *_band_shape(len(hashes_N4), max_distance))
    for band, members, _ in _buckets(keys_BN, keys_BN):
        waiting = members
        while len(waiting):
            if cluster_N is not None:  # the bucket's largest cluster need not be compared with itself
                present, count = np.unique(cluster_N[members], return_counts=True)
                waiting = waiting[cluster_N[waiting] != present[count.argmax()]]
            queries, waiting = _split(waiting, len(members))
            i_P, j_P, distance_P = _compare(hashes_N4, queries, hashes_N4, members, max_distance)
            if cluster_N is None:
                new = (i_P < j_P) & _first_meeting(keys_BN[:band, i_P], keys_BN[:band, j_P])
                found.append((i_P[new], j_P[new], distance_P[new]))
                num_found += int(new.sum())
                if num_found > _MAX_PAIRS:
                    joined = _joined(found)
                    found, cluster_N = [joined], clusters(len(hashes_N4), *joined[:2])
            elif (apart := cluster_N[i_P] != cluster_N[j_P]).any():
                forest = _spanning_forest(len(hashes_N4), i_P[apart], j_P[apart], distance_P[apart])
                found.append(forest)
                cluster_N = clusters(int(cluster_N.max()) + 1, cluster_N[forest[0]], cluster_N[forest[1]])[cluster_N]
    return _joined(found)


def _search_across(hashes_N4: NDArray[np.uint64], others_M4: NDArray[np.uint64], max_distance: int) -> Pairs:
    """The rows of either are all different."""
    found: list[Pairs] = []
    num_found = 0
    has_pair_N = np.zeros(len(hashes_N4), bool)
    shape = _band_shape(max(len(hashes_N4), len(others_M4)), max_distance)
    keys_BN, keys_BM = _keys(hashes_N4, *shape), _keys(others_M4, *shape)
    for band, waiting, members in _buckets(keys_BN, keys_BM):
        while len(waiting):
            if num_found > _MAX_PAIRS:
                waiting = waiting[~has_pair_N[waiting]]
            queries, waiting = _split(waiting, len(members))
            i_P, j_P, distance_P = _compare(hashes_N4, queries, others_M4, members, max_distance)
            if num_found > _MAX_PAIRS:
                order = np.lexsort((j_P, distance_P, i_P))
                new = order[np.unique(i_P[order], return_index=True)[1]]  # the nearest alone
            else:
                new = np.flatnonzero(_first_meeting(keys_BN[:band, i_P], keys_BM[:band, j_P]))
            found.append((i_P[new], j_P[new], distance_P[new]))
            num_found += len(found[-1][0])
            has_pair_N[i_P] = True
    return _joined(found)


def _band_shape(num: int, max_distance: int) -> tuple[int, int]:
    """Number of bands, and bits of each that choose the bucket (any subset of a band's bits will do)."""
    num_bands = max_distance + 1
    num_bits = min(NUM_BITS // num_bands, math.ceil(math.log2(max(1, num / _BUCKET_SIZE))), 16)
    # so few buckets would not pay for going through all hashes band by band
    return (num_bands, num_bits) if 2**num_bits > num_bands else (1, 0)


def _keys(hashes_N4: NDArray[np.uint64], num_bands: int, num_bits: int) -> NDArray[np.uint16]:
    """(B, N) number of the bucket in each band. A band's bits are scattered: neighbours depend on one another."""
    position_BK = np.random.default_rng(0).permutation(NUM_BITS)[: num_bands * num_bits].reshape(num_bands, num_bits)
    keys_BN = np.zeros((num_bands, len(hashes_N4)), np.uint16)
    for key_N, position_K in zip(keys_BN, position_BK, strict=True):
        for k, position in enumerate(position_K):
            bit_N = hashes_N4[:, position // 64] >> np.uint64(position % 64) & np.uint64(1)
            key_N |= bit_N.astype(np.uint16) << np.uint16(k)
    return keys_BN


def _buckets(keys_BN: NDArray[np.uint16], keys_BM: NDArray[np.uint16]) -> Iterator[tuple[int, Positions, Positions]]:
    """Band, and the ascending positions on both sides that fell into one bucket."""
    for band, (keys_N, keys_M) in enumerate(zip(keys_BN, keys_BM, strict=True)):
        common_C = np.intersect1d(keys_N, keys_M)
        sides = []
        for keys in (keys_N, keys_M):
            order = np.argsort(keys, kind="stable")
            ordered = keys[order]
            starts, ends = np.searchsorted(ordered, common_C, "left"), np.searchsorted(ordered, common_C, "right")
            sides.append([order[start:end] for start, end in zip(starts, ends, strict=True)])
        for members_N, members_M in zip(*sides, strict=True):
            yield band, members_N, members_M


def _split(waiting: Positions, num_others: int) -> tuple[Positions, Positions]:
    """As many as may be compared with the others at once, and the rest."""
    size = max(1, _MAX_COMPARISONS // num_others)
    return waiting[:size], waiting[size:]


def _compare(
    hashes_N4: NDArray[np.uint64],
    queries: Positions,
    others_M4: NDArray[np.uint64],
    members: Positions,
    max_distance: int,
) -> Pairs:
    """All pairs of queries (positions in `hashes_N4`) and members (in `others_M4`) at most max_distance apart."""
    import faiss  # takes long to load, and worker processes load this module

    index = faiss.IndexBinaryFlat(NUM_BITS)
    index.add(others_M4[members].view(np.uint8))
    # faiss takes a radius that is not reached any more
    limits, distance_P, member_P = index.range_search(hashes_N4[queries].view(np.uint8), max_distance + 1)
    start_Q, end_Q = limits[:-1].astype(np.int64), limits[1:].astype(np.int64)
    return np.repeat(queries, end_Q - start_Q), members[member_P], distance_P.astype(np.uint8)


def _first_meeting(keys_AP: NDArray[np.uint16], keys_of_others_AP: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Pairs that were together in none of the bands before."""
    different: NDArray[np.bool_] = (keys_AP != keys_of_others_AP).all(axis=0)
    return different


def _spanning_forest(num: int, i_P: Positions, j_P: Positions, distance_P: NDArray[np.uint8]) -> Pairs:
    """The pairs that still join all that these pairs join, the nearest ones where there is a choice."""
    i_P, j_P = np.minimum(i_P, j_P), np.maximum(i_P, j_P)
    once = np.unique(i_P * num + j_P, return_index=True)[1]
    weight_P = distance_P[once].astype(np.int64) + 1  # zero would be no edge
    forest = minimum_spanning_tree(coo_matrix((weight_P, (i_P[once], j_P[once])), shape=(num, num))).tocoo()
    return forest.row.astype(np.int64), forest.col.astype(np.int64), (forest.data - 1).astype(np.uint8)
