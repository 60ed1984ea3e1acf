"""The probe against scikit-learn by hand and its objective in float64; who is trained on, for many random sets."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from pretrain.evaluation.methods.probe import few_shots, held_out_patients, probe, probe_cost, share_of_patients


def blobs(num_rows: int, width: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(num_rows) % num_classes
    centre = np.random.default_rng(99).normal(size=(num_classes, width))
    return (centre[label] + 2 * rng.normal(size=(num_rows, width))).astype(np.float32), label


@pytest.mark.parametrize("num_classes", [2, 5])
def test_equals_a_scikit_learn_pipeline(num_classes: int) -> None:
    train, label = blobs(120, 20, num_classes)
    test, _ = blobs(60, 20, num_classes, seed=1)
    scores = probe(train, label, test, num_classes)
    pipeline = make_pipeline(
        FunctionTransformer(np.float64),
        LogisticRegression(C=20 * num_classes / 100, solver="lbfgs", max_iter=1000),
    ).fit(train, label)
    assert scores.has_converged
    np.testing.assert_allclose(scores.probability_NC, pipeline.predict_proba(test), rtol=0, atol=1e-6)
    assert scores.predicted_N.tolist() == pipeline.predict(test).tolist()


def test_cost_is_the_inverse_of_the_published_coefficient() -> None:
    """The optimum of the objective in the module's docstring, written out and found by another optimiser's path."""
    train, label = blobs(60, 6, 3)
    coefficient = 100 / (6 * 3)
    assert probe_cost(6, 3) == pytest.approx(1 / coefficient)

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        logits = train.astype(np.float64) @ weight.T + bias
        cross_entropy = logsumexp(logits, axis=1) - logits[np.arange(60), label]
        return float(cross_entropy.sum() + coefficient / 2 * np.sum(weight**2))

    best = minimize(objective, np.zeros(21), method="BFGS", options={"gtol": 1e-7}).x
    logits = train.astype(np.float64) @ best[:18].reshape(3, 6).T + best[18:]
    expected = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    np.testing.assert_allclose(probe(train, label, train, 3).probability_NC, expected, atol=2e-4)


def test_classes_without_training_images_get_no_probability() -> None:
    train, label = blobs(40, 8, 2)
    scores = probe(train, label * 3 + 1, train, 6)  # classes 1 and 4 of 6
    assert scores.probability_NC[:, [0, 2, 3, 5]].max() == 0
    np.testing.assert_allclose(scores.probability_NC.sum(axis=1), 1)
    np.testing.assert_array_equal(scores.probability_NC[:, [1, 4]], probe(train, label, train, 2).probability_NC)


def test_too_few_iterations_are_told_and_not_warned(recwarn: pytest.WarningsRecorder) -> None:
    train, label = blobs(200, 50, 4)
    assert not probe(1000 * train, label, train, 4, max_iterations=2).has_converged
    assert not recwarn.list


# ---------------------------------------------------------------------------------------------- who is trained on


def random_set(seed: int) -> tuple[np.ndarray, list[str | None]]:
    """60 to 200 rows of 6 uneven classes; patients of 1 to 5 rows, some with several classes, some unknown."""
    rng = np.random.default_rng(seed)
    patients: list[str | None] = []
    labels: list[int] = []
    for patient in range(int(rng.integers(30, 70))):
        main = min(int(rng.exponential(1.3)), 5)
        for _ in range(int(rng.integers(1, 6))):
            labels.append(main if rng.random() < 0.7 else int(rng.integers(6)))
            patients.append(None if rng.random() < 0.1 else f"p{patient}")
    return np.array(labels), patients


def units(patients: list[str | None]) -> list[str]:
    return [f"row {row}" if patient is None else patient for row, patient in enumerate(patients)]


@pytest.mark.parametrize("seed", range(30))
def test_patients_stay_whole_and_classes_are_on_both_sides(seed: int) -> None:
    label, patients = random_set(seed)
    names = np.array(units(patients))
    is_test = held_out_patients(label, patients, 0.2, seed)
    assert not set(names[is_test]) & set(names[~is_test])
    assert set(label[~is_test]) == set(label)
    for code in np.unique(label):
        if len(set(names[label == code])) > 6:  # not all can be needed in training, for some other class
            assert code in label[is_test]
    assert 0.1 < is_test.mean() < 0.35
    assert set(label[~held_out_patients(label, patients, 0.9, seed)]) == set(label)
    assert (held_out_patients(label, patients, 0.2, seed) == is_test).all()
    assert (held_out_patients(label, patients, 0.2, seed + 1) != is_test).any()


@pytest.mark.parametrize("seed", range(30))
def test_shares_keep_every_class_and_grow(seed: int) -> None:
    label, patients = random_set(seed)
    names = np.array(units(patients))
    before = np.zeros(len(label), dtype=bool)
    for share in (0.01, 0.1, 0.3, 0.5, 1.0):
        drawn = share_of_patients(label, patients, share, seed)
        assert set(label[drawn]) == set(label)
        assert not set(names[drawn]) & set(names[~drawn])
        assert (drawn | ~before).all()  # the smaller share is part of it
        num_units = len(set(names))
        assert abs(len(set(names[drawn])) / num_units - share) < 6 / num_units + 1e-9
        before = drawn
    assert before.all()


def test_a_class_whose_patients_all_have_a_rarer_one_is_not_lost() -> None:
    """Class 0 has four patients, each of whom also has one of the rarer classes 1 to 4, as another patient does."""
    patients = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "f", "g", "h"]
    label = np.array([0, 1, 0, 2, 0, 3, 0, 4, 1, 2, 3, 4])
    for seed in range(40):
        assert 0 in label[share_of_patients(label, patients, 0.01, seed)]
        is_test = held_out_patients(label, patients, 0.2, seed)
        assert 0 in label[is_test] and set(label[~is_test]) == {0, 1, 2, 3, 4}


def test_shots_are_of_different_patients_and_grow() -> None:
    label, patients = np.repeat([0, 1, 2], [30, 30, 3]), [f"p{row // 3}" for row in range(63)]
    before = np.zeros(63, dtype=bool)
    for shots in (1, 2, 4, 8, 16):
        drawn = few_shots(label, patients, shots, seed=5)
        assert np.bincount(label[drawn]).tolist() == [shots, shots, min(shots, 3)]
        for code in (0, 1):  # ten patients each
            assert len({patients[row] for row in np.flatnonzero(drawn & (label == code))}) == min(shots, 10)
        assert (drawn | ~before).all()
        before = drawn
    assert (few_shots(label, patients, 4, seed=6) != few_shots(label, patients, 4, seed=5)).any()
