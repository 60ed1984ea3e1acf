"""Metrics of a classifier from its logits, whatever gave them: zero-shot prompts or a linear probe.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from pretrain.evaluation.metrics.calibration import adaptive_calibration_error, calibration_error
from pretrain.evaluation.metrics.statistics import (
    Bools,
    Estimate,
    Floats,
    Groups,
    Ints,
    accuracy,
    balanced_accuracy,
    bootstrap_interval,
    check_indices,
    prepare_auroc,
    proportion_interval,
    weighted_f1,
)
from pretrain.evaluation.results import Curve

#: Metrics of which less is better.
LOWER_IS_BETTER = frozenset({"calibration_error", "adaptive_calibration_error"})

_MAX_CLASS_CURVES = 20  # with more classes only the mean ROC curve is given: nobody reads 114 lines
_MAX_POINTS = 200


def softmax(logits: Floats) -> NDArray[np.float64]:
    """(N, C) float64, rows summing to 1."""
    shares: NDArray[np.float64] = scipy.special.softmax(logits.astype(np.float64), axis=1)
    return shares


def classification_metrics(
    labels: Ints,
    logits: Floats,
    groups: Groups | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """accuracy, balanced_accuracy, weighted_f1, auroc, both calibration errors and, from four classes, top_3_accuracy.

    auroc is the mean over classes, each against the rest, of the softmax's columns; with two classes that is the AUROC
    of the positive one, from the difference of the logits, which does not saturate. It is NaN when the labels hold a
    single class. Top-3 counts ties against the model: an image is right when fewer than three other classes are at
    least as probable. Intervals resample whole groups within classes.

    labels: (N,) integers in [0, C). logits: (N, C); log-probabilities do as well. groups: patient or lesion of each
    image. Raises InputError for labels outside the classes.
    """
    labels = check_labels(labels, len(logits), logits.shape[1])
    predicted = logits.argmax(axis=1)
    probabilities = softmax(logits)
    probability, is_right = probabilities.max(axis=1), predicted == labels
    num_classes = logits.shape[1]

    def estimate(statistic: Callable[..., float], *arrays: NDArray[Any], centred: bool = False) -> Estimate:
        return bootstrap_interval(
            statistic,
            arrays,
            groups=groups,
            strata=labels,
            num_resamples=num_resamples,
            confidence=confidence,
            seed=seed,
            centred=centred,
        )

    # both columns order as the softmax's do
    scores = logits - logits[:, ::-1] if num_classes == 2 else probabilities
    metrics = {
        "accuracy": estimate(accuracy, labels, predicted),
        "balanced_accuracy": estimate(balanced_accuracy, labels, predicted),
        "weighted_f1": estimate(weighted_f1, labels, predicted),
        "auroc": estimate(prepare_auroc(labels, scores), np.arange(len(labels))),
    }
    if num_classes > 3:
        metrics["top_3_accuracy"] = estimate(np.mean, in_top_k(logits, labels, 3))
    for name, error in (
        ("calibration_error", calibration_error),
        ("adaptive_calibration_error", adaptive_calibration_error),
    ):
        metrics[name] = _at_least_0(estimate(error, probability, is_right, centred=True))
    return metrics


def chance_levels(num_classes: int) -> dict[str, float]:
    """What guessing each class equally often gives; weighted_f1 and calibration have no such constant."""
    levels = {"accuracy": 1 / num_classes, "balanced_accuracy": 1 / num_classes, "auroc": 0.5}
    return levels | ({"top_3_accuracy": 3 / num_classes} if num_classes > 3 else {})


def per_class_recall(
    labels: Ints, predicted: Ints, classnames: Sequence[str], groups: Groups | None = None, confidence: float = 0.95
) -> dict[str, Estimate]:
    """Recall of each class, in the order of `classnames`, with Wilson intervals; `n` counts the class's images.

    labels, predicted: (N,) integers in [0, C). A class without images has n = 0 and NaN.
    """
    labels = check_labels(labels, len(predicted), len(classnames))
    recalls: dict[str, Estimate] = {}
    for code, name in enumerate(classnames):
        rows = np.flatnonzero(labels == code)
        own_groups = None if groups is None else [groups[row] for row in rows.tolist()]
        recalls[name] = proportion_interval(predicted[rows] == code, own_groups, confidence)
    return recalls


def confusion_matrix(labels: Ints, predicted: Ints, num_classes: int) -> NDArray[np.int64]:
    """Counts (C, C): row = true class, column = predicted class. labels, predicted: (N,) integers in [0, C)."""
    labels = check_labels(labels, len(predicted), num_classes)
    counts: NDArray[np.int64] = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def roc_curves(labels: Ints, logits: Floats, classnames: Sequence[str]) -> tuple[Curve, ...]:
    """Of the second class where there are two; else the mean over classes, each against the rest, then each class.

    The mean is of the true positive rates at equal false positive rates. x: false positive rate, y: true positive
    rate, at most 200 points a curve. Classes that every image or no image has are left out; () when none is left.
    With more than 20 classes the mean stands alone.
    """
    is_binary = len(classnames) == 2
    scores = logits - logits[:, ::-1] if is_binary else softmax(logits)
    curves = []
    for code in (1,) if is_binary else range(len(classnames)):
        if 0 < np.count_nonzero(labels == code) < len(labels):
            false_positive, true_positive, _ = roc_curve(labels == code, scores[:, code])
            curves.append((classnames[code], false_positive, true_positive))
    if is_binary or not curves:
        return tuple(_roc(*curve) for curve in curves)
    grid = np.linspace(0, 1, _MAX_POINTS)
    # at one x several y: the last, where the curve leaves it upwards, as numpy.interp takes it
    mean = np.mean([np.interp(grid, x, y) for _, x, y in curves], axis=0)
    of_classes = [_roc(*curve) for curve in curves] if len(curves) <= _MAX_CLASS_CURVES else []
    return (_roc("mean over classes", np.r_[0, grid], np.r_[0, mean]), *of_classes)


def top_predictions(shares: Floats, classnames: Sequence[str], k: int = 3) -> list[list[tuple[str, float]]]:
    """For each row of `shares` (N, C) the k most probable classes as (name, probability), the most probable first."""
    order = np.argsort(-shares, axis=1, kind="stable")[:, :k]
    return [[(classnames[c], float(row[c])) for c in best] for row, best in zip(shares, order, strict=True)]


def in_top_k(logits: Floats, labels: Ints, k: int) -> Bools:
    """Whether fewer than k other classes are at least as probable as the true one: (N,)."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    in_top: Bools = (logits >= own).sum(axis=1) - 1 < k  # the class itself is one of those counted
    return in_top


def check_labels(labels: Ints, num_rows: int, num_classes: int) -> NDArray[np.int64]:
    """`labels` as (N,) int64 in [0, C), or InputError naming the first row that is not."""
    remedy = "leave out images whose class is not listed"
    return check_indices(labels, "labels", num_rows, num_classes, remedy)


def _roc(name: str, false_positive: Floats, true_positive: Floats) -> Curve:
    """Thinned evenly along x + y, which grows along the whole curve, the steep beginning included."""
    along = false_positive + true_positive
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], _MAX_POINTS)))
    return Curve(kind="roc", name=name, x=tuple(false_positive[kept].tolist()), y=tuple(true_positive[kept].tolist()))


def _at_least_0(estimate: Estimate) -> Estimate:
    return Estimate(estimate.value, max(estimate.low, 0.0), estimate.high, estimate.n)
