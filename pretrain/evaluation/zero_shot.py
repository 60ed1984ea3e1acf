"""Zero-shot classification from features: class names in templates against images (Radford et al., 2021, section 3.1).

Shapes: N images, C classes, T texts, D embedding width. Features are unit vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.statistics import (
    Bools,
    Estimate,
    Floats,
    Groups,
    Ints,
    accuracy,
    balanced_accuracy,
    bootstrap_interval,
    check_features,
    check_indices,
    macro_auroc,
    proportion_interval,
    weighted_f1,
)


def load_templates(path: Path, name: str = "dermatology") -> list[str]:
    """The list called `name` in a JSON file of template lists (`configs/eval/templates.json`).

    Raises InputError when the file or the list is missing or a template has not exactly one `{}`.
    """
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such template file; one that exists is configs/eval/templates.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(lists, dict) or name not in lists:
        known = ", ".join(lists) if isinstance(lists, dict) else "none"
        raise InputError(f"{path}: no template list named {name!r}; it holds: {known}")
    templates = lists[name]
    if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
        raise InputError(f"{path}: {name}: expected a list of strings")
    try:
        _check_templates(templates)
    except InputError as error:
        raise InputError(f"{path}: {name}: {error}") from None
    return templates


def build_classifier(
    encode_texts: Callable[[list[str]], Floats], classnames: Sequence[str], templates: Sequence[str]
) -> Floats:
    """Per class, the mean of its templates' unit features, normalised: (C, D), in the features' dtype.

    The same numbers as `open_clip.build_zero_shot_classifier`, transposed. `encode_texts` is called once with all
    C x templates texts, class by class, and returns (T, D) unit features; batching is its business.
    Raises InputError for no classes, a repeated class, a template without exactly one `{}`, or an undefined feature.
    """
    _check_templates(templates)
    if not classnames or len(set(classnames)) != len(classnames):
        raise InputError(f"classnames: expected distinct names, at least one; got {list(classnames)}")
    # replace, not format: a class name or template is data and must not reach attributes
    texts = [template.replace("{}", name) for name in classnames for template in templates]
    features = np.asarray(encode_texts(texts))
    check_features(features, "text features")
    if len(features) != len(texts):
        raise InputError(f"text features: {len(features)} rows for {len(texts)} texts")
    means = features.reshape(len(classnames), len(templates), -1).mean(axis=1)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    if not norms.all():
        raise InputError(f"class {classnames[int(np.argmin(norms))]!r}: its templates' features cancel to zero")
    classifier: Floats = means / norms
    return classifier


def probabilities(image_features: Floats, classifier: Floats, logit_scale: float) -> NDArray[np.float64]:
    """Softmax over classes of `logit_scale` x cosine: (N, C) float64, rows summing to 1.

    image_features: (N, D) unit. classifier: (C, D) unit. logit_scale: the multiplier itself, exp of the parameter.
    """
    logits = _logits(image_features, classifier, logit_scale)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return shares


def zero_shot_metrics(
    image_features: Floats,
    labels: Ints,
    classifier: Floats,
    logit_scale: float,
    groups: Groups | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """accuracy, balanced_accuracy, weighted_f1, auroc (macro, one against rest) and, from four classes, top_3_accuracy.

    With two classes auroc is the binary one. Intervals resample whole groups within classes. auroc is NaN when the
    labels hold a single class. Top-3 counts ties against the model: an image is right when fewer than three other
    classes are at least as probable.

    image_features: (N, D) unit. labels: (N,) integers in [0, C). classifier: (C, D). logit_scale: exp of the parameter.
    groups: patient or lesion of each image. Raises InputError for labels outside the classes or undefined features.
    """
    logits = _logits(image_features, classifier, logit_scale)
    labels = _check_labels(labels, len(image_features), len(classifier))
    predicted = logits.argmax(axis=1)

    def estimate(statistic: Callable[..., float], scores: NDArray[np.generic]) -> Estimate:
        return bootstrap_interval(
            statistic,
            [labels, scores],
            groups=groups,
            strata=labels,
            num_resamples=num_resamples,
            confidence=confidence,
            seed=seed,
        )

    if len(classifier) == 2:
        scores = logits - logits[:, ::-1]  # orders as the softmax does, and does not saturate at 1
    else:
        scores = probabilities(image_features, classifier, logit_scale)
    metrics = {
        "accuracy": estimate(accuracy, predicted),
        "balanced_accuracy": estimate(balanced_accuracy, predicted),
        "weighted_f1": estimate(weighted_f1, predicted),
        "auroc": estimate(macro_auroc, scores),
    }
    if len(classifier) > 3:
        metrics["top_3_accuracy"] = estimate(_share, _in_top_k(logits, labels, 3))
    return metrics


def chance_levels(num_classes: int) -> dict[str, float]:
    """What guessing each class equally often gives; weighted_f1 has no such constant and is left out."""
    levels = {"accuracy": 1 / num_classes, "balanced_accuracy": 1 / num_classes, "auroc": 0.5}
    return levels | ({"top_3_accuracy": 3 / num_classes} if num_classes > 3 else {})


def per_class_recall(
    labels: Ints, predicted: Ints, classnames: Sequence[str], groups: Groups | None = None, confidence: float = 0.95
) -> dict[str, Estimate]:
    """Recall of each class, in the order of `classnames`, with Wilson intervals; `n` counts the class's images.

    labels, predicted: (N,) integers in [0, C). A class without images has n = 0 and NaN.
    """
    labels = _check_labels(labels, len(predicted), len(classnames))
    recalls: dict[str, Estimate] = {}
    for code, name in enumerate(classnames):
        rows = np.flatnonzero(labels == code)
        own_groups = None if groups is None else [groups[row] for row in rows.tolist()]
        recalls[name] = proportion_interval(predicted[rows] == code, own_groups, confidence)
    return recalls


def confusion_matrix(labels: Ints, predicted: Ints, num_classes: int) -> NDArray[np.int64]:
    """Counts (C, C): row = true class, column = predicted class. labels, predicted: (N,) integers in [0, C)."""
    labels = _check_labels(labels, len(predicted), num_classes)
    counts: NDArray[np.int64] = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def top_predictions(shares: Floats, classnames: Sequence[str], k: int = 3) -> list[list[tuple[str, float]]]:
    """For each row of `shares` (N, C) the k most probable classes as (name, probability), the most probable first."""
    order = np.argsort(-shares, axis=1, kind="stable")[:, :k]
    return [[(classnames[c], float(row[c])) for c in best] for row, best in zip(shares, order, strict=True)]


def _share(_labels: Ints, is_right: Bools) -> float:
    return float(np.mean(is_right))


def _in_top_k(logits: NDArray[np.float64], labels: Ints, k: int) -> Bools:
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    in_top: Bools = (logits >= own).sum(axis=1) - 1 < k  # the class itself is one of those counted
    return in_top


def _logits(image_features: Floats, classifier: Floats, logit_scale: float) -> NDArray[np.float64]:
    check_features(image_features, "image features")
    check_features(classifier, "classifier")
    if image_features.shape[1] != classifier.shape[1]:
        raise InputError(f"image features have width {image_features.shape[1]}, the classifier {classifier.shape[1]}")
    logits: NDArray[np.float64] = logit_scale * (image_features.astype(np.float64) @ classifier.T.astype(np.float64))
    return logits


def _check_templates(templates: Sequence[str]) -> None:
    if not templates:
        raise InputError("templates: expected at least one")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"template {template!r}: write {{}} exactly once, where the class name goes")


def _check_labels(labels: Ints, num_rows: int, num_classes: int) -> NDArray[np.int64]:
    remedy = "leave out images whose class is not listed"
    return check_indices(labels, "labels", num_rows, num_classes, remedy)
