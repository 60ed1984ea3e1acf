"""Which row becomes a sample, and of which split: pure functions of the rows and of what was seen of their images.

    image rejected? -> same pair twice? -> copies inside -> leakage (published val, evaluation sets) -> splits

All of it works on arrays: a million rows take a minute or two and under 2 GB. Nothing is dropped without a `Why`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from data_prep.config import DuplicateOptions
from data_prep.errors import InputError
from data_prep.images.duplicates import clusters, exact_copies, near_pairs
from data_prep.planning.rows import SPLIT_CODES
from data_prep.planning.splits import assign_splits

REJECTED, TRAIN, VAL = 0, 1, 2  # fates; the last two are also the codes of a source's own split
SPLITS = {TRAIN: "train", VAL: "val"}


class Why(IntEnum):
    """Why a row does not become a sample; `detail` of the row says more."""

    KEPT = 0
    IMAGE = 1  # detail: the image
    SAME_PAIR = 2  # detail: the earlier row
    COPY = 3  # detail: the row whose image is kept
    VAL_GROUP = 4
    VAL_IMAGE = 5
    EVALUATION_IMAGE = 6  # detail: the evaluation set
    EVALUATION_GROUP = 7  # detail: the evaluation set


@dataclass
class ImagePairs:
    """Pairs of distinct images that are copies of each other: `first` < `second`, distance 0 where pixels are equal."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.uint8]


@dataclass
class EvaluationImages:
    """An evaluation set: HASH_DTYPE-like arrays, one row an image."""

    name: str
    pixels: NDArray[np.uint8]  # (E, 32)
    perceptual: NDArray[np.uint64]  # (E, 4)
    read_jpeg: Callable[[int], bytes] = lambda image: b""  # for the page that shows pairs


@dataclass
class Plan:
    fate: NDArray[np.uint8]  # (N,)
    why: NDArray[np.uint8]  # (N,) Why
    detail: NDArray[np.int64]  # (N,)
    pairs: ImagePairs
    #: (P, 4): evaluation set, its image, image of ours, distance
    evaluation_pairs: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def make_plan(
    rows: NDArray[np.void],
    facts: NDArray[np.void],
    evaluation_sets: Sequence[EvaluationImages],
    options: DuplicateOptions,
    val_fraction: float,
    earlier: NDArray[np.void] | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> Plan:
    """`rows` (N,) ROW_DTYPE, `facts` (M,) FACT_DTYPE, `earlier` (E,) SPLIT_DTYPE: what earlier plans decided.

    Raises InputError where `leakage` is "fail" and there is some.
    """
    plan = Plan(
        fate=np.zeros(len(rows), dtype=np.uint8),
        why=np.zeros(len(rows), dtype=np.uint8),
        detail=np.full(len(rows), -1, dtype=np.int64),
        pairs=ImagePairs(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)),
        evaluation_pairs=np.zeros((0, 4), dtype=np.int64),
    )
    image = rows["image"].astype(np.int64)
    _reject(plan, facts["rejected"][image], Why.IMAGE, image)
    stage("copies inside the set")
    original = _originals(facts)
    plan.pairs = find_pairs(facts, original, options.max_distance)
    cluster = clusters(len(facts), plan.pairs.first, plan.pairs.second)
    _reject_same_pairs(plan, rows, original)
    if options.within == "drop":
        _reject_copies(plan, rows, cluster)
    stage("leakage")
    plan.evaluation_pairs = _evaluation_pairs(facts, evaluation_sets, options.max_distance)
    _leakage(plan, rows, facts, evaluation_sets, options)
    stage("splits")
    _split(plan, rows, facts, cluster, val_fraction, earlier)
    _count(plan, cluster, original, facts, rows)
    return plan


def _reject(
    plan: Plan, selected: NDArray[np.bool_], why: Why, detail: NDArray[np.int64] | int, only_alive: bool = True
) -> None:
    if only_alive:
        selected = selected & (plan.why == Why.KEPT)
    plan.why[selected] = why
    plan.detail[selected] = detail if isinstance(detail, int) else detail[selected]


# ---------------------------------------------------------------------------------------------- copies


def _originals(facts: NDArray[np.void]) -> NDArray[np.int64]:
    """(M,) the first image with equal pixels; a rejected image is its own."""
    original = np.arange(len(facts), dtype=np.int64)
    alive = np.flatnonzero(~facts["rejected"])
    original[alive] = alive[exact_copies(facts["pixels"][alive])]
    return original


def find_pairs(facts: NDArray[np.void], original: NDArray[np.int64], max_distance: int) -> ImagePairs:
    """Near copies among the distinct pixels, then exact ones as pairs at distance 0."""
    distinct = np.flatnonzero(~facts["rejected"] & (original == np.arange(len(facts))))
    i, j, distance = near_pairs(facts["perceptual"][distinct], max_distance)
    exact = np.flatnonzero(original != np.arange(len(facts)))
    return ImagePairs(
        np.concatenate([distinct[i], original[exact]]),
        np.concatenate([distinct[j], exact]),
        np.concatenate([distance, np.zeros(len(exact), dtype=np.uint8)]),
    )


def _reject_same_pairs(plan: Plan, rows: NDArray[np.void], original: NDArray[np.int64]) -> None:
    """The same pixels with the same caption are one pair, whatever the files' names: the first row stays.

    A pair that is published in train and again in val is leakage, not repetition: val keeps its own.
    """
    alive = np.flatnonzero(plan.why == Why.KEPT)
    key = np.zeros(len(alive), dtype=[("split", "u1"), ("image", "<i8"), ("caption", "<u8")])
    key["split"], key["caption"] = rows["split"][alive], rows["caption"][alive]
    key["image"] = original[rows["image"][alive]]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    kept = alive[first[inverse]]
    repeated = alive != kept
    plan.why[alive[repeated]], plan.detail[alive[repeated]] = Why.SAME_PAIR, kept[repeated]


def _reject_copies(plan: Plan, rows: NDArray[np.void], cluster: NDArray[np.int64]) -> None:
    """Of each cluster of copies the image that a row names first stays, with all its captions.

    Copies on both sides of a published split are leakage, which decides about train and leaves val alone.
    """
    alive, image = np.flatnonzero(plan.why == Why.KEPT), rows["image"]
    key = cluster[image[alive]] * len(SPLIT_CODES) + rows["split"][alive]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    kept = alive[first[inverse]]
    copies = image[alive] != image[kept]
    plan.why[alive[copies]], plan.detail[alive[copies]] = Why.COPY, kept[copies]


# ---------------------------------------------------------------------------------------------- leakage


def _evaluation_pairs(
    facts: NDArray[np.void], evaluation_sets: Sequence[EvaluationImages], max_distance: int
) -> NDArray[np.int64]:
    """(P, 4): evaluation set, its image, image of ours, distance. Equal pixels have equal hashes and are among them."""
    alive = np.flatnonzero(~facts["rejected"])
    found = [np.zeros((0, 4), dtype=np.int64)]
    for number, evaluation_set in enumerate(evaluation_sets):
        ours, theirs, distance = near_pairs(facts["perceptual"][alive], max_distance, evaluation_set.perceptual)
        found.append(np.stack([np.full(len(ours), number), theirs, alive[ours], distance], axis=1).astype(np.int64))
    return np.concatenate(found)


def _leakage(
    plan: Plan,
    rows: NDArray[np.void],
    facts: NDArray[np.void],
    evaluation_sets: Sequence[EvaluationImages],
    options: DuplicateOptions,
) -> None:
    """Training rows that share an image or a group with what they will be judged on. `val` rows stay."""
    image = rows["image"].astype(np.int64)
    alive = plan.why == Why.KEPT
    before = plan.why.copy()
    for number in range(len(evaluation_sets)):
        ours = plan.evaluation_pairs[plan.evaluation_pairs[:, 0] == number, 2]
        leaking = alive & _marked(ours, len(facts))[image]
        not_val = alive & (rows["split"] != VAL)
        _reject(plan, leaking & not_val, Why.EVALUATION_IMAGE, number)
        _reject(plan, _with_groups(rows["group"], leaking) & not_val, Why.EVALUATION_GROUP, number)
    published_train, published_val = alive & (rows["split"] == TRAIN), alive & (rows["split"] == VAL)
    in_train, in_val = np.unique(image[published_train]), np.unique(image[published_val])
    touched, *_ = near_pairs(facts["perceptual"][in_train], options.max_distance, facts["perceptual"][in_val])
    _reject(plan, _marked(in_train[touched], len(facts))[image] & published_train, Why.VAL_IMAGE, -1)
    _reject(plan, _with_groups(rows["group"], published_val) & published_train, Why.VAL_GROUP, -1)
    leaks = plan.why != before
    plan.counts["training rows that leak"] = int(leaks.sum())
    if not leaks.any() or options.leakage == "drop":
        return
    what = ", ".join(f"{int((plan.why[leaks] == why).sum())} {_WHAT[why]}" for why in _WHAT)
    if options.leakage == "fail":
        raise InputError(
            f"leakage: {int(leaks.sum())} training rows are also in what they would be judged on ({what}); the first "
            f"is row {int(rows['row'][leaks][0])}. Set duplicates.leakage to drop, which leaves them out, or to keep"
        )
    plan.warnings.append(f"leakage kept, as configured, so results flatter: {what}")
    plan.why[leaks], plan.detail[leaks] = Why.KEPT, -1


_WHAT = {
    Why.EVALUATION_IMAGE: "share an image with an evaluation set",
    Why.EVALUATION_GROUP: "share a group with such a row",
    Why.VAL_IMAGE: "share an image with val",
    Why.VAL_GROUP: "share a group with val",
}


def _marked(chosen: NDArray[np.int64], num: int) -> NDArray[np.bool_]:
    marked = np.zeros(num, dtype=bool)
    marked[chosen] = True
    return marked


def _with_groups(group: NDArray[np.uint64], of: NDArray[np.bool_]) -> NDArray[np.bool_]:
    shared: NDArray[np.bool_] = (group != 0) & np.isin(group, np.unique(group[of & (group != 0)]))
    return shared


# ---------------------------------------------------------------------------------------------- splits


def names_of(rows: NDArray[np.void], facts: NDArray[np.void]) -> NDArray[np.uint64]:
    """(N, 2): what rows are known by in later plans, wherever they stand then: their group (0 = none), their pixels."""
    pixels = np.ascontiguousarray(facts["pixels"][:, :8]).view("<u8").ravel()
    return np.stack([rows["group"], pixels[rows["image"]]], axis=1)


def _split(
    plan: Plan,
    rows: NDArray[np.void],
    facts: NDArray[np.void],
    cluster: NDArray[np.int64],
    val_fraction: float,
    earlier: NDArray[np.void] | None,
) -> None:
    """The source's own split where there is one; other rows in whole components of groups and copies of an image."""
    alive = np.flatnonzero(plan.why == Why.KEPT)
    component = _components(rows[alive], cluster)
    own = rows["split"][alive]
    plan.fate[alive] = own
    free = np.flatnonzero(own == 0)
    if not len(free):
        return
    num_components = int(component.max()) + 1
    published = np.zeros(num_components, dtype=np.uint8)
    published[component[own == VAL]] = VAL
    published[component[own == TRAIN]] = TRAIN  # a component that has both stays out of val
    follows = published[component[free]]
    undecided = free[follows == 0]
    plan.fate[alive[free]] = follows
    if len(undecided):
        chosen = rows[alive[undecided]]
        plan.fate[alive[undecided]] = TRAIN + assign_splits(
            component[undecided], chosen["diagnosis"], names_of(chosen, facts), val_fraction, earlier
        )
    largest = int(np.bincount(component).max())
    plan.counts["rows in the largest group of copies and patients"] = largest
    if largest > 0.1 * len(alive) and len(alive) > 1000:
        plan.warnings.append(
            f"{largest} of {len(alive)} rows hang together by groups and copies of images and go to one side of the "
            "split: is the column of groups right, or duplicates.max_distance too large?"
        )


def _components(rows: NDArray[np.void], cluster: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) rows that share a group or a copy of an image, directly or through others, have the same number."""
    images = cluster[rows["image"]]
    _, group = np.unique(rows["group"], return_inverse=True)
    grouped = rows["group"] != 0
    num_images = len(cluster)
    node = clusters(num_images + len(rows), images[grouped], num_images + group[grouped])
    _, component = np.unique(node[images], return_inverse=True)
    return component.astype(np.int64)


def _count(
    plan: Plan, cluster: NDArray[np.int64], original: NDArray[np.int64], facts: NDArray[np.void], rows: NDArray[np.void]
) -> None:
    plan.counts |= {
        "distinct images": len(facts),
        "images rejected": int(facts["rejected"].sum()),
        "images whose compressed data was kept": int((~facts["rejected"] & ~facts["reencoded"]).sum()),
        "images with the pixels of an earlier one": int((original != np.arange(len(facts))).sum()),
        "pairs of near copies": int((plan.pairs.distance > 0).sum()),
        "images that are a copy of another": int(
            (np.bincount(cluster, minlength=1)[cluster] > 1).sum() if len(cluster) else 0
        ),
    }
    plan.counts |= {f"{name} rows": int((plan.fate == code).sum()) for code, name in SPLITS.items()}
