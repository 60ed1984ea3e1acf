"""Zero-shot classification, against open_clip's own builder with a real (tiny, random) model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import roc_auc_score

from data_prep.errors import InputError
from pretrain.evaluation.methods.zero_shot import build_classifier, probabilities, zero_shot_logits
from pretrain.evaluation.metrics.classification import (
    chance_levels,
    classification_metrics,
    confusion_matrix,
    per_class_recall,
    top_predictions,
)
from pretrain.prompts import load_templates

TEMPLATES_PATH = Path(__file__).parents[3] / "configs" / "eval" / "templates.json"
CLASSNAMES = ["melanoma", "basal cell carcinoma", "nevus", "actinic keratosis", "lichen planus"]


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def noisy_task(
    num_classes: int, num_rows: int = 200, width: int = 16, noise: float = 0.5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images scattered around the class vectors: features (N, D), labels (N,), classifier (C, D)."""
    rng = np.random.default_rng(seed)
    classifier = unit(rng.normal(size=(num_classes, width)))
    labels = rng.integers(num_classes, size=num_rows)
    return unit(classifier[labels] + noise * rng.normal(size=(num_rows, width))), labels, classifier


def test_classifier_equals_open_clip() -> None:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    tokenizer = open_clip.SimpleTokenizer()
    templates = load_templates(TEMPLATES_PATH)
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSNAMES, templates, num_classes_per_batch=2)

    def encode_texts(texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            return model.encode_text(tokenizer(texts), normalize=True).numpy()

    classifier = build_classifier(encode_texts, CLASSNAMES, templates)
    assert classifier.shape == (5, 24) and classifier.dtype == np.float32
    np.testing.assert_allclose(classifier, expected.T.numpy(), atol=1e-6)


def test_templates_on_disk() -> None:
    templates = load_templates(TEMPLATES_PATH)
    assert len(set(templates)) == 8 and all(template.count("{}") == 1 for template in templates)
    assert load_templates(TEMPLATES_PATH, "plain") == ["{}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"mine": ["skin with {}", "skin"]}', r"templates.json: mine: template 'skin': write \{\} exactly once"),
        ('{"mine": []}', "mine: templates: expected at least one"),
        ('{"mine": "{}"}', "mine: expected a list of strings"),
        ('{"other": ["{}"]}', "no template list named 'mine'; it holds: other"),
        ('{"mine": ', "not valid JSON"),
    ],
)
def test_bad_template_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "templates.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_templates(path, "mine")


def test_classnames_are_data_not_format_strings() -> None:
    seen: list[str] = []

    def encode_texts(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.eye(len(texts))

    build_classifier(encode_texts, ["{0.__class__}", "a {} b"], ["skin: {}"])
    assert seen == ["skin: {0.__class__}", "skin: a {} b"]
    with pytest.raises(InputError, match="distinct names"):
        build_classifier(encode_texts, ["nevus", "nevus"], ["{}"])


def zero_shot_metrics(features, labels, classifier, logit_scale, **options):  # type: ignore[no-untyped-def]
    return classification_metrics(labels, zero_shot_logits(features, classifier, logit_scale), **options)


def test_probabilities_are_a_softmax_of_scaled_cosines() -> None:
    features, _, classifier = noisy_task(num_classes=4)
    expected = torch.softmax(100.0 * torch.from_numpy(features) @ torch.from_numpy(classifier).T, dim=1).numpy()
    np.testing.assert_allclose(probabilities(features, classifier, 100.0), expected, atol=1e-12)


def test_metrics_of_many_classes() -> None:
    features, labels, classifier = noisy_task(num_classes=5)
    metrics = zero_shot_metrics(features, labels, classifier, 20.0, num_resamples=100)
    shares = probabilities(features, classifier, 20.0)
    in_top_3 = [label in np.argsort(-row)[:3] for label, row in zip(labels, shares, strict=True)]
    assert metrics["accuracy"].value == pytest.approx(np.mean(shares.argmax(axis=1) == labels))
    assert metrics["top_3_accuracy"].value == pytest.approx(np.mean(in_top_3))
    assert metrics["auroc"].value == pytest.approx(roc_auc_score(labels, shares, multi_class="ovr", average="macro"))
    assert all(0 <= m.low <= m.value <= m.high <= 1 and m.n == 200 for m in metrics.values())
    without_chance = {"weighted_f1", "calibration_error", "adaptive_calibration_error"}
    assert set(metrics) == set(chance_levels(5)) | without_chance
    assert chance_levels(5)["top_3_accuracy"] == pytest.approx(0.6)


def test_two_classes_use_the_binary_auroc_even_where_softmax_saturates() -> None:
    features, labels, classifier = noisy_task(num_classes=2, noise=1.0)
    metrics = zero_shot_metrics(features, labels, classifier, 10_000.0, num_resamples=20)
    margin = features @ (classifier[1] - classifier[0])
    assert metrics["auroc"].value == pytest.approx(roc_auc_score(labels, margin), abs=1e-12)
    assert "top_3_accuracy" not in metrics


def test_groups_widen_the_interval_of_repeated_images() -> None:
    features, labels, classifier = noisy_task(num_classes=3, num_rows=60, noise=1.0)
    features, labels, lesions = (np.repeat(a, 5, axis=0) for a in (features, labels, np.arange(60)))
    alone, grouped = (
        zero_shot_metrics(features, labels, classifier, 10.0, groups=groups, num_resamples=200)["accuracy"]
        for groups in (None, lesions)
    )
    assert 1.6 < (grouped.high - grouped.low) / (alone.high - alone.low) < 3.0  # sqrt(5) = 2.24


def test_a_constant_classifier_gets_no_top_3_by_ties() -> None:
    classifier = np.tile([[1.0, 0.0]], (6, 1))
    features, labels = np.tile([[1.0, 0.0]], (12, 1)), np.arange(12) % 6
    metrics = zero_shot_metrics(features, labels, classifier, 10.0, num_resamples=20)
    assert metrics["top_3_accuracy"].value == 0
    assert metrics["auroc"].value == 0.5 and metrics["balanced_accuracy"].value == pytest.approx(1 / 6)


def test_confusion_matrix_and_recalls() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 1, 0])
    counts = confusion_matrix(labels, predicted, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    recalls = per_class_recall(labels, predicted, ["a", "b", "c", "d"], groups=["p", "p", "q", "r", "s", "t"])
    assert [(recall.value, recall.n) for recall in recalls.values()][:2] == [(pytest.approx(2 / 3), 3), (1.0, 2)]
    assert np.isnan(recalls["c"].value) and recalls["c"].n == 0 and recalls["d"].value == 0
    without_groups = per_class_recall(labels, predicted, list("abcd"))["a"]
    assert recalls["a"].low < without_groups.low < without_groups.high < recalls["a"].high  # two patients, three images


def test_top_predictions_are_in_order() -> None:
    best = top_predictions(np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]), ["a", "b", "c"], k=2)
    assert best == [[("b", 0.6), ("c", 0.3)], [("a", 0.5), ("c", 0.3)]]


def test_unusable_arrays_are_refused() -> None:
    features, labels, classifier = noisy_task(num_classes=3)
    broken = features.copy()
    broken[7, 2] = np.nan
    for arguments, message in (
        ((broken, labels, classifier), r"image features: 1 rows \(first: 7\) are not finite"),
        ((2 * features, labels, classifier), r"image features: 200 rows \(first: 0\) are not unit vectors"),
        ((features, labels + 1, classifier), r"labels: row \d+ has 3, outside 0 \.\.\. 2"),
        ((features, labels[:-1], classifier), "labels: expected 200 integers"),
        ((features, labels, classifier[:, :8]), "not unit vectors|width 16, the classifier 8"),
    ):
        with pytest.raises(InputError, match=message):
            zero_shot_metrics(*arguments, 10.0)
