"""The zero-shot prediction, scored over a hierarchy of diagnoses.

Shapes: N images that are scored, C classes that the hierarchy has, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.config import EvaluationSettings, HierarchyTask
from pretrain.evaluation.interfaces import EvalData, TaskInput
from pretrain.evaluation.methods.hierarchy import (
    Hierarchy,
    HierarchyScores,
    commonest_paths,
    hierarchy_of_paths,
    hierarchy_scores,
    levels_that_add_nothing,
    load_hierarchy,
    node_of_path,
    nodes_with_several_parents,
)
from pretrain.evaluation.metrics.groups import by_group
from pretrain.evaluation.metrics.statistics import bootstrap_interval
from pretrain.evaluation.results import TABLES, Metric, TaskResult, digest_of, undefined
from pretrain.evaluation.tables import write_table
from pretrain.evaluation.tasks import zero_shot
from pretrain.evaluation.tasks.zero_shot import Classified, classify, is_scored

DISTANCE = "tree_distance"

_MAX_NAMED = 5


def lacks(data: EvalData, task: HierarchyTask | None = None) -> str | None:
    """By default, and for a task without an ontology, the hierarchy is that of the rows' own paths."""
    if (reason := zero_shot.lacks(data)) is not None:
        return reason
    ontology = None if task is None else task.ontology
    node_of = _nodes_of_classes(ontology, data)[1]
    if (num_nodes := len(set(node_of.values()))) < 2:
        source = "its diagnosis paths have" if ontology is None else f"{ontology.name} has"
        remedy = "name an ontology that has them (hierarchy: {ontology: FILE})"
        where = "" if num_nodes == len(node_of) else f" at {num_nodes} place"
        return f"{source} {len(node_of)} of its classes{where}, and scoring needs two; {remedy}"
    return None if any(is_scored(row, list(node_of)) for row in data.rows) else "no image has a class of the hierarchy"


def run(task: HierarchyTask, given: TaskInput) -> TaskResult:
    """right_at_level_1 ... and tree_distance, and hierarchy_predictions.csv with a row an image.

    Candidates are the classes that the hierarchy has; the others are named, and their images left out. Raises
    InputError where `lacks` has a reason.
    """
    if reason := lacks(given.data, task):
        raise InputError(
            f"{given.data.name}: hierarchy: {reason}; give the task an ontology that has them, or leave it out"
        )
    hierarchy, node_of = _nodes_of_classes(task.ontology, given.data)
    classnames = tuple(name for name in given.data.classnames if name in node_of)
    classified = classify(given, task.templates, classnames)
    scores = hierarchy_scores(hierarchy, [node_of[name] for name in classnames])
    label_N, predicted_N = classified.label_N, classified.predicted_N
    right_LN = scores.right_LCC[:, label_N, predicted_N]
    distance_N = scores.distance_CC[label_N, predicted_N]
    _write_predictions(given.out_dir / TABLES["hierarchy"], classified, right_LN, distance_N)
    every = np.ones(len(label_N), dtype=bool)
    metrics = _metrics(classified, scores, every, given.settings)
    without_overlap = {}
    if classified.overlap_N is not None and classified.overlap_N.any():
        kept = ~classified.overlap_N
        without_overlap = _metrics(classified, scores, kept, given.settings) if kept.any() else undefined(metrics)
    return TaskResult(
        task="hierarchy",
        primary=DISTANCE,
        metrics=metrics,
        without_overlap=without_overlap,
        by_group=by_group(
            classified.rows, DISTANCE, np.mean, [distance_N], given.settings, is_share=False, lower_is_better=True
        ),
        settings={
            "templates": classified.template_list,
            "ontology": "diagnosis_path" if task.ontology is None else task.ontology.name,
            "ontology_digest": digest_of([node_of, np.nan_to_num(scores.distance_CC, nan=-1).tolist()]),
            "num_classes": len(classnames),
            "num_levels": scores.num_levels,
        },
        notes=(
            *_missing_notes(given.data, node_of),
            *classified.notes,
            *_level_notes(hierarchy, scores, [node_of[name] for name in classnames]),
        ),
    )


def _missing_notes(data: EvalData, node_of: Mapping[str, str]) -> list[str]:
    """The classes that the hierarchy does not have, and what they cost."""
    missing = [name for name in data.classnames if name not in node_of]
    if not missing:
        return []
    num_images = sum(is_scored(row, missing) for row in data.rows)
    return [f"Classes that the hierarchy does not have, left out with their {num_images} images: {', '.join(missing)}."]


def _level_notes(hierarchy: Hierarchy, scores: HierarchyScores, nodes: Sequence[str]) -> list[str]:
    """What makes a level worth less than its name says."""
    notes = []
    if levels := levels_that_add_nothing(scores):
        named = ", ".join(f"right_at_level_{level}" for level in levels)
        notes.append(f"Levels that tell no two of the classes apart that the level above does not: {named}.")
    if several := nodes_with_several_parents(hierarchy, nodes):
        shown = [f"{node} ({' and '.join(parents)})" for node, parents in list(several.items())[:_MAX_NAMED]]
        more = f"; {len(several) - len(shown)} more" if len(several) > len(shown) else ""
        notes.append(
            f"Nodes with several parents: {'; '.join(shown)}{more}. All parents count: a prediction is right at a "
            "level where it has the very ancestors that the label has there, so two classes below such a node agree in "
            "its parents, whichever of them is meant."
        )
    return notes


def _nodes_of_classes(ontology: Path | None, data: EvalData) -> tuple[Hierarchy, dict[str, str]]:
    """The hierarchy, and the node of each class that it has."""
    if ontology is not None:
        hierarchy = load_hierarchy(ontology)
        found = {name: hierarchy.find(name) for name in data.classnames}
        return hierarchy, {name: node for name, node in found.items() if node is not None}
    paths = commonest_paths([row.label for row in data.rows], [row.diagnosis_path for row in data.rows])
    own = {name: paths[name] for name in data.classnames if name in paths}
    return hierarchy_of_paths(own.values()), {name: node_of_path(path) for name, path in own.items()}


def _metrics(
    classified: Classified, scores: HierarchyScores, kept_N: NDArray[np.bool_], settings: EvaluationSettings
) -> dict[str, Metric]:
    """Of the rows kept. Chance: a class drawn evenly, for these rows."""
    label_N, predicted_N = classified.label_N[kept_N], classified.predicted_N[kept_N]
    patients = [classified.patients[row] for row in np.flatnonzero(kept_N).tolist()]

    def metric(values_CC: NDArray[np.floating] | NDArray[np.integer], is_share: bool) -> Metric | None:
        values_N = values_CC[label_N, predicted_N].astype(np.float64)
        scored = np.flatnonzero(~np.isnan(values_N))
        if len(scored) == 0:
            return None
        estimate = bootstrap_interval(
            np.mean,
            [values_N[scored]],
            groups=[patients[row] for row in scored.tolist()],
            strata=label_N[scored],
            **settings.resampling,
        )
        chance = float(values_CC[label_N[scored]].mean())
        return Metric.of(estimate, chance, is_share=is_share, lower_is_better=not is_share)

    named = {f"right_at_level_{number}": metric(values, True) for number, values in enumerate(scores.right_LCC, 1)}
    named[DISTANCE] = metric(scores.distance_CC, False)
    return {name: value for name, value in named.items() if value is not None}


def _write_predictions(
    path: Path, classified: Classified, right_LN: NDArray[np.float64], distance_N: NDArray[np.int64]
) -> None:
    names = classified.classnames
    levels = [f"right_at_level_{number}" for number in range(1, len(right_LN) + 1)]
    write_table(
        path,
        ["key", "patient", "label", "predicted", DISTANCE, *levels],
        (
            [row.key, row.patient, row.label, names[predicted], distance, *(None if r != r else int(r) for r in right)]
            for row, predicted, distance, right in zip(
                classified.rows,
                classified.predicted_N.tolist(),
                distance_N.tolist(),
                right_LN.T.tolist(),
                strict=True,
            )
        ),
    )
