"""Train and val: whole components, stratified by diagnosis, and stable when rows are added.

A component is what hangs together by a patient, a lesion, a source group or copies of an image; all its rows go to one
side, so nothing leaks by construction. What an earlier preparation decided is kept, as far as it can be:

- A component with a member that was in train is in train, whatever else it has come to hold. A checkpoint of the
  earlier train has seen it, so it would flatter that checkpoint in val. Nothing ever moves from train to val.
- A component whose known members were all in val stays in val, with the rows it has gained.
- So where a new row joins a component of train with one of val, those of val move to train: val shrinks by them, but
  what remains is clean for every checkpoint, old and new.
- All other components are new; they fill what each diagnosis lacks in val.

Without an earlier decision the order of the components' hashed names decides, not the order of rows; a component that
comes first in one preparation tends to come first in the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRAIN, VAL = 0, 1
UNKNOWN = -1  # stratum of a row without a diagnosis

#: What is remembered of a preparation: each member's name and its side, sorted by name, names distinct.
SPLIT_DTYPE = np.dtype([("name", "<u8"), ("split", "u1")])

_FREE = 2


@dataclass(frozen=True)
class _Components:
    """C components of S strata. A pair is a component and a stratum that it has rows of."""

    stratum_C: NDArray[np.int64]  # under which it counts: the rarest of its diagnoses
    order_C: NDArray[np.int64]  # components by hashed name
    pair_component_P: NDArray[np.int64]
    pair_stratum_P: NDArray[np.int64]
    pair_num_rows_P: NDArray[np.int64]
    num_rows_S: NDArray[np.int64]
    num_components_S: NDArray[np.int64]  # that have rows of it
    by_rarity_S: NDArray[np.int64]  # strata, the rarest first, the unknown one last
    unknown: int  # stratum, or -1


def assign_splits(
    component_N: NDArray[np.integer],
    stratum_N: NDArray[np.integer],
    name_N: NDArray[np.uint64],
    val_fraction: float,
    earlier: NDArray[np.void] | None = None,
) -> NDArray[np.uint8]:
    """(N,) 0 = train, 1 = val. Deterministic, and independent of the order of rows and of the numbers given to
    components and diagnoses.

    `component_N`: any integers; equal for rows that must be on one side. `stratum_N`: the diagnosis as any integer,
    -1 where unknown. `name_N`: (N,) or (N, M) what a row is known by in later preparations (salted hashes of its
    group, of its image's pixels); 0 = none, but each component needs one of its own. `val_fraction` in [0, 1).
    `earlier`: (E,) SPLIT_DTYPE, as `remember_splits` returns it.

    A component of several diagnoses counts under the rarest; the rarest diagnoses choose first, and what they took
    counts for the commoner ones. Each diagnosis comes as near to val_fraction of its rows as its whole components,
    taken in the order of their names, allow: within half its largest component, where no earlier decision and no rarer
    diagnosis interferes. With two components or more, and half a row or more due in val, it has one in train and one in
    val (its smallest, if none fits). Diagnoses with less than half a row due share one quota. A diagnosis of a single
    component stays in train, where it can be learnt, unless that leaves val with less than half of its fraction of all
    rows.
    """
    num_rows = len(component_N)
    if num_rows == 0:
        return np.zeros(0, dtype=np.uint8)
    number_N = np.unique(component_N, return_inverse=True)[1].astype(np.int64)
    name_NM = np.asarray(name_N, dtype=np.uint64).reshape(num_rows, -1)
    components = _components(number_N, stratum_N, name_NM)
    side_C = _earlier_sides(number_N, name_NM, len(components.stratum_C), earlier)
    if val_fraction > 0:
        _fill(side_C, components, val_fraction)
    side_C[side_C == _FREE] = TRAIN
    result: NDArray[np.uint8] = side_C[number_N]
    return result


def remember_splits(
    name_N: NDArray[np.uint64], split_N: NDArray[np.uint8], earlier: NDArray[np.void] | None = None
) -> NDArray[np.void]:
    """(E,) SPLIT_DTYPE: the names of these rows and of earlier ones, each with its side, for the next preparation.

    `name_N` (N,) or (N, M) as in `assign_splits`. Names that are gone are kept: a checkpoint may have seen them, and
    they may come back. A name that was ever in train is in train.
    """
    name_NM = np.asarray(name_N, dtype=np.uint64).reshape(len(split_N), -1)
    names, sides = name_NM.ravel(), np.repeat(split_N, name_NM.shape[1])
    if earlier is not None:
        names, sides = np.concatenate([names, earlier["name"]]), np.concatenate([sides, earlier["split"]])
    present = names != 0
    distinct, inverse = np.unique(names[present], return_inverse=True)
    result = np.zeros(len(distinct), dtype=SPLIT_DTYPE)
    result["name"], result["split"] = distinct, VAL
    result["split"][inverse[sides[present] == TRAIN]] = TRAIN
    return result


# ---------------------------------------------------------------------------------------------- components


def _components(
    component_N: NDArray[np.int64], stratum_N: NDArray[np.integer], name_NM: NDArray[np.uint64]
) -> _Components:
    labels_S, stratum_N = np.unique(stratum_N, return_inverse=True)
    num_strata, num_components = len(labels_S), int(component_N.max()) + 1
    pairs, num_rows_P = np.unique(component_N * num_strata + stratum_N, return_counts=True)
    pair_component_P, pair_stratum_P = np.divmod(pairs, num_strata)
    # the least of well-mixed names: a component that grows keeps it, as a rule; mixed once more, since the least of
    # many names is small, and large components would come first
    key_C = np.full(num_components, np.iinfo(np.uint64).max, dtype=np.uint64)
    mixed_N = np.where(name_NM == 0, np.iinfo(np.uint64).max, _mix(name_NM)).min(axis=1)
    np.minimum.at(key_C, component_N, mixed_N)
    key_C = _mix(key_C)
    # of which components a diagnosis is, and how many rows each has: a sum does not depend on an order
    key_S = np.zeros(num_strata, dtype=np.uint64)
    np.add.at(key_S, pair_stratum_P, _mix(key_C[pair_component_P] + num_rows_P.astype(np.uint64)))
    num_rows_S = np.bincount(stratum_N, minlength=num_strata)
    num_components_S = np.bincount(pair_stratum_P, minlength=num_strata)
    # the key comes after the counts: codes of diagnoses follow the order of rows and must not decide
    by_rarity_S = np.lexsort((key_S, num_components_S, num_rows_S, labels_S == UNKNOWN))
    rank_S = np.argsort(by_rarity_S)
    rank_C = np.full(num_components, num_strata, dtype=np.int64)
    np.minimum.at(rank_C, pair_component_P, rank_S[pair_stratum_P])
    unknown = np.flatnonzero(labels_S == UNKNOWN)
    return _Components(
        stratum_C=by_rarity_S[rank_C],
        order_C=np.argsort(key_C, kind="stable"),
        pair_component_P=pair_component_P,
        pair_stratum_P=pair_stratum_P,
        pair_num_rows_P=num_rows_P,
        num_rows_S=num_rows_S,
        num_components_S=num_components_S,
        by_rarity_S=by_rarity_S,
        unknown=int(unknown[0]) if len(unknown) else -1,
    )


def _mix(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): a bijection of 64 bits."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _earlier_sides(
    component_N: NDArray[np.int64],
    name_NM: NDArray[np.uint64],
    num_components: int,
    earlier: NDArray[np.void] | None,
) -> NDArray[np.uint8]:
    """(C,) train where any member was in train, val where the known ones were all in val, else free."""
    side_C = np.full(num_components, _FREE, dtype=np.uint8)
    if earlier is None or len(earlier) == 0:
        return side_C
    known = np.ascontiguousarray(earlier["name"])
    position_NM = np.minimum(np.searchsorted(known, name_NM), len(known) - 1)
    found_NM = (known[position_NM] == name_NM) & (name_NM != 0)
    was_NM = earlier["split"][position_NM]
    for side in (VAL, TRAIN):  # train last: it wins
        side_C[component_N[(found_NM & (was_NM == side)).any(axis=1)]] = side
    return side_C


# ---------------------------------------------------------------------------------------------- quotas


class _Val:
    """What val holds so far, by diagnosis."""

    def __init__(self, components: _Components, side_C: NDArray[np.uint8]) -> None:
        self.components, self.side_C = components, side_C
        num_strata = len(components.num_rows_S)
        self.num_rows_S = np.zeros(num_strata, dtype=np.int64)
        self.num_components_S = np.zeros(num_strata, dtype=np.int64)
        self._first_pair = np.searchsorted(components.pair_component_P, np.arange(len(side_C) + 1))
        self._count(np.flatnonzero(side_C == VAL))

    def add(self, chosen: NDArray[np.int64]) -> None:
        self.side_C[chosen] = VAL
        self._count(chosen)

    def _count(self, chosen: NDArray[np.int64]) -> None:
        first, num = self._first_pair[chosen], np.diff(self._first_pair)[chosen]
        pairs = np.repeat(first - np.cumsum(num) + num, num) + np.arange(num.sum())  # the ranges of pairs, joined
        np.add.at(self.num_rows_S, self.components.pair_stratum_P[pairs], self.components.pair_num_rows_P[pairs])
        np.add.at(self.num_components_S, self.components.pair_stratum_P[pairs], 1)


def _fill(side_C: NDArray[np.uint8], components: _Components, val_fraction: float) -> None:
    """Changes `side_C`: free components to val, diagnosis by diagnosis."""
    c, val = components, _Val(components, side_C)
    single_S = c.num_components_S == 1
    small_S = (val_fraction * c.num_rows_S < 0.5) & ~single_S
    if c.unknown >= 0:
        single_S[c.unknown] = small_S[c.unknown] = False
    free = c.order_C[side_C[c.order_C] == _FREE]  # by name
    free = free[np.argsort(c.stratum_C[free], kind="stable")]  # by stratum, then by name
    bounds = np.searchsorted(c.stratum_C[free], np.arange(len(c.num_rows_S) + 1))
    own_rows_C = np.zeros(len(side_C), dtype=np.int64)  # rows of the stratum under which it counts
    counted = c.pair_stratum_P == c.stratum_C[c.pair_component_P]
    own_rows_C[c.pair_component_P[counted]] = c.pair_num_rows_P[counted]
    all_rows_C = np.bincount(c.pair_component_P, weights=c.pair_num_rows_P).astype(np.int64)
    rank_of_C = np.argsort(c.order_C)

    def by_name(strata_S: NDArray[np.bool_]) -> NDArray[np.int64]:
        chosen = free[strata_S[c.stratum_C[free]]]
        result: NDArray[np.int64] = chosen[np.argsort(rank_of_C[chosen])]
        return result

    if small_S.any():
        pool = by_name(small_S)
        target = val_fraction * c.num_rows_S[small_S].sum() - val.num_rows_S[small_S].sum()
        val.add(pool[_choose(own_rows_C[pool], float(target), len(pool), False)])
    for stratum in c.by_rarity_S:
        if single_S[stratum] or small_S[stratum]:
            continue
        pool = free[bounds[stratum] : bounds[stratum + 1]]
        target = val_fraction * c.num_rows_S[stratum] - val.num_rows_S[stratum]
        # one stays in train
        at_most = int(c.num_components_S[stratum] - 1 - val.num_components_S[stratum])
        needs_one = stratum != c.unknown and val.num_components_S[stratum] == 0
        val.add(pool[_choose(own_rows_C[pool], float(target), at_most, needs_one)])
    wanted = val_fraction * int(all_rows_C.sum())
    if (lacking := wanted - int(all_rows_C[side_C == VAL].sum())) > 0.5 * wanted:
        pool = by_name(single_S)
        val.add(pool[_choose(all_rows_C[pool], lacking, len(pool) - 1, False)])


def _choose(num_rows: NDArray[np.int64], target: float, at_most: int, needs_one: bool) -> NDArray[np.int64]:
    """Positions whose numbers of rows sum up to nearly `target`.

    All that fit, in the order given; then the one, of those left, that brings the sum nearest, if any does. Where
    `needs_one` and none was chosen: the smallest.
    """
    chosen: list[int] = []
    left: list[int] = []
    for position, num in enumerate(num_rows.tolist()):
        if target < 0.5 or len(chosen) >= at_most:
            break
        if num <= target:
            chosen.append(position)
            target -= num
        else:
            left.append(position)
    if left and len(chosen) < at_most:
        nearest = min(left, key=lambda position: abs(int(num_rows[position]) - target))
        if abs(int(num_rows[nearest]) - target) < target:
            chosen.append(nearest)
    if needs_one and not chosen and at_most > 0 and len(num_rows):
        chosen.append(int(np.argmin(num_rows)))
    return np.array(chosen, dtype=np.int64)
