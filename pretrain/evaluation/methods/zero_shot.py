"""Zero-shot classification from features: class names in templates against images (Radford et al., 2021, section 3.1).

Shapes: N images, C classes, T texts, D embedding width. Features are unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.metrics.classification import (
    softmax,
)
from pretrain.evaluation.metrics.statistics import Floats, check_features
from pretrain.prompts import check_templates


def build_classifier(
    encode_texts: Callable[[list[str]], Floats], classnames: Sequence[str], templates: Sequence[str]
) -> Floats:
    """Per class, the mean of its templates' unit features, normalised: (C, D), in the features' dtype.

    The same numbers as `open_clip.build_zero_shot_classifier`, transposed. `encode_texts` is called once with all
    C x templates texts, class by class, and returns (T, D) unit features; batching is its business.
    Raises InputError for no classes, a repeated class, a template without exactly one `{}`, or an undefined feature.
    """
    check_templates(templates)
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


def zero_shot_logits(image_features: Floats, classifier: Floats, logit_scale: float) -> NDArray[np.float64]:
    """`logit_scale` x cosine: (N, C) float64.

    image_features: (N, D) unit. classifier: (C, D) unit. logit_scale: the multiplier itself, exp of the parameter.
    Raises InputError for features that are undefined, not of unit length, or of two widths.
    """
    check_features(image_features, "image features")
    check_features(classifier, "classifier")
    if image_features.shape[1] != classifier.shape[1]:
        raise InputError(f"image features have width {image_features.shape[1]}, the classifier {classifier.shape[1]}")
    logits: NDArray[np.float64] = logit_scale * (image_features.astype(np.float64) @ classifier.T.astype(np.float64))
    return logits


def probabilities(image_features: Floats, classifier: Floats, logit_scale: float) -> NDArray[np.float64]:
    """Softmax over classes of `zero_shot_logits`: (N, C) float64, rows summing to 1."""
    return softmax(zero_shot_logits(image_features, classifier, logit_scale))
