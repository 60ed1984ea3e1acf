"""The zero-shot task against open_clip's own classifier and scikit-learn, on the same features."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from data_prep.errors import InputError
from pretrain.evaluation.config import ZeroShotTask
from pretrain.evaluation.tasks import zero_shot
from pretrain.prompts import TEMPLATES_PATH, load_templates
from tests.unit.evaluation.open_clip_set import CLASSNAMES, image_features, make_input, make_rows, tiny_model


def reference_probabilities(num_images: int, classnames: tuple[str, ...]) -> np.ndarray:
    """As open_clip's own zero-shot evaluation computes them."""
    model = tiny_model()
    templates = load_templates(TEMPLATES_PATH)
    classifier = open_clip.build_zero_shot_classifier(model, open_clip.SimpleTokenizer(), classnames, templates)
    logits = model.logit_scale.detach().exp() * torch.from_numpy(image_features(num_images)) @ classifier
    return logits.double().softmax(dim=1).numpy()


def test_numbers_equal_open_clip_and_scikit_learn(tmp_path: Path) -> None:
    rows = make_rows(120)
    result = zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows))
    labels = np.array([CLASSNAMES.index(str(row.label)) for row in rows])
    shares = reference_probabilities(120, CLASSNAMES)
    predicted = shares.argmax(axis=1)
    assert len(set(predicted)) > 1  # else the numbers below would say little
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "weighted_f1": f1_score(labels, predicted, average="weighted"),
        "auroc": roc_auc_score(labels, shares, multi_class="ovr", average="macro"),
        "top_3_accuracy": top_k_accuracy_score(labels, shares, k=3),
    }
    for name, value in expected.items():
        assert result.metrics[name].value == pytest.approx(value, abs=1e-6), name
    assert result.primary == "balanced_accuracy"
    assert result.metrics["accuracy"].chance == 0.2 and result.metrics["accuracy"].n == 120
    assert result.metrics["calibration_error"].lower_is_better and not result.metrics["accuracy"].lower_is_better
    recalls = recall_score(labels, predicted, average=None, labels=range(5), zero_division=0)
    assert [metric.value for metric in result.per_class.values()] == pytest.approx(recalls)
    assert result.confusion is not None and result.confusion.classnames == CLASSNAMES
    assert np.array_equal(result.confusion.counts, confusion_matrix(labels, predicted))


def test_table_holds_every_probability(tmp_path: Path) -> None:
    rows = make_rows(30)
    zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows))
    with (tmp_path / "zero_shot_probabilities.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["key", "patient", "label", "predicted", *CLASSNAMES]
    shares = reference_probabilities(30, CLASSNAMES)
    np.testing.assert_allclose(np.array([line[4:] for line in lines], dtype=float), shares, atol=1e-6)
    assert [line[:3] for line in lines] == [[row.key, row.patient, row.label] for row in rows]
    assert [line[3] for line in lines] == [CLASSNAMES[code] for code in shares.argmax(axis=1)]


def test_rows_that_are_not_scored_are_counted(tmp_path: Path) -> None:
    rows = make_rows(40)
    rows[0] = replace(rows[0], is_train=True)
    rows[1] = replace(rows[1], label="keloid")
    rows[2] = replace(rows[2], label=None)
    classnames = (*CLASSNAMES, "scabies")
    result = zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows, classnames))
    assert result.metrics["accuracy"].n == 37 and result.settings["num_classes"] == 6
    assert result.per_class["scabies"].value is None and result.per_class["scabies"].n == 0
    assert [note.split()[0] for note in result.notes[:3]] == ["1", "2", "Classes"] and "scabies" in result.notes[2]
    labels = [row.label for row in rows[3:]]
    shares = reference_probabilities(40, classnames)[3:]
    expected = np.mean([classnames[code] == label for code, label in zip(shares.argmax(1), labels, strict=True)])
    assert result.metrics["accuracy"].value == pytest.approx(expected)


def test_few_classes_in_a_group_are_said(tmp_path: Path) -> None:
    rows = [replace(row, patient=f"patient {i // 8}", label=CLASSNAMES[i // 16]) for i, row in enumerate(make_rows(80))]
    for i in range(16):  # all melanomas of one site
        rows[i] = replace(rows[i], attributes={"body_site": "ear"})
    rows[16] = replace(rows[16], attributes={"body_site": "lip"})
    rows[40] = replace(rows[40], attributes={"body_site": "lip"})
    notes = zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows)).notes
    (of_groups,) = [note for note in notes if note.startswith("By group")]
    assert "They hold, of 5: " in of_groups and "body_site 1 to 2" in of_groups


def test_the_templates_are_the_tasks_the_data_sets_or_ours(tmp_path: Path) -> None:
    given = make_input(tmp_path, make_rows(20))
    of_the_set = replace(given, data=replace(given.data, templates="peers"))
    for task, task_input, expected in (
        (ZeroShotTask(), given, "dermatology"),
        (ZeroShotTask(), of_the_set, "peers"),
        (ZeroShotTask(templates="dermatology"), of_the_set, "dermatology"),
    ):
        settings = zero_shot.run(task, task_input).settings
        assert settings["templates"] == expected
        assert settings["template_texts"] == tuple(load_templates(TEMPLATES_PATH, expected))


def test_without_overlap_is_the_same_as_a_set_without_those_images(tmp_path: Path) -> None:
    rows = make_rows(60)
    overlap_N = np.arange(60) % 3 == 0
    result = zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows, overlap_N=overlap_N))
    as_train = [replace(row, is_train=bool(is_in)) for row, is_in in zip(rows, overlap_N, strict=True)]
    other = zero_shot.run(ZeroShotTask(), make_input(tmp_path, as_train))
    assert result.without_overlap == other.metrics and result.metrics != other.metrics
    for overlap_N in (None, np.zeros(60, dtype=bool)):
        assert zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows, overlap_N=overlap_N)).without_overlap == {}
    # nothing is left: then it is said, and no number can be taken for one
    nothing = zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows, overlap_N=np.ones(60, dtype=bool)))
    assert nothing.without_overlap.keys() == nothing.metrics.keys() and nothing.notes
    assert all(metric.value is None and metric.n == 0 for metric in nothing.without_overlap.values())


def test_groups_are_scored_apart(tmp_path: Path) -> None:
    rows = make_rows(80)
    result = zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows))
    shares = reference_probabilities(80, CLASSNAMES)
    is_right = np.array([CLASSNAMES[code] == row.label for code, row in zip(shares.argmax(1), rows, strict=True)])
    assert [(group.attribute, group.metric) for group in result.by_group] == [
        ("fitzpatrick", "accuracy"),
        ("sex", "accuracy"),
        ("fitzpatrick", "balanced_accuracy"),
        ("sex", "balanced_accuracy"),
    ]
    tones = np.array([dict(row.attributes or {})["fitzpatrick"] for row in rows])
    assert list(result.by_group[0].groups) == ["I", "II", "V"]
    assert result.by_group[0].num_unknown == np.count_nonzero(tones == "")
    for tone, metric in result.by_group[0].groups.items():
        assert metric.value == pytest.approx(is_right[tones == tone].mean()) and metric.chance == 0.2


def test_two_classes_are_ranked_by_their_auroc(tmp_path: Path) -> None:
    classnames = ("benign lesion", "melanoma")
    rows = make_rows(60, classnames)
    result = zero_shot.run(ZeroShotTask(), make_input(tmp_path, rows, classnames))
    labels = np.array([row.label == "melanoma" for row in rows])
    score = reference_probabilities(60, classnames)[:, 1]
    assert result.primary == "auroc"
    assert result.metrics["auroc"].value == pytest.approx(roc_auc_score(labels, score), abs=1e-6)
    assert [curve.name for curve in result.curves] == ["melanoma", "predicted class"]
    assert {group.metric for group in result.by_group} == {"accuracy", "auroc"}


def test_a_set_without_labels_has_nothing_to_score(tmp_path: Path) -> None:
    rows = [replace(row, label=None) for row in make_rows(4)]
    given = make_input(tmp_path, rows)
    assert "no image" in str(zero_shot.lacks(given.data))
    with pytest.raises(InputError, match="noise: no image outside the training part"):
        zero_shot.run(ZeroShotTask(), given)
    assert "fewer than two classes" in str(zero_shot.lacks(make_input(tmp_path, make_rows(4), ("nevus",)).data))
    assert zero_shot.lacks(make_input(tmp_path, make_rows(4)).data) is None
