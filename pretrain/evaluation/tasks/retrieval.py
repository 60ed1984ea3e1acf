"""Retrieval among the images that have texts of their own, and those texts: both ways.

Shapes: N images, U distinct texts, P pairs, D joint width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.config import EvaluationSettings, RetrievalTask
from pretrain.evaluation.interfaces import JOINT, EvalData, Row, TaskInput
from pretrain.evaluation.methods.retrieval import (
    ResamplingGroups,
    chance_levels,
    cumulative_match,
    mean_recall,
    rank_metrics,
    resampling_groups,
    retrieval_ranks,
    usable_ks,
)
from pretrain.evaluation.methods.retrieval_ranks import TIE_TOLERANCE
from pretrain.evaluation.metrics.groups import by_group
from pretrain.evaluation.results import TABLES, Curve, Metric, TaskResult, undefined
from pretrain.evaluation.tables import write_table

#: Of the mean recall that MAKE and DermLIP report; a metric of its own, since ours has more values of k.
_PEERS_KS = (5, 10, 50)


@dataclass(frozen=True)
class _Candidates:
    """Images with texts, their distinct texts, and which belongs to which."""

    rows: list[Row]
    image_ND: NDArray[np.float32]
    texts: list[str]  # in the order of their first image
    text_UD: NDArray[np.float32]
    pair_P2: NDArray[np.int64]

    @property
    def patients(self) -> list[str | None]:
        return [row.patient for row in self.rows]


def lacks(data: EvalData) -> str | None:
    rows = [data.rows[position] for position in _positions(data)]
    if not rows:
        return "no image has a text of its own"
    num_texts = len({text for row in rows for text in row.texts})
    if min(len(rows), num_texts) < 2:
        return f"{len(rows)} images with {num_texts} distinct texts: there is nothing to choose among"
    return None


def run(task: RetrievalTask, given: TaskInput) -> TaskResult:
    """Texts are the distinct ones of the rows outside the data set's training part; an image without one is left out.

    Raises InputError where every k of the task is at or above the number of candidates.
    """
    positions = _positions(given.data)
    rows = [given.data.rows[position] for position in positions]
    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    all_ = _candidates(rows, given.features(JOINT)[positions], texts, given.encoder.encode_texts(texts))
    image_rank, text_rank = retrieval_ranks(all_.image_ND, all_.text_UD, all_.pair_P2)
    groups = resampling_groups(all_.pair_P2, len(rows), len(texts), all_.patients)
    _write_ranks(given, all_, image_rank, text_rank, groups)

    ks, notes = _usable_ks(task.ks, all_)
    if not ks:
        raise InputError(f"{given.data.name}: retrieval: {notes[0]}; give a smaller k (tasks: ks)")
    num_unused = sum(not row.is_train for row in given.data.rows) - len(rows)
    if num_unused:
        notes.append(f"{num_unused} images have no text of their own and are left out, as candidates too.")
    if not groups.is_linked:
        notes.append(
            "Captions and patients link more than half of the images: intervals resample images by patient, and texts "
            "one by one."
        )
    metrics = _metrics(all_, image_rank, text_rank, groups, ks, given.settings)
    without_overlap, overlap_notes = _without_overlap(task, given, positions, all_, metrics)
    k = min(ks, key=lambda k: abs(k - 10))
    return TaskResult(
        task="retrieval",
        primary="mean_recall",
        metrics=metrics,
        without_overlap=without_overlap,
        by_group=by_group(rows, f"image_to_text_recall@{k}", np.mean, [image_rank < k], given.settings),
        curves=(
            _curve("image to text", image_rank, len(texts)),
            _curve("text to image", text_rank, len(rows)),
        ),
        settings={
            "ks": tuple(float(k) for k in ks),
            "num_images": len(rows),
            "num_texts": len(texts),
            "num_pairs": len(all_.pair_P2),
            "ties": "count against the model",
            "tie_tolerance": TIE_TOLERANCE,
        },
        notes=(*notes, *overlap_notes),
    )


def _positions(data: EvalData) -> list[int]:
    return [position for position, row in enumerate(data.rows) if row.texts and not row.is_train]


def _candidates(
    rows: Sequence[Row], image_ND: NDArray[np.float32], texts: Sequence[str], text_TD: NDArray[np.float32]
) -> _Candidates:
    """`texts` and `text_TD` may hold more than the rows' own."""
    position = {text: number for number, text in enumerate(texts)}
    own = list(dict.fromkeys(text for row in rows for text in row.texts))
    number = {text: u for u, text in enumerate(own)}
    pairs = [(n, number[text]) for n, row in enumerate(rows) for text in dict.fromkeys(row.texts)]
    return _Candidates(list(rows), image_ND, own, text_TD[[position[text] for text in own]], np.array(pairs))


def _usable_ks(ks: Sequence[int], candidates: _Candidates) -> tuple[tuple[int, ...], list[str]]:
    """Those below the number of candidates, and what to say of the others."""
    usable = usable_ks(ks, len(candidates.rows), len(candidates.texts))
    left_out = [str(k) for k in ks if k not in usable]
    if not left_out:
        return usable, []
    fewest = min(len(candidates.rows), len(candidates.texts))
    return usable, [f"recall@{', @'.join(left_out)} is left out: with {fewest} candidates it is 1 for any model."]


def _metrics(
    candidates: _Candidates,
    image_rank: NDArray[np.int64],
    text_rank: NDArray[np.int64],
    groups: ResamplingGroups,
    ks: tuple[int, ...],
    settings: EvaluationSettings,
) -> dict[str, Metric]:
    resampling: dict[str, Any] = {
        "num_resamples": settings.num_resamples,
        "confidence": settings.confidence,
        "seed": settings.seed,
    }
    estimates = rank_metrics(image_rank, text_rank, groups, ks=ks, **resampling)
    sizes = {"num_texts": len(candidates.texts), "num_images": len(candidates.rows)}
    chance = chance_levels(candidates.pair_P2, ks=ks, **sizes)
    if set(_PEERS_KS) < set(ks):
        name = "mean_recall_5_10_50"
        estimates[name] = mean_recall(image_rank, text_rank, groups, ks=_PEERS_KS, **resampling)
        chance[name] = chance_levels(candidates.pair_P2, ks=_PEERS_KS, **sizes)["mean_recall"]
    metrics: dict[str, Metric] = {}
    for name, estimate in estimates.items():
        is_rank = name.endswith("median_rank")
        metrics[name] = Metric.of(estimate, chance.get(name), is_share=not is_rank, lower_is_better=is_rank)
    return metrics


def _without_overlap(
    task: RetrievalTask, given: TaskInput, positions: Sequence[int], all_: _Candidates, metrics: Mapping[str, Metric]
) -> tuple[dict[str, Metric], list[str]]:
    """Images that the training data holds are neither queries nor candidates, nor are texts that only they have."""
    if given.overlap_N is None or not given.overlap_N[positions].any():
        return {}, []
    kept = np.flatnonzero(~given.overlap_N[positions])
    num_texts = len({text for n in kept for text in all_.rows[n].texts})
    if min(len(kept), num_texts) < 2:
        few = f"Without the overlap {len(kept)} images with {num_texts} distinct texts are left: too few."
        return undefined(metrics), [few]
    rest = _candidates([all_.rows[n] for n in kept], all_.image_ND[kept], all_.texts, all_.text_UD)
    ks, notes = _usable_ks(task.ks, rest)
    notes = [f"Without the overlap: {note}" for note in notes]
    if not ks:
        return undefined(metrics), notes
    image_rank, text_rank = retrieval_ranks(rest.image_ND, rest.text_UD, rest.pair_P2)
    groups = resampling_groups(rest.pair_P2, len(rest.rows), len(rest.texts), rest.patients)
    without = _metrics(rest, image_rank, text_rank, groups, ks, given.settings)
    if ks != _usable_ks(task.ks, all_)[0]:
        del without["mean_recall"]  # over other ks it is another number
    notes.append(
        f"Without the overlap there are {len(rest.rows)} images and {len(rest.texts)} texts to choose from, and among "
        "fewer candidates recall is higher for any model."
    )
    return without, notes


def _write_ranks(
    given: TaskInput,
    candidates: _Candidates,
    image_rank: NDArray[np.int64],
    text_rank: NDArray[np.int64],
    groups: ResamplingGroups,
) -> None:
    """Texts are named by their number, in the order of their first image: the same for every model on this set. The
    patient is the group that is resampled: an image, its texts and its patient's other images, where these are linked;
    else a text's patient is that of its images, if they have one in common."""
    patients: list[set[str | None]] = [set() for _ in candidates.texts]
    for image, text in candidates.pair_P2.tolist():
        patients[text].add(candidates.rows[image].patient)
    of_image = [row.patient for row in candidates.rows]
    of_text = [next(iter(found)) if len(found) == 1 else None for found in patients]
    if groups.is_linked:
        of_image = [f"group-{group:06d}" for group in groups.image_N.tolist()]
        of_text = [f"group-{group:06d}" for group in groups.text_U.tolist()]
    images = (
        ("image_to_text", row.key, patient, rank + 1)
        for row, patient, rank in zip(candidates.rows, of_image, image_rank.tolist(), strict=True)
    )
    texts = (
        ("text_to_image", f"text-{u:06d}", patient, rank + 1)
        for u, (patient, rank) in enumerate(zip(of_text, text_rank.tolist(), strict=True))
    )
    write_table(given.out_dir / TABLES["retrieval"], ("direction", "key", "patient", "rank"), [*images, *texts])


def _curve(name: str, rank: NDArray[np.int64], num_candidates: int) -> Curve:
    k, recall = cumulative_match(rank, num_candidates)
    return Curve(kind="cumulative_match", name=name, x=tuple(k.tolist()), y=tuple(recall.tolist()))
