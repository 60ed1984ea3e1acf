"""Values, worst group and gap by hand; intervals against populations with a known gap."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.metrics.groups import by_group
from pretrain.evaluation.metrics.statistics import balanced_accuracy, bootstrap_interval, macro_auroc
from pretrain.evaluation.results import ByGroup

SETTINGS = EvaluationSettings(num_resamples=300, min_group_size=4)


def rows_of(attribute: str, values: list[str | None], patients: list[str] | None = None) -> list[Row]:
    return [
        Row(
            key=str(i),
            patient=None if patients is None else patients[i],
            attributes={"source": "A"} if value is None else {attribute: value, "source": "A"},
        )
        for i, value in enumerate(values)
    ]


def first_of(rows: list[Row], right: np.ndarray, settings: EvaluationSettings = SETTINGS, **kind: bool) -> ByGroup:
    return by_group(rows, "accuracy", np.mean, [right], settings, **kind)[0]


def test_groups_stand_in_the_order_of_their_attribute() -> None:
    tones = ["VI", "II", "IV", "I", "V", "III"]
    ages = ["80+", "10-19", "<10", "0-9", "adult", "20-29"]
    rows = [
        Row(key=str(i), attributes={"zoom": "x", "age_band": ages[i], "fitzpatrick": tones[i], "sex": "female"})
        for i in range(6)
    ]
    found = by_group(rows, "accuracy", np.mean, [np.ones(6)], SETTINGS)
    assert [group.attribute for group in found] == ["fitzpatrick", "sex", "age_band", "zoom"]
    assert list(found[0].groups) == ["I", "II", "III", "IV", "V", "VI"]
    assert list(found[2].groups) == ["0-9", "<10", "10-19", "20-29", "80+", "adult"]
    assert by_group([Row(key="0")], "accuracy", np.mean, [np.ones(1)], SETTINGS) == ()


def test_values_worst_and_gap() -> None:
    values: list[str | None] = ["I"] * 8 + ["III"] * 4 + ["VI"] * 3 + [None, "Unknown", ""]
    right = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1])
    found = first_of(rows_of("fitzpatrick", values), right)
    assert {name: (metric.value, metric.n) for name, metric in found.groups.items()} == {
        "I": (0.75, 8),
        "III": (0.5, 4),
        "VI": (0, 3),
    }
    assert found.num_unknown == 3
    assert found.worst == "III"  # VI has too few rows to be called so
    assert found.gap is not None and found.gap.value == 0.25 and found.gap.n == 12 and found.gap.lower_is_better
    alone = first_of(rows_of("fitzpatrick", values), right, SETTINGS.model_copy(update={"min_group_size": 5}))
    assert alone.worst is None and alone.gap is None and len(alone.groups) == 3


def test_worst_of_a_distance_is_the_largest() -> None:
    steps = np.array([1.0] * 5 + [4.0] * 5)
    found = first_of(rows_of("sex", ["female"] * 5 + ["male"] * 5), steps, is_share=False, lower_is_better=True)
    assert found.worst == "male" and found.gap is not None and found.gap.value == 3
    assert found.groups["male"].lower_is_better and not found.gap.is_share


def test_interval_of_a_group_is_that_of_its_own_bootstrap() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random(400) < 0.7).astype(float)
    rows = rows_of("sex", ["female", "male"] * 200)
    found = first_of(rows, right, EvaluationSettings(num_resamples=2000))
    own = bootstrap_interval(np.mean, [right[::2]], num_resamples=2000)
    group = found.groups["female"]
    assert (group.value, group.low, group.high) == (
        own.value,
        pytest.approx(own.low, abs=0.02),
        pytest.approx(own.high, abs=0.02),
    )


def test_one_patient_in_both_groups_makes_their_gap_surer() -> None:
    """Each patient has a lesion on the face and one on the arm; faces are always worse by the same few."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(size=100)
    values = np.concatenate([of_patient, of_patient - 0.2 + 0.05 * rng.normal(size=100)])
    sites: list[str | None] = ["arm"] * 100 + ["face"] * 100
    patients = [f"patient {i % 100}" for i in range(200)]
    linked = first_of(rows_of("body_site", sites, patients), values, is_share=False).gap
    unlinked = first_of(rows_of("body_site", sites), values, is_share=False).gap
    assert linked is not None and unlinked is not None and linked.value == unlinked.value
    assert linked.high - linked.low < 0.1 * (unlinked.high - unlinked.low)
    assert 0 < linked.low < 0.2 < linked.high and unlinked.low < 0


def test_coverage_of_the_gap_between_two_groups() -> None:
    """Accuracy 0.8 and 0.6, patients of three images that are right or wrong together."""
    rng = np.random.default_rng(0)
    num_covered, num_populations = 0, 80
    settings = EvaluationSettings(num_resamples=100)
    patients = [f"patient {i // 3}" for i in range(360)]
    rows = rows_of("sex", ["female"] * 180 + ["male"] * 180, patients)
    for _ in range(num_populations):
        right = np.repeat(np.r_[rng.random(60) < 0.8, rng.random(60) < 0.6], 3)
        gap = first_of(rows, right, settings).gap
        assert gap is not None
        num_covered += gap.low <= 0.2 <= gap.high
    assert 0.87 <= num_covered / num_populations <= 0.995


def test_what_is_undefined_has_no_interval() -> None:
    labels = np.array([0, 1] * 6 + [0] * 6)
    scores = np.random.default_rng(0).random((18, 2))
    rows = rows_of("sex", ["female"] * 12 + ["male"] * 6)
    found = by_group(rows, "auroc", macro_auroc, [labels, scores], SETTINGS)[0]
    assert found.groups["male"].value is None and found.groups["male"].low is None and found.groups["male"].n == 6
    assert found.groups["female"].low is not None
    assert found.worst is None and found.gap is None
    without_errors = first_of(rows, np.r_[np.ones(12), 0, 1, 0, 1, 1, 0])
    assert without_errors.groups["female"].value == 1 and without_errors.groups["female"].high is None
    assert without_errors.groups["male"].high is not None
    assert without_errors.gap is not None and without_errors.gap.value == 0.5 and without_errors.gap.low is None
    of_one_patient = rows_of("sex", ["female"] * 6 + ["male"] * 6, [f"p{i}" for i in range(6)] + ["q"] * 6)
    one = first_of(of_one_patient, np.array([1.0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]))
    assert one.groups["male"].value == pytest.approx(5 / 6) and one.groups["male"].low is None
    assert one.gap is not None and one.gap.value is not None and one.gap.low is None


def test_a_group_with_one_image_of_most_classes_has_an_interval_as_wide_as_its_ignorance() -> None:
    """Twelve classes and 24 images a site. Against the spread of sites that really differ by chance alone."""
    rng = np.random.default_rng(1)
    sites = np.repeat(np.arange(40), 24)
    labels = np.tile(np.repeat(np.arange(12), 2), 40)
    predicted = np.where(rng.random(len(labels)) < 0.6, labels, (labels + 1) % 12)
    rows = [Row(key=str(number), attributes={"body_site": f"site {site:02d}"}) for number, site in enumerate(sites)]
    settings = EvaluationSettings(num_resamples=200)
    (found,) = by_group(rows, "balanced_accuracy", balanced_accuracy, [labels, predicted], settings)
    metrics = list(found.groups.values())
    spread = np.std([metric.value for metric in metrics])
    widths = [metric.high - metric.low for metric in metrics]
    assert 0.75 < np.mean(widths) / (2 * 1.96 * spread) < 1.4
