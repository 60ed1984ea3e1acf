"""Zero-shot classification of a data set: templates x class names against its images.

Shapes: N images that are scored, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.config import EvaluationSettings, ZeroShotTask
from pretrain.evaluation.interfaces import JOINT, EvalData, Row, TaskInput
from pretrain.evaluation.methods.zero_shot import build_classifier, zero_shot_logits
from pretrain.evaluation.metrics.calibration import reliability_curve
from pretrain.evaluation.metrics.classification import (
    LOWER_IS_BETTER,
    chance_levels,
    classification_metrics,
    confusion_matrix,
    per_class_recall,
    roc_curves,
    softmax,
)
from pretrain.evaluation.metrics.groups import by_group
from pretrain.evaluation.metrics.statistics import Bools, accuracy, balanced_accuracy, macro_auroc
from pretrain.evaluation.results import TABLES, ByGroup, Confusion, Metric, TaskResult, undefined
from pretrain.evaluation.tables import write_table
from pretrain.evaluation.tasks.notes import notes_on_groups
from pretrain.prompts import DEFAULT_TEMPLATES, TEMPLATES_PATH, load_templates


@dataclass(frozen=True)
class Classified:
    """The images of a data set that have one of the classes as their label, outside its training part."""

    rows: Sequence[Row]  # N
    classnames: tuple[str, ...]
    label_N: NDArray[np.int64]
    logits_NC: NDArray[np.float64]
    overlap_N: Bools | None
    patients: Sequence[str | None]  # N
    template_list: str
    templates: tuple[str, ...]
    notes: tuple[str, ...]  # which rows are not among them

    @property
    def predicted_N(self) -> NDArray[np.int64]:
        predicted: NDArray[np.int64] = self.logits_NC.argmax(axis=1)
        return predicted


def lacks(data: EvalData) -> str | None:
    if len(data.classnames) < 2:
        return "fewer than two classes are named"
    if not any(is_scored(row, data.classnames) for row in data.rows):
        return "no image outside the training part has one of the classes as its label"
    return None


def run(task: ZeroShotTask, given: TaskInput) -> TaskResult:
    """Numbers of all labelled images, and zero_shot_probabilities.csv with a row for each.

    The metric that models are ranked by is balanced accuracy; with two classes AUROC, as is usual for ISIC 2020 and
    PH2. Group values are accuracies, and that metric.
    """
    classified = classify(given, task.templates, given.data.classnames)
    label_N, logits_NC, settings = classified.label_N, classified.logits_NC, given.settings
    classnames, predicted_N, probabilities_NC = classified.classnames, classified.predicted_N, softmax(logits_NC)
    _write_probabilities(given, classified, probabilities_NC)
    metrics = _metrics(classified, np.ones(len(label_N), dtype=bool), settings)
    recalls = per_class_recall(label_N, predicted_N, classnames, classified.patients, settings.confidence)
    primary = "auroc" if len(classnames) == 2 and metrics["auroc"].value is not None else "balanced_accuracy"
    return TaskResult(
        task="zero_shot",
        primary=primary,
        metrics=metrics,
        without_overlap=_without_overlap(classified, metrics, settings),
        by_group=_by_group(classified, primary, settings),
        per_class={name: Metric.of(recall, chance=1 / len(classnames)) for name, recall in recalls.items()},
        confusion=Confusion(
            classnames=classnames,
            counts=tuple(map(tuple, confusion_matrix(label_N, predicted_N, len(classnames)).tolist())),
        ),
        curves=(
            *roc_curves(label_N, logits_NC, classnames),
            reliability_curve(
                probabilities_NC.max(axis=1), predicted_N == label_N, classified.patients, settings.confidence
            ),
        ),
        settings={
            "templates": classified.template_list,
            "template_texts": classified.templates,
            "logit_scale": float(given.encoder.logit_scale),
            "num_classes": len(classnames),
        },
        notes=(*classified.notes, *notes_on_groups(classified.rows, label_N, primary)),
    )


def classify(given: TaskInput, template_list: str | None, classnames: tuple[str, ...]) -> Classified:
    """Logits of every image outside the training part whose label is one of `classnames`.

    Raises InputError where there is none, and for classes or templates that cannot be used.
    """
    rows = given.data.rows
    position_N = np.array([i for i, row in enumerate(rows) if is_scored(row, classnames)], dtype=np.int64)
    if len(position_N) == 0:
        raise InputError(f"{given.data.name}: no image outside the training part has one of the classes as its label")
    template_list = template_list or given.data.templates or DEFAULT_TEMPLATES
    templates = load_templates(TEMPLATES_PATH, template_list)
    classifier_CD = build_classifier(given.encoder.encode_texts, classnames, templates)
    image_ND = given.features(JOINT)[position_N]
    scored = [rows[position] for position in position_N]
    code_of = {name: code for code, name in enumerate(classnames)}
    label_N = np.array([code_of[str(row.label)] for row in scored])
    overlap_N = None if given.overlap_N is None else given.overlap_N[position_N]
    notes = _notes(rows, label_N, classnames, given.data.classnames)
    if overlap_N is not None and overlap_N.all():
        notes = (*notes, "The training data holds every image scored here: nothing is left without the overlap.")
    return Classified(
        rows=scored,
        classnames=classnames,
        label_N=label_N,
        logits_NC=zero_shot_logits(image_ND, classifier_CD, given.encoder.logit_scale),
        overlap_N=overlap_N,
        patients=[row.patient for row in scored],
        template_list=template_list,
        templates=tuple(templates),
        notes=notes,
    )


def is_scored(row: Row, classnames: Sequence[str]) -> bool:
    """Of one of the classes, and not in the data set's training part."""
    return not row.is_train and row.label in classnames


def _notes(
    rows: Sequence[Row], label_N: NDArray[np.int64], classnames: Sequence[str], of_the_data: Sequence[str]
) -> tuple[str, ...]:
    """What was left out, and why. Images of the data's other classes are for the caller to name, who chose."""
    notes = []
    if num_train := sum(row.is_train for row in rows):
        notes.append(f"{num_train} images of the data set's own training part are not scored.")
    if num_other := sum(not row.is_train and row.label not in of_the_data for row in rows):
        notes.append(f"{num_other} images without a label, or with one that is no class here, are not scored.")
    num_rows = np.bincount(label_N, minlength=len(classnames))
    if empty := [name for name, count in zip(classnames, num_rows, strict=True) if not count]:
        notes.append(f"Classes that can be predicted, but have no image: {', '.join(empty)}.")
    return tuple(notes)


def _metrics(classified: Classified, kept_N: Bools, settings: EvaluationSettings) -> dict[str, Metric]:
    """Of the rows kept."""
    estimates = classification_metrics(
        classified.label_N[kept_N],
        classified.logits_NC[kept_N],
        [classified.patients[row] for row in np.flatnonzero(kept_N).tolist()],
        **settings.resampling,
    )
    chance = chance_levels(len(classified.classnames))
    return {
        name: Metric.of(estimate, chance.get(name), lower_is_better=name in LOWER_IS_BETTER)
        for name, estimate in estimates.items()
    }


def _without_overlap(
    classified: Classified, metrics: Mapping[str, Metric], settings: EvaluationSettings
) -> dict[str, Metric]:
    """Of the images that the training data does not hold; {} where it holds none of them, undefined where all."""
    overlap_N = classified.overlap_N
    if overlap_N is None or not overlap_N.any():
        return {}
    if overlap_N.all():
        return undefined(metrics)
    return _metrics(classified, ~overlap_N, settings)


def _by_group(classified: Classified, primary: str, settings: EvaluationSettings) -> tuple[ByGroup, ...]:
    rows, label_N, logits_NC, predicted_N = (
        classified.rows,
        classified.label_N,
        classified.logits_NC,
        classified.predicted_N,
    )
    chance = chance_levels(len(classified.classnames))
    decided = [label_N, predicted_N]
    groups = by_group(rows, "accuracy", accuracy, decided, settings, chance=chance["accuracy"])
    if primary == "auroc":
        scored = [label_N, logits_NC - logits_NC[:, ::-1]]
        return groups + by_group(rows, primary, macro_auroc, scored, settings, chance=chance[primary])
    return groups + by_group(rows, primary, balanced_accuracy, decided, settings, chance=chance[primary])


def _write_probabilities(given: TaskInput, classified: Classified, probabilities_NC: NDArray[np.float64]) -> None:
    names = classified.classnames
    write_table(
        given.out_dir / TABLES["zero_shot"],
        ["key", "patient", "label", "predicted", *names],
        (
            [row.key, row.patient, row.label, names[predicted], *shares]
            for row, predicted, shares in zip(
                classified.rows, classified.predicted_N.tolist(), probabilities_NC.tolist(), strict=True
            )
        ),
    )
