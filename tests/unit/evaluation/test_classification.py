"""ROC curves and the AUROC of many draws, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, roc_auc_score

from pretrain.evaluation.metrics.classification import classification_metrics, roc_curves, softmax
from pretrain.evaluation.metrics.statistics import macro_auroc, prepare_auroc


def scored(num_rows: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_rows)
    return labels, rng.normal(size=(num_rows, num_classes)) + 1.2 * np.eye(num_classes)[labels]


@pytest.mark.parametrize("decimals", [1, 8])
def test_auroc_of_drawn_rows_equals_that_of_the_rows_themselves(decimals: int) -> None:
    labels, logits = scored(200, 5)
    scores = np.round(softmax(logits), decimals)
    auroc = prepare_auroc(labels, scores)
    rng = np.random.default_rng(1)
    for size in (200, 200, 30):
        drawn = rng.integers(200, size=size)
        present = np.unique(labels[drawn])
        expected = np.mean([roc_auc_score(labels[drawn] == c, scores[drawn, c]) for c in present])
        assert auroc(drawn) == pytest.approx(expected, abs=1e-12)
        assert macro_auroc(labels[drawn], scores[drawn]) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_a_draw_without_two_classes_is_undefined() -> None:
    labels, scores = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    assert np.isnan(prepare_auroc(labels, scores)(np.array([0, 1, 1])))


def test_thinned_roc_keeps_the_area() -> None:
    labels, logits = scored(5000, 4)
    mean, *curves = roc_curves(labels, logits, ["a", "b", "c", "d"])
    areas = [roc_auc_score(labels == c, softmax(logits)[:, c]) for c in range(4)]
    assert [curve.name for curve in curves] == ["a", "b", "c", "d"]
    for curve, area in zip(curves, areas, strict=True):
        assert len(curve.x) <= 200 and (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
        assert auc(curve.x, curve.y) == pytest.approx(area, abs=5e-4)
    assert mean.name == "mean over classes" and auc(mean.x, mean.y) == pytest.approx(np.mean(areas), abs=2e-3)


def test_roc_of_two_classes_is_the_second_ones() -> None:
    labels, logits = scored(300, 2)
    (curve,) = roc_curves(labels, logits, ["benign", "malignant"])
    assert curve.name == "malignant"
    assert auc(curve.x, curve.y) == pytest.approx(roc_auc_score(labels, logits[:, 1] - logits[:, 0]), abs=1e-3)


def test_roc_leaves_out_what_has_no_curve() -> None:
    labels, logits = scored(300, 3)
    labels[labels == 2] = 0
    assert [curve.name for curve in roc_curves(labels, logits, ["a", "b", "c"])] == ["mean over classes", "a", "b"]
    assert roc_curves(np.zeros(300, dtype=int), logits, ["a", "b", "c"]) == ()
    labels, logits = scored(400, 30)
    assert [curve.name for curve in roc_curves(labels, logits, [f"{c}" for c in range(30)])] == ["mean over classes"]


def test_calibration_metrics_are_of_the_predicted_class() -> None:
    labels, logits = scored(400, 4)
    metrics = classification_metrics(labels, logits, num_resamples=50)
    shares = softmax(logits)
    is_right = shares.argmax(axis=1) == labels
    in_bins = np.ceil(shares.max(axis=1) * 15)
    gaps = [(is_right[in_bins == b] - shares.max(axis=1)[in_bins == b]).sum() for b in range(1, 16)]
    assert metrics["calibration_error"].value == pytest.approx(np.abs(gaps).sum() / 400)
    for name in ("calibration_error", "adaptive_calibration_error"):
        assert 0 <= metrics[name].low <= metrics[name].value <= metrics[name].high <= 1
    hot = classification_metrics(labels, 50 * logits, num_resamples=10)
    assert hot["calibration_error"].value > metrics["calibration_error"].value
    assert hot["auroc"].value != metrics["auroc"].value and hot["accuracy"].value == metrics["accuracy"].value
