"""Concept annotation: AUROC of each concept and their mean, by prompts with and without the concept.

Shapes: N rows, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.config import ConceptsTask, EvaluationSettings
from pretrain.evaluation.interfaces import JOINT, EvalData, Row, TaskInput
from pretrain.evaluation.methods.concepts import (
    PROMPTS,
    SCALE,
    TERMS_PATH,
    aurocs,
    concept_scores,
    encode_prompts,
    find_synonyms,
    write_scores,
)
from pretrain.evaluation.metrics.groups import by_group
from pretrain.evaluation.metrics.statistics import Ints, bootstrap_interval, group_codes
from pretrain.evaluation.results import TABLES, ByGroup, Metric, TaskResult, digest_of

_PRIMARY = "mean_auroc"
_CHANCE = 0.5


def lacks(data: EvalData) -> str | None:
    """None where some concept is present in one image and absent from another."""
    rows = [row for row in data.rows if not row.is_train]
    seen = {(concept, present) for row in rows for concept, present in (row.concepts or {}).items()}
    if not seen:
        return "no image is annotated with concepts"
    if not any((concept, not present) in seen for concept, present in seen):
        return "no concept is present in one image and absent from another, and an AUROC needs both"
    return None


def run(task: ConceptsTask, given: TaskInput) -> TaskResult:
    """Scores of all images into concept_scores.csv. An image without an annotation of a concept is left out of that
    concept's AUROC alone. The mean is over the concepts with enough images of both kinds (`task.min_images`)."""
    positions = np.flatnonzero([not row.is_train for row in given.data.rows])
    rows = [given.data.rows[position] for position in positions.tolist()]
    concepts = tuple(dict.fromkeys(concept for row in rows for concept in row.concepts or ()))
    terms_path = TERMS_PATH if task.terms is None else task.terms
    synonyms, unlisted = find_synonyms(concepts, terms_path)
    prompts = encode_prompts(given.encoder.encode_texts, synonyms)
    score_NK = concept_scores(np.asarray(given.features(JOINT))[positions], prompts)
    present_NK = _annotations(rows, concepts)
    write_scores(given.out_dir / TABLES["concepts"], rows, concepts, score_NK, present_NK)
    scarcer_K = _num_scarcer(present_NK)
    in_mean_K = scarcer_K >= task.min_images
    overlap_N = None if given.overlap_N is None else given.overlap_N[positions]
    notes = _notes(concepts, scarcer_K, in_mean_K, unlisted, task.min_images)
    without_overlap = {}
    if overlap_N is not None and overlap_N.any():
        kept = np.flatnonzero(~overlap_N)
        still_in_mean_K = _num_scarcer(present_NK[kept]) >= task.min_images
        without_overlap[_PRIMARY] = _mean_auroc(rows, present_NK, score_NK, kept, still_in_mean_K, given.settings)
        if gone := _names(concepts, in_mean_K & ~still_in_mean_K):
            notes = (*notes, f"Too few images without the overlap, so not in the mean there: {gone}.")
    groups = _by_group(rows, present_NK, score_NK, in_mean_K, given.settings)
    if groups:
        notes = (*notes, "By group, the mean is over the concepts that some images of the group show and others lack.")
    all_rows = np.arange(len(rows))
    return TaskResult(
        task="concepts",
        primary=_PRIMARY,
        metrics={_PRIMARY: _mean_auroc(rows, present_NK, score_NK, all_rows, in_mean_K, given.settings)},
        without_overlap=without_overlap,
        by_group=groups,
        per_class={
            concepts[k]: _mean_auroc(
                rows, present_NK, score_NK, all_rows, np.arange(len(concepts)) == k, given.settings
            )
            for k in np.flatnonzero(scarcer_K)
        },
        settings={
            "prompts": tuple(with_it for with_it, _ in PROMPTS),
            "reference_prompts": tuple(without for _, without in PROMPTS),
            "scale": SCALE,
            "terms": terms_path.name,
            "terms_digest": digest_of(synonyms),
            "min_images": task.min_images,
            "concepts": concepts,
            "num_present": tuple((present_NK == 1).sum(axis=0).astype(float).tolist()),
            "num_absent": tuple((present_NK == 0).sum(axis=0).astype(float).tolist()),
            "concepts_in_mean": tuple(np.array(concepts)[in_mean_K].tolist()),
        },
        notes=notes,
    )


def _annotations(rows: Sequence[Row], concepts: Sequence[str]) -> NDArray[np.int8]:
    """(N, K): 1 = present, 0 = absent, -1 = not annotated."""
    return np.array([[(row.concepts or {}).get(concept, -1) for concept in concepts] for row in rows], dtype=np.int8)


def _num_scarcer(present_NK: NDArray[np.int8]) -> NDArray[np.int64]:
    """(K,): images that show the concept or images that do not, whichever are fewer."""
    fewer: NDArray[np.int64] = np.minimum((present_NK == 1).sum(axis=0), (present_NK == 0).sum(axis=0))
    return fewer


def _mean_auroc(
    rows: Sequence[Row],
    present_NK: NDArray[np.int8],
    score_NK: NDArray[np.float64],
    chosen_rows: Ints,
    chosen_K: NDArray[np.bool_],
    settings: EvaluationSettings,
) -> Metric:
    """Over the chosen rows and concepts; `n`: rows annotated for one of these. Undefined where no concept is chosen.

    Patients are resampled so that each resample has images with and without the concept that is scarcest in either;
    a concept that lacks one of the two in a resample is left out of the mean of that resample. There is no interval
    where all images of the scarcest kind are of one patient, who would be in every resample.
    """
    if not chosen_K.any():
        return Metric(value=None, n=0, chance=_CHANCE)
    known = chosen_rows[(present_NK[np.ix_(chosen_rows, chosen_K)] >= 0).any(axis=1)]
    present, scores = present_NK[np.ix_(known, chosen_K)], score_NK[np.ix_(known, chosen_K)]
    scarcest = present[:, _num_scarcer(present).argmin()]
    patients = [rows[row].patient for row in known.tolist()]
    estimate = bootstrap_interval(
        _mean_statistic(present, scores),
        [np.arange(len(known))],
        groups=patients,
        strata=scarcest,
        **settings.resampling,
    )
    metric = Metric.of(estimate, chance=_CHANCE)
    if min(_num_patients(patients, scarcest == kind) for kind in (0, 1)) < 2:
        metric = metric.model_copy(update={"low": None, "high": None})
    return metric


def _mean_statistic(present_NK: NDArray[np.int8], score_NK: NDArray[np.float64]) -> Callable[[Ints], float]:
    """Mean over the concepts that the given rows define; NaN where they define none."""
    of_rows = aurocs(present_NK, score_NK)

    def mean(rows_R: Ints) -> float:
        auroc_K = of_rows(rows_R)
        defined = ~np.isnan(auroc_K)
        return float(auroc_K[defined].mean()) if defined.any() else float("nan")

    return mean


def _num_patients(patients: Sequence[Hashable | None], chosen_N: NDArray[np.bool_]) -> int:
    return len(np.unique(group_codes(patients)[chosen_N]))


def _by_group(
    rows: Sequence[Row],
    present_NK: NDArray[np.int8],
    score_NK: NDArray[np.float64],
    in_mean_K: NDArray[np.bool_],
    settings: EvaluationSettings,
) -> tuple[ByGroup, ...]:
    known = np.flatnonzero((present_NK[:, in_mean_K] >= 0).any(axis=1))
    if not len(known):
        return ()
    statistic = _mean_statistic(present_NK[np.ix_(known, in_mean_K)], score_NK[np.ix_(known, in_mean_K)])
    own = [rows[row] for row in known.tolist()]
    return by_group(own, _PRIMARY, statistic, [np.arange(len(known))], settings, chance=_CHANCE)


def _notes(
    concepts: Sequence[str],
    scarcer_K: NDArray[np.int64],
    in_mean_K: NDArray[np.bool_],
    unlisted: Sequence[str],
    min_images: int,
) -> tuple[str, ...]:
    sentences = {
        "No AUROC, since all annotated images show the concept or none does": _names(concepts, scarcer_K == 0),
        f"Not in the mean, with fewer than {min_images} images that show the concept, or that do not": _names(
            concepts, (scarcer_K > 0) & ~in_mean_K
        ),
        "Not in the list of terms, so prompted by their own name": ", ".join(unlisted),
    }
    return tuple(f"{sentence}: {names}." for sentence, names in sentences.items() if names)


def _names(concepts: Sequence[str], chosen_K: NDArray[np.bool_]) -> str:
    return ", ".join(concept for concept, chosen in zip(concepts, chosen_K, strict=True) if chosen)
