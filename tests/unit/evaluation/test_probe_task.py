"""The probe task against scikit-learn from end to end, and what it says of a set's oddities."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from data_prep.errors import InputError
from pretrain.evaluation.config import ProbeTask
from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.methods.probe import held_out_patients, share_of_patients
from pretrain.evaluation.metrics.statistics import accuracy, bootstrap_interval
from pretrain.evaluation.tasks.probe import lacks, run
from tests.unit.evaluation.task_inputs import Data, task_input

CLASSNAMES = ("acne", "eczema", "melanoma", "nevus")


def labelled_set(num_rows: int = 240, num_train: int = 0, width: int = 12) -> tuple[Data, np.ndarray]:
    """Two rows a patient; classes of uneven size that overlap."""
    rng = np.random.default_rng(0)
    code = np.minimum(rng.exponential(1.2, size=num_rows // 2).astype(int), 3).repeat(2)
    centre = rng.normal(size=(4, width))
    rows = [
        Row(
            key=f"image-{n}",
            label=CLASSNAMES[code[n]],
            patient=f"p{n // 2}",
            attributes={"fitzpatrick": ("I", "IV")[n // 2 % 2]},
            is_train=n < num_train,
        )
        for n in range(num_rows)
    ]
    features = 5 + centre[code] + 1.5 * rng.normal(size=(num_rows, width))
    return Data(rows, CLASSNAMES), features.astype(np.float32)


@pytest.mark.parametrize("num_train", [0, 160])
def test_numbers_equal_scikit_learn(num_train: int, tmp_path: Path) -> None:
    data, features = labelled_set(num_train=num_train)
    task = ProbeTask(shares=(0.1, 1.0), num_seeds=3)
    result = run(task, task_input(data, {"tower": features}, tmp_path, seed=4))

    label = np.array([CLASSNAMES.index(str(row.label)) for row in data.rows])
    patients = [row.patient for row in data.rows]
    own_part = np.array([not row.is_train for row in data.rows])
    is_test = own_part if num_train else held_out_patients(label, patients, 0.2, 4)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    for share, seeds in ((0.1, (4, 5, 6)), (1.0, (4,))):
        expected: dict[str, list[float]] = {"accuracy": [], "balanced_accuracy": [], "weighted_f1": [], "auroc": []}
        for seed in seeds:
            rows = train[share_of_patients(label[train], [patients[row] for row in train], share, seed)]
            model = LogisticRegression(C=12 * 4 / 100, max_iter=1000).fit(features[rows].astype(float), label[rows])
            probability = model.predict_proba(features[test].astype(float))
            predicted = probability.argmax(axis=1)
            expected["accuracy"].append(accuracy_score(label[test], predicted))
            expected["balanced_accuracy"].append(balanced_accuracy_score(label[test], predicted))
            expected["weighted_f1"].append(f1_score(label[test], predicted, average="weighted"))
            expected["auroc"].append(roc_auc_score(label[test], probability, multi_class="ovr"))
        for name, values in expected.items():
            metric = result.metrics[f"{name}@{100 * share:g}%"]
            assert metric.value == pytest.approx(np.mean(values), abs=1e-6)
            assert metric.n == len(test) and metric.low is not None and metric.low < metric.value < (metric.high or 0)
            if name != "auroc":
                spread = result.settings[f"{name}_sd_over_seeds"]
                found = dict(zip(("10%", "100%"), spread, strict=True))[f"{100 * share:g}%"]  # type: ignore[arg-type]
                assert found == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0)
    interval = bootstrap_interval(
        accuracy,
        [label[test], predicted],
        groups=[patients[row] for row in test],
        strata=label[test],
        num_resamples=50,
        seed=4,
    )
    found = result.metrics["accuracy@100%"]
    assert (found.low, found.high) == (interval.low, interval.high)
    assert result.primary == "balanced_accuracy@100%"
    assert result.settings["C"] == pytest.approx(0.48)


def test_table_curves_and_groups(tmp_path: Path) -> None:
    data, features = labelled_set()
    task = ProbeTask(shares=(0.1, 0.5, 1.0), num_seeds=2, shots=(1, 4))
    result = run(task, task_input(data, {"tower": features}, tmp_path, seed=3))
    with (tmp_path / "probe_predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    num_test = result.metrics[result.primary].n
    assert len(table) == num_test * (2 + 2 + 1 + 2 + 2)
    final = [line for line in table if line["share"] == "1.0"]
    right = np.mean([line["label"] == line["predicted"] for line in final])
    assert right == pytest.approx(result.metrics["accuracy@100%"].value)
    assert {line["seed"] for line in table if line["share"] == "0.1"} == {"3", "4"}
    assert {line["share"] for line in table} == {"0.1", "0.5", "1.0", "1 shots", "4 shots"}
    shots = [line for line in table if line["share"] == "4 shots"]
    right = np.mean([line["label"] == line["predicted"] for line in shots])
    assert right == pytest.approx(result.metrics["accuracy@4_shots"].value)

    curves = {curve.name: curve for curve in result.curves}
    assert curves["auroc"].x == (0.1, 0.5, 1.0) and curves["auroc, few-shot"].x == (1, 4)
    assert curves["accuracy"].y[2] == result.metrics["accuracy@100%"].value
    assert curves["accuracy"].low[2] == result.metrics["accuracy@100%"].low
    assert curves["balanced_accuracy"].y[0] < curves["balanced_accuracy"].y[2]

    assert result.confusion is not None
    counts = np.array(result.confusion.counts)
    assert counts.trace() / counts.sum() == pytest.approx(result.metrics["accuracy@100%"].value)
    assert np.mean([recall.value for recall in result.per_class.values()]) == pytest.approx(
        result.metrics["balanced_accuracy@100%"].value
    )
    (by_tone,) = result.by_group
    assert (by_tone.attribute, by_tone.metric) == ("fitzpatrick", "balanced_accuracy@100%")
    assert sum(group.n for group in by_tone.groups.values()) == num_test


def test_intervals_are_over_patients(tmp_path: Path) -> None:
    """Eight images of a patient that are right or wrong together: the interval is that of an eighth of the images."""
    data, features = labelled_set(num_train=160)
    repeated = [*range(160), *np.repeat(np.arange(160, 240, 2), 8)]
    rows = [replace(data.rows[n], key=f"k{place}") for place, n in enumerate(repeated)]
    widths = {}
    for name, own in (("patients", rows), ("images", [replace(row, patient=None) for row in rows])):
        given = task_input(Data(own, CLASSNAMES), {"tower": features[repeated]}, tmp_path, num_resamples=300)
        metric = run(ProbeTask(shares=(1.0,)), given).metrics["accuracy@100%"]
        widths[name] = (metric.high or 0) - (metric.low or 0)
    assert widths["patients"] == pytest.approx(8**0.5 * widths["images"], rel=0.3)


def test_without_overlap_is_of_the_other_test_images(tmp_path: Path) -> None:
    data, features = labelled_set(num_train=160)
    overlap = np.random.default_rng(2).random(240) < 0.3
    task = ProbeTask(shares=(1.0,))
    result = run(task, task_input(data, {"tower": features}, tmp_path, overlap_N=overlap))
    with (tmp_path / "probe_predictions.csv").open() as file:
        kept = [line for line in csv.DictReader(file) if not overlap[int(line["key"].removeprefix("image-"))]]
    right = np.mean([line["label"] == line["predicted"] for line in kept])
    assert result.without_overlap["accuracy@100%"].value == pytest.approx(right)
    assert result.without_overlap["accuracy@100%"].n == len(kept) == int((~overlap[160:]).sum())
    assert result.without_overlap["accuracy@100%"] != result.metrics["accuracy@100%"]
    whole = run(task, task_input(data, {"tower": features}, tmp_path, overlap_N=np.ones(240, dtype=bool)))
    assert all(m.value is None and m.n == 0 for m in whole.without_overlap.values())
    assert whole.without_overlap.keys() == whole.metrics.keys() and "All images tested on" in whole.notes[-1]


def test_oddities_are_said(tmp_path: Path) -> None:
    data, features = labelled_set(num_train=159)  # patient 79 is on both sides
    rows = [*data.rows, Row(key="bare"), Row(key="other", label="rosacea"), Row(key="z", label="zoster")]
    data = Data(rows, (*CLASSNAMES, "zoster"))
    features = 1000 * np.concatenate([features, features[:3]])
    task = ProbeTask(shares=(0.1, 0.5), num_seeds=2, shots=(64,), max_iterations=3)
    notes = run(task, task_input(data, {"tower": features}, tmp_path)).notes
    for begins in (
        "10%: 2 of 2 fits had not converged after 3 iterations",
        "2 images without a label, or with one that is no class here",
        "Classes without an image to train on: they cannot be predicted: zoster",
        "1 images tested on are of patients whom the data set's own training part holds too",
        "64 shots: fewer images in training of ",
        "Recalls of classes and the confusion matrix are of the first seed",
    ):
        assert any(note.startswith(begins) for note in notes), begins


def test_what_a_set_lacks(tmp_path: Path) -> None:
    data, features = labelled_set()
    assert lacks(data) is None
    one_class = Data([replace(row, label="acne") for row in data.rows], CLASSNAMES)
    all_train = Data([replace(row, is_train=True) for row in data.rows], CLASSNAMES)
    single = Data([replace(row, patient=str(row.label)) for row in data.rows], CLASSNAMES)
    for lacking, reason in (
        (one_class, "fewer than two classes"),
        (all_train, "all labelled images are of the training part"),
        (single, "no class has a second patient"),
        (Data([Row(key="a", texts=("b",))]), "fewer than two classes"),
    ):
        assert reason in str(lacks(lacking))
        with pytest.raises(InputError, match=f"stand-in: no probe: .*{reason}"):
            run(ProbeTask(), task_input(lacking, {"tower": features}, tmp_path))


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_real_labels_and_patients(tmp_path: Path) -> None:
    """Random features of 3,870 real images know nothing: chance, whatever the imbalance; lesions stay whole."""
    with (Path(os.environ["DERMVLP_DATA"]) / "derm-images" / "metadata.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = [
        Row(key=f"r{n}", label=line["label"], patient=line["group_id"], is_train=line["split_hint"] == "train")
        for n, line in enumerate(table)
    ]
    data = Data(rows, tuple(sorted({str(row.label) for row in rows})))
    features = np.random.default_rng(0).normal(size=(len(rows), 8))
    result = run(ProbeTask(shares=(0.01, 1.0), num_seeds=2), task_input(data, {"tower": features}, tmp_path))
    assert result.metrics["auroc@100%"].value == pytest.approx(0.5, abs=0.1)
    assert result.metrics["balanced_accuracy@100%"].value == pytest.approx(1 / 9, abs=0.05)
    assert result.settings["num_train"] == 3413 and result.settings["num_test"] == 457
    assert not any("whom the data set's own training part holds" in note for note in result.notes)
