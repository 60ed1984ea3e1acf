"""Linear probe of a data set's labels on frozen features, over shares of the labels and, if asked for, few shots.

Shapes: N images to test on, S seeds, C classes, L width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.config import EvaluationSettings, ProbeTask
from pretrain.evaluation.interfaces import EvalData, Row, TaskInput
from pretrain.evaluation.methods.probe import few_shots, held_out_patients, probe, probe_cost, share_of_patients
from pretrain.evaluation.metrics.classification import chance_levels, confusion_matrix, per_class_recall
from pretrain.evaluation.metrics.groups import by_group
from pretrain.evaluation.metrics.statistics import (
    Bools,
    Ints,
    accuracy,
    balanced_accuracy,
    bootstrap_interval,
    prepare_auroc,
    weighted_f1,
)
from pretrain.evaluation.results import TABLES, Confusion, Curve, Metric, TaskResult, undefined
from pretrain.evaluation.tables import write_table
from pretrain.evaluation.tasks.notes import notes_on_groups

_OF_PREDICTED: dict[str, Callable[[Ints, Ints], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "weighted_f1": weighted_f1,
}
_METRICS = (*_OF_PREDICTED, "auroc")


@dataclass(frozen=True)
class _Labelled:
    """Positions in the data set of the images to train and to test on, with their labels as numbers of classes."""

    classnames: tuple[str, ...]
    train: NDArray[np.int64]
    train_label: NDArray[np.int64]
    train_patients: list[str | None]
    test: NDArray[np.int64]
    test_label: NDArray[np.int64]
    test_rows: list[Row]
    how: str

    @property
    def test_patients(self) -> list[str | None]:
        return [row.patient for row in self.test_rows]


@dataclass(frozen=True)
class _Amount:
    """What a share of the labels, or a number of shots, led to."""

    name: str  # "10%", "4_shots"
    value: float
    is_share: bool
    num_rows: float  # trained on, mean over the seeds
    probability_SNC: NDArray[np.float64]
    converged: tuple[bool, ...]

    @property
    def predicted_NS(self) -> NDArray[np.int64]:
        return self.probability_SNC.argmax(axis=2).T


def lacks(data: EvalData) -> str | None:
    labelled = [row for row in data.rows if row.label in data.classnames]
    train = [row for row in labelled if row.is_train]
    if len({row.label for row in train or labelled}) < 2:
        return "fewer than two classes have images to train on"
    if train:
        return None if len(train) < len(labelled) else "all labelled images are of the training part"
    known = {(row.label, row.patient) for row in labelled if row.patient is not None}
    if len(known) + sum(row.patient is None for row in labelled) == len({row.label for row in labelled}):
        return "no class has a second patient to test on"
    return None


def run(task: ProbeTask, given: TaskInput) -> TaskResult:
    """Trained on the data set's own training part, or where it has none on all but `test_fraction` of the patients.

    Values are means over the seeds, each of which draws other patients of the training part; intervals resample the
    patients tested on. The metric that models are ranked by is balanced accuracy at the largest share.

    Raises InputError where `lacks` has a reason, or the task neither shares nor shots.
    """
    settings = given.settings
    labelled = _split(given.data, task.test_fraction, settings.seed)
    features = given.features(task.layer)
    is_bad_N = ~np.isfinite(features).all(axis=1)
    if is_bad_N.any():
        raise InputError(
            f"features of layer {task.layer}: {is_bad_N.sum()} rows (first: {is_bad_N.argmax()}) are not finite; did "
            "training diverge?"
        )
    if not (task.shares or task.shots):
        raise InputError("probe: neither shares nor shots; give at least one")
    train_NL, test_NL = features[labelled.train], features[labelled.test]
    amounts = [
        *(_train(task, labelled, train_NL, test_NL, share, True, settings.seed) for share in sorted(task.shares)),
        *(_train(task, labelled, train_NL, test_NL, shots, False, settings.seed) for shots in sorted(task.shots)),
    ]
    _write_predictions(given, labelled, amounts)
    everything = np.ones(len(labelled.test), dtype=bool)
    by_amount = {amount.name: _metrics(labelled, amount, everything, settings) for amount in amounts}
    metrics = {f"{name}@{amount}": metric for amount, of in by_amount.items() for name, metric in of.items()}
    without_overlap, notes = _without_overlap(given, labelled, amounts, metrics)
    most = max(amounts, key=lambda amount: (amount.is_share, amount.value))
    primary = f"balanced_accuracy@{most.name}"
    predicted_N, names = most.predicted_NS[:, 0], labelled.classnames
    recalls = per_class_recall(labelled.test_label, predicted_N, names, labelled.test_patients, settings.confidence)
    counts = confusion_matrix(labelled.test_label, predicted_N, len(names))
    return TaskResult(
        task="probe",
        primary=primary,
        metrics=metrics,
        without_overlap=without_overlap,
        by_group=by_group(
            labelled.test_rows,
            primary,
            _over_seeds(balanced_accuracy),
            [labelled.test_label, most.predicted_NS],
            settings,
        ),
        per_class={name: Metric.of(recall, chance=1 / len(names)) for name, recall in recalls.items()},
        confusion=Confusion(classnames=names, counts=tuple(map(tuple, counts.tolist()))),
        curves=_curves(amounts, by_amount),
        settings=_settings(task, labelled, amounts, features.shape[1]),
        notes=(*_notes(task, given.data, labelled, amounts, most), *notes),
    )


def _split(data: EvalData, test_fraction: float, seed: int) -> _Labelled:
    if reason := lacks(data):
        raise InputError(f"{data.name}: no probe: {reason}")
    position = np.array([number for number, row in enumerate(data.rows) if row.label in data.classnames])
    rows = [data.rows[number] for number in position]
    code_of = {name: code for code, name in enumerate(data.classnames)}
    label = np.array([code_of[str(row.label)] for row in rows])
    patients = [row.patient for row in rows]
    if any(row.is_train for row in rows):
        is_test = np.array([not row.is_train for row in rows])
        how = "the data set's own training part"
    else:
        is_test = held_out_patients(label, patients, test_fraction, seed)
        what = "patients" if any(patients) else "images (patients are not known: one may be on both sides)"
        how = f"{test_fraction:g} of the {what} of each class tested on, drawn with seed {seed}"
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if len(test) == 0:
        raise InputError(f"{data.name}: no probe: training needs all patients, since so few have each class")
    return _Labelled(
        classnames=tuple(data.classnames),
        train=position[train],
        train_label=label[train],
        train_patients=[patients[row] for row in train],
        test=position[test],
        test_label=label[test],
        test_rows=[rows[row] for row in test],
        how=how,
    )


def _train(
    task: ProbeTask,
    labelled: _Labelled,
    train_NL: NDArray[np.float32],
    test_NL: NDArray[np.float32],
    value: float,
    is_share: bool,
    first_seed: int,
) -> _Amount:
    """Once a seed; with all labels there is nothing to draw, and one fit."""
    num_rows, scores = [], []
    for seed in range(first_seed, first_seed + (1 if is_share and value == 1 else task.num_seeds)):
        if is_share:
            drawn = share_of_patients(labelled.train_label, labelled.train_patients, value, seed)
        else:
            drawn = few_shots(labelled.train_label, labelled.train_patients, int(value), seed)
        num_rows.append(int(drawn.sum()))
        scores.append(
            probe(
                train_NL[drawn],
                labelled.train_label[drawn],
                test_NL,
                len(labelled.classnames),
                task.max_iterations,
            )
        )
    return _Amount(
        name=f"{100 * value:g}%" if is_share else f"{value}_shots",
        value=float(value),
        is_share=is_share,
        num_rows=float(np.mean(num_rows)),
        probability_SNC=np.stack([score.probability_NC for score in scores]),
        converged=tuple(score.has_converged for score in scores),
    )


# ---------------------------------------------------------------------------------------------- numbers


def _over_seeds(metric: Callable[[Ints, Ints], float]) -> Callable[[Ints, Ints], float]:
    """The metric's mean over the columns of predictions (N, S)."""
    return lambda label_N, predicted_NS: float(np.mean([metric(label_N, column) for column in predicted_NS.T]))


def _metrics(labelled: _Labelled, amount: _Amount, kept_N: Bools, settings: EvaluationSettings) -> dict[str, Metric]:
    """Of the test images kept, with intervals over their patients."""
    label_N, predicted_NS = labelled.test_label[kept_N], amount.predicted_NS[kept_N]
    of_seed = [prepare_auroc(label_N, score_NC[kept_N]) for score_NC in amount.probability_SNC]
    statistics: dict[str, tuple[Callable[..., float], list[NDArray[np.int64]]]] = {
        name: (_over_seeds(metric), [label_N, predicted_NS]) for name, metric in _OF_PREDICTED.items()
    }
    statistics["auroc"] = (lambda drawn: float(np.mean([auroc(drawn) for auroc in of_seed])), [np.arange(len(label_N))])
    chance = chance_levels(len(labelled.classnames))
    patients = [patient for patient, is_kept in zip(labelled.test_patients, kept_N, strict=True) if is_kept]
    metrics: dict[str, Metric] = {}
    for name, (statistic, arrays) in statistics.items():
        estimate = bootstrap_interval(
            statistic,
            arrays,
            groups=patients,
            strata=label_N,
            **settings.resampling,
        )
        metrics[name] = Metric.of(estimate, chance.get(name))
    return metrics


def _without_overlap(
    given: TaskInput, labelled: _Labelled, amounts: Sequence[_Amount], metrics: Mapping[str, Metric]
) -> tuple[dict[str, Metric], list[str]]:
    """The same probes, on the test images that the encoder's training data does not hold."""
    if given.overlap_N is None:
        return {}, []
    notes = []
    if num_trained_on := int(given.overlap_N[labelled.train].sum()):
        notes.append(
            f"{num_trained_on} of the {len(labelled.train)} images that the probe learns from are in the encoder's "
            "training data."
        )
    if not given.overlap_N[labelled.test].any():
        return {}, notes
    kept_N = ~given.overlap_N[labelled.test]
    if not kept_N.any():
        return undefined(metrics), [*notes, "All images tested on are in the encoder's training data."]
    return {
        f"{name}@{amount.name}": metric
        for amount in amounts
        for name, metric in _metrics(labelled, amount, kept_N, given.settings).items()
    }, notes


def _curves(amounts: Sequence[_Amount], metrics: dict[str, dict[str, Metric]]) -> tuple[Curve, ...]:
    """x: share of the labels, or images a class."""
    curves = []
    for is_share in (True, False):
        chosen = [amount for amount in amounts if amount.is_share == is_share]
        for name in _METRICS if len(chosen) > 1 else ():
            points = [(amount.value, metrics[amount.name][name]) for amount in chosen]
            defined = [(x, m.value, m.low, m.high) for x, m in points if None not in (m.value, m.low, m.high)]
            if defined:
                x, y, low, high = zip(*defined, strict=True)
                curve_name = name if is_share else f"{name}, few-shot"
                curves.append(Curve(kind="efficiency", name=curve_name, x=x, y=y, low=low, high=high))
    return tuple(curves)


# ---------------------------------------------------------------------------------------------- what was done


def _settings(
    task: ProbeTask, labelled: _Labelled, amounts: Sequence[_Amount], width: int
) -> dict[str, str | int | float | tuple[str, ...] | tuple[float, ...]]:
    spread = {
        f"{name}_sd_over_seeds": tuple(
            float(np.std([metric(labelled.test_label, column) for column in amount.predicted_NS.T], ddof=1))
            if len(amount.converged) > 1
            else 0.0
            for amount in amounts
        )
        for name, metric in _OF_PREDICTED.items()
    }
    return {
        "layer": task.layer,
        "width": width,
        "standardised": "no",
        "C": probe_cost(width, len(np.unique(labelled.train_label))),
        "max_iterations": task.max_iterations,
        "num_seeds": task.num_seeds,
        "split": labelled.how,
        "num_train": len(labelled.train),
        "num_test": len(labelled.test),
        "amounts": tuple(amount.name for amount in amounts),
        "mean_num_trained_on": tuple(amount.num_rows for amount in amounts),
        **spread,
    }


def _notes(
    task: ProbeTask, data: EvalData, labelled: _Labelled, amounts: Sequence[_Amount], most: _Amount
) -> list[str]:
    notes = []
    if len(most.converged) > 1:
        notes.append("Recalls of classes and the confusion matrix are of the first seed.")
    for amount in amounts:
        if not all(amount.converged):
            notes.append(
                f"{amount.name}: {amount.converged.count(False)} of {len(amount.converged)} fits had not converged "
                f"after {task.max_iterations} iterations."
            )
        if amount.is_share and amount.num_rows > 1.5 * amount.value * len(labelled.train):
            notes.append(
                f"{amount.name}: every class keeps a patient, so {amount.num_rows:.0f} of {len(labelled.train)} images "
                "are trained on."
            )
    if num_other := len(data.rows) - len(labelled.train) - len(labelled.test):
        notes.append(f"{num_other} images without a label, or with one that is no class here, are not used.")
    num_train, num_test = (
        np.bincount(label, minlength=len(labelled.classnames)) for label in (labelled.train_label, labelled.test_label)
    )
    for counts, where in ((num_train, "train on: they cannot be predicted"), (num_test, "test on")):
        if empty := [name for name, count in zip(labelled.classnames, counts, strict=True) if not count]:
            notes.append(f"Classes without an image to {where}: {', '.join(empty)}.")
    notes += notes_on_groups(labelled.test_rows, labelled.test_label, "balanced_accuracy")
    trained_on = set(labelled.train_patients) - {None}
    if num_shared := sum(patient in trained_on for patient in labelled.test_patients):
        notes.append(f"{num_shared} images tested on are of patients whom the data set's own training part holds too.")
    for shots in task.shots:
        few = [name for name, count in zip(labelled.classnames, num_train, strict=True) if 0 < count < shots]
        if few:
            notes.append(f"{shots} shots: fewer images in training of {', '.join(few)}: all of them are used.")
    return notes


def _write_predictions(given: TaskInput, labelled: _Labelled, amounts: Sequence[_Amount]) -> None:
    first_seed = given.settings.seed
    write_table(
        given.out_dir / TABLES["probe"],
        ("share", "seed", "key", "patient", "label", "predicted"),
        (
            (
                amount.value if amount.is_share else f"{amount.value:g} shots",
                first_seed + number,
                row.key,
                row.patient,
                row.label,
                labelled.classnames[code],
            )
            for amount in amounts
            for number, column in enumerate(amount.predicted_NS.T.tolist())
            for row, code in zip(labelled.test_rows, column, strict=True)
        ),
    )
