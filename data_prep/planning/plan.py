"""Which row becomes a sample, and of which split: pure functions of the rows and of what was seen of their images.

    image rejected? -> same pair twice? -> copies inside -> leakage (published val, evaluation sets) -> splits

All of it works on arrays: a million rows of as many images took half a minute and 0.6 GB. Nothing is
dropped without a `Why`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from data_prep.config import DuplicateOptions
from data_prep.images.duplicates import clusters, exact_copies, near_pairs
from data_prep.planning.rows import SPLIT_CODES
from data_prep.planning.splits import assign_splits

REJECTED, TRAIN, VAL = 0, 1, 2  # fates; the last two are also the codes of a source's own split
SPLITS = {TRAIN: "train", VAL: "val"}
SPLIT_FATE = {name: code for code, name in SPLITS.items()}


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
    refusal: str | None = None  # why nothing may be made of this plan


def make_plan(
    rows: NDArray[np.void],
    facts: NDArray[np.void],
    evaluation_sets: Sequence[EvaluationImages],
    options: DuplicateOptions,
    val_fraction: float,
    earlier: NDArray[np.void] | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> Plan:
    """`rows` (N,) ROW_DTYPE, `facts` (M,) FACT_DTYPE, `earlier` (E,) SPLIT_DTYPE: what earlier plans decided."""
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
    component = _components(rows, cluster)
    known_train = _known_train(rows, facts, earlier)
    side = _bound_for(rows, component, known_train)
    _reject_same_pairs(plan, rows, original, side)
    if options.within == "drop":
        _reject_copies(plan, rows, cluster, side)
    stage("leakage")
    plan.evaluation_pairs = _evaluation_pairs(facts, evaluation_sets, options.max_distance)
    _leakage(plan, rows, facts, _with_any(component, known_train), evaluation_sets, options)
    stage("splits")
    _split(plan, rows, facts, component, known_train, val_fraction, earlier)
    _count(plan, cluster, original, facts)
    return plan


def _reject(plan: Plan, selected: NDArray[np.bool_], why: Why, detail: NDArray[np.int64] | int) -> None:
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


def _reject_same_pairs(
    plan: Plan, rows: NDArray[np.void], original: NDArray[np.int64], side: NDArray[np.uint8]
) -> None:
    """The same pixels with the same caption (without one, label) are one pair: the first row stays.

    A pair that is published in train and again in val is leakage, not repetition: val keeps its own.
    """
    alive = np.flatnonzero(plan.why == Why.KEPT)
    key = np.zeros(len(alive), dtype=[("split", "u1"), ("image", "<i8"), ("caption", "<u8")])
    key["split"] = side[alive]
    # without a caption the label speaks
    key["caption"] = np.where(rows["caption"] == 0, rows["diagnosis"] + 2, rows["caption"])[alive]
    key["image"] = original[rows["image"][alive]]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    kept = alive[first[inverse]]
    repeated = alive != kept
    plan.why[alive[repeated]], plan.detail[alive[repeated]] = Why.SAME_PAIR, kept[repeated]


def _reject_copies(plan: Plan, rows: NDArray[np.void], cluster: NDArray[np.int64], side: NDArray[np.uint8]) -> None:
    """Of each cluster of copies the image that a row names first stays, with all its captions.

    Copies on both sides of a published split are leakage, which decides about train and leaves val alone.
    """
    alive, image = np.flatnonzero(plan.why == Why.KEPT), rows["image"]
    key = cluster[image[alive]] * len(SPLIT_CODES) + side[alive]
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
    bound_for_train: NDArray[np.bool_],
    evaluation_sets: Sequence[EvaluationImages],
    options: DuplicateOptions,
) -> None:
    """Training rows that share an image or a group with what they will be judged on. `val` rows stay.

    `bound_for_train` (N,): hangs together with a row of train, and so goes there if the source does not say otherwise.
    """
    image = rows["image"].astype(np.int64)
    alive = plan.why == Why.KEPT
    before = plan.why.copy()
    for number in range(len(evaluation_sets)):
        ours = plan.evaluation_pairs[plan.evaluation_pairs[:, 0] == number, 2]
        leaking = _marked(ours, len(facts))[image]  # rejected rows too: they show whose group is in the set
        not_val = alive & (rows["split"] != VAL)
        _reject(plan, leaking & not_val, Why.EVALUATION_IMAGE, number)
        _reject(plan, _with_groups(rows["group"], leaking) & not_val, Why.EVALUATION_GROUP, number)
    seen = before != Why.IMAGE  # copies and repeated pairs too: they show whose group is in val
    published_val, for_train = seen & (rows["split"] == VAL), seen & bound_for_train & (rows["split"] != VAL)
    in_train, in_val = np.unique(image[for_train]), np.unique(image[published_val])
    touched, *_ = near_pairs(facts["perceptual"][in_train], options.max_distance, facts["perceptual"][in_val])
    touching = _marked(in_train[touched], len(facts))[image] & for_train
    _reject(plan, touching, Why.VAL_IMAGE, -1)
    _reject(plan, _with_groups(rows["group"], published_val | touching) & for_train, Why.VAL_GROUP, -1)
    leaks = plan.why != before
    plan.counts["training rows that leak"] = int(leaks.sum())
    if not leaks.any() or options.leakage == "drop":
        return
    what = ", ".join(f"{int((plan.why[leaks] == why).sum())} {_WHAT[why]}" for why in _WHAT)
    if options.leakage == "fail":
        plan.refusal = (
            f"leakage: {int(leaks.sum())} training rows are also in what they would be judged on ({what}). Set "
            "duplicates.leakage to drop, which leaves them out, or to keep"
        )
        return
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
    """(N, 3): what rows are known by in later plans, wherever they stand then: group (0 = none), pixels, and the
    image's name, which stays where other options change the pixels."""
    pixels = np.ascontiguousarray(facts["pixels"][:, :8]).view("<u8").ravel()
    return np.stack([rows["group"], pixels[rows["image"]], facts["name"][rows["image"]]], axis=1)


def _known_train(
    rows: NDArray[np.void], facts: NDArray[np.void], earlier: NDArray[np.void] | None
) -> NDArray[np.bool_]:
    """(N,) rows of train: as published, or because their group or image was in train in an earlier plan."""
    in_train = np.asarray(rows["split"] == TRAIN)
    if earlier is not None:
        seen = earlier["name"][earlier["split"] == 0]  # what `remember_splits` calls train
        in_train |= np.isin(names_of(rows, facts), seen).any(axis=1) & (rows["split"] == 0)
    return in_train


def _bound_for(
    rows: NDArray[np.void], component: NDArray[np.int64], known_train: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """(N,) the side that a row goes to where that is known before splits are made, else 0."""
    side: NDArray[np.uint8] = rows["split"].copy()
    free = side == 0
    to_train = free & _with_any(component, known_train)
    side[to_train] = TRAIN
    side[free & ~to_train & _with_any(component, rows["split"] == VAL)] = VAL
    return side


def _with_any(component: NDArray[np.int64], of: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,) rows whose component has one of these."""
    return _marked(component[of], int(component.max(initial=-1)) + 1)[component]


def _split(
    plan: Plan,
    rows: NDArray[np.void],
    facts: NDArray[np.void],
    component: NDArray[np.int64],
    known_train: NDArray[np.bool_],
    val_fraction: float,
    earlier: NDArray[np.void] | None,
) -> None:
    """The source's own split where there is one; other rows in whole components of groups and copies of an image.

    A component that hangs together with train goes to train (what leaks from it into val was rejected before), one
    that hangs together with published val alone goes to val.
    """
    alive = plan.why == Why.KEPT
    plan.fate[alive] = rows["split"][alive]
    free = alive & (rows["split"] == 0)
    if not free.any():
        return
    to_train = free & _with_any(component, alive & known_train)
    to_val = free & ~to_train & _with_any(component, alive & (rows["split"] == VAL))
    plan.fate[to_train], plan.fate[to_val] = TRAIN, VAL
    if (undecided := free & ~to_train & ~to_val).any():
        plan.fate[undecided] = TRAIN + assign_splits(
            component[undecided],
            rows["diagnosis"][undecided],
            names_of(rows[undecided], facts),
            val_fraction,
            earlier,
        )
    share = float((plan.fate[free] == VAL).mean())
    if earlier is not None and abs(share - val_fraction) > 0.02 + 0.2 * val_fraction:
        plan.warnings.append(
            f"val holds {share:.1%} of the rows, val_fraction is {val_fraction:.1%}: earlier preparations decided "
            "where rows are (work/splits.npy), and nothing moves from train to val"
        )
    largest, num_alive = int(np.bincount(component[alive]).max()), int(alive.sum())
    plan.counts["rows in the largest group of copies and patients"] = largest
    if largest > 0.1 * num_alive and num_alive > 1000:
        plan.warnings.append(
            f"{largest} of {num_alive} rows hang together by groups and copies of images and go to one side of the "
            "split: is the column of groups right, or duplicates.max_distance too large?"
        )


def _components(rows: NDArray[np.void], cluster: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) rows that share a group or a copy of an image, directly or through others, have the same number.

    Of all rows: one that is rejected links its patient to the others all the same.
    """
    images = cluster[rows["image"]]
    _, group = np.unique(rows["group"], return_inverse=True)
    grouped = rows["group"] != 0
    num_images = len(cluster)
    node = clusters(num_images + len(rows), images[grouped], num_images + group[grouped])
    _, component = np.unique(node[images], return_inverse=True)
    return component.astype(np.int64)


def _count(plan: Plan, cluster: NDArray[np.int64], original: NDArray[np.int64], facts: NDArray[np.void]) -> None:
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
