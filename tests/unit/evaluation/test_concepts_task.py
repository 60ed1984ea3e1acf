"""The numbers of concept annotation on a data set, against plain loops and scikit-learn."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from pretrain.evaluation.config import ConceptsTask
from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.methods.concepts import PROMPTS
from pretrain.evaluation.tasks import concepts
from tests.unit.evaluation.stand_in import StandInData, task_input, text_feature, unit

TASK = ConceptsTask()
#: What configs/eval/concepts.json has for them, and for one that it lacks.
WORDS = {
    "Ulcer": ["ulcer", "ulcerated", "ulceration"],
    "fissure": ["fissure", "fissured", "cracked skin"],
    "gray": ["gray", "gray color"],
    "glow": ["glow"],
}


def towards(name: str) -> np.ndarray:
    return unit(
        sum(text_feature(with_it.format(WORDS[name][0])) - text_feature(without) for with_it, without in PROMPTS)
    )


def make_rows(num: int, seed: int = 0) -> tuple[list[Row], np.ndarray]:
    """Images that lean towards the words of what they show. "gray" is rare, "glow" is in all that are annotated."""
    rng = np.random.default_rng(seed)
    rows, images = [], []
    for number in range(num):
        shown = {"Ulcer": bool(rng.random() < 0.4), "fissure": bool(rng.random() < 0.5), "gray": number in (3, 40)}
        lean = sum(towards(name) for name, shows in shown.items() if shows)
        images.append(0.4 * lean + unit(rng.normal(size=24)))
        if number % 5 == 1:
            del shown["fissure"]  # not annotated
        if number % 7 == 0:
            shown["glow"] = True
        tone = {"fitzpatrick": ("I", "IV")[number % 2]} if number % 3 else None
        rows.append(Row(f"k{number}", patient=f"p{number // 2}", concepts=shown, attributes=tone))
    return rows, unit(np.stack(images)).astype(np.float32)


def plain_aurocs(rows: list[Row], images: np.ndarray) -> dict[str, float]:
    """MONET's formula, one image and one prompt at a time, and scikit-learn on the rows annotated for a concept."""
    values = {}
    for name, words in WORDS.items():
        truths, scores = [], []
        for row, image in zip(rows, images.astype(np.float64), strict=True):
            if name in (row.concepts or {}):
                of_prompts = [
                    softmax(
                        [
                            np.mean([image @ text_feature(with_it.format(word)) for word in words]) * np.exp(4.5944),
                            image @ text_feature(without) * np.exp(4.5944),
                        ]
                    )[0]
                    for with_it, without in PROMPTS
                ]
                truths.append(row.concepts[name])
                scores.append(np.mean(of_prompts))
        if len(set(truths)) == 2:
            values[name] = float(roc_auc_score(truths, scores))
    return values


def test_the_numbers_of_the_task(tmp_path: Path) -> None:
    rows, images = make_rows(80)
    expected = plain_aurocs(rows, images)
    assert set(expected) == {"Ulcer", "fissure", "gray"} and expected["Ulcer"] > 0.6
    # the training part does not count
    train = [Row("t", concepts={"Ulcer": True, "fissure": False}, is_train=True)] * 5
    result = concepts.run(TASK, task_input([*train, *rows], np.concatenate([images[:5], images]), tmp_path))
    assert {name: metric.value for name, metric in result.per_class.items()} == pytest.approx(expected, abs=1e-12)
    assert [metric.n for metric in result.per_class.values()] == [80, 64, 80]
    mean = result.metrics[result.primary]
    assert result.primary == "mean_auroc" and mean.n == 80 and mean.chance == 0.5
    assert mean.value == pytest.approx((expected["Ulcer"] + expected["fissure"]) / 2, abs=1e-12)
    for metric in (mean, result.per_class["Ulcer"], result.per_class["fissure"]):
        assert metric.low < metric.value < metric.high
    settings = result.settings
    assert settings["concepts"] == ("Ulcer", "fissure", "gray", "glow")
    assert settings["concepts_in_mean"] == ("Ulcer", "fissure")
    assert settings["num_present"][2:] == (2, 12) and settings["num_absent"][2:] == (78, 0)
    assert settings["num_present"][0] == sum(row.concepts["Ulcer"] for row in rows)
    assert "No AUROC, since all annotated images show the concept or none does: glow." in result.notes
    assert "Not in the mean, with fewer than 5 images that show the concept, or that do not: gray." in result.notes
    assert "Not in the list of terms, so prompted by their own name: glow." in result.notes


def test_the_minimum_is_a_setting(tmp_path: Path) -> None:
    rows, images = make_rows(80)
    expected = plain_aurocs(rows, images)
    result = concepts.run(ConceptsTask(min_images=2), task_input(rows, images, tmp_path))
    assert result.metrics["mean_auroc"].value == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    none = concepts.run(ConceptsTask(min_images=41), task_input(rows, images, tmp_path))
    assert none.metrics["mean_auroc"].value is None and none.per_class.keys() == result.per_class.keys()


def test_one_patient_with_all_of_a_kind_gives_no_interval(tmp_path: Path) -> None:
    images = unit(np.random.default_rng(0).normal(size=(12, 24))).astype(np.float32)
    rows = [Row(f"k{i}", patient="p" if i < 3 else f"q{i}", concepts={"Ulcer": i < 3}) for i in range(12)]
    ulcer = concepts.run(TASK, task_input(rows, images, tmp_path)).per_class["Ulcer"]
    assert ulcer.value is not None and (ulcer.low, ulcer.high) == (None, None)


def test_repeated_images_of_a_patient_do_not_narrow_the_interval(tmp_path: Path) -> None:
    rows, images = make_rows(60)
    repeated = [replace(row, patient=row.key) for row in rows for _ in range(9)]
    alone, grouped = (
        concepts.run(TASK, task_input(each, np.repeat(images, 9, axis=0), tmp_path))
        for each in ([replace(row, patient=None) for row in repeated], repeated)
    )
    for narrow, wide in (
        (alone.metrics["mean_auroc"], grouped.metrics["mean_auroc"]),
        (alone.per_class["Ulcer"], grouped.per_class["Ulcer"]),
    ):
        assert narrow.value == wide.value and 2 < (wide.high - wide.low) / (narrow.high - narrow.low) < 4.5


def test_without_the_overlap(tmp_path: Path) -> None:
    rows, images = make_rows(80)
    overlap = np.arange(80) % 4 == 0
    result = concepts.run(TASK, task_input(rows, images, tmp_path, overlap))
    kept = np.flatnonzero(~overlap)
    expected = plain_aurocs([rows[i] for i in kept], images[kept])
    assert result.without_overlap["mean_auroc"].n == 60
    assert result.without_overlap["mean_auroc"].value == pytest.approx(
        (expected["Ulcer"] + expected["fissure"]) / 2, abs=1e-12
    )
    without = concepts.run(TASK, task_input(rows, images, tmp_path, np.zeros(80, dtype=bool)))
    assert without.without_overlap == {} and without.metrics == result.metrics
    nothing = concepts.run(TASK, task_input(rows, images, tmp_path, np.ones(80, dtype=bool)))
    assert nothing.without_overlap["mean_auroc"].value is None
    assert "Too few images without the overlap, so not in the mean there: Ulcer, fissure." in nothing.notes


def test_by_skin_tone(tmp_path: Path) -> None:
    rows, images = make_rows(80)
    (by_tone,) = concepts.run(TASK, task_input(rows, images, tmp_path)).by_group
    assert list(by_tone.groups) == ["I", "IV"] and by_tone.metric == "mean_auroc"
    assert by_tone.num_unknown == sum(row.attributes is None for row in rows)
    for tone, metric in by_tone.groups.items():
        own = [i for i, row in enumerate(rows) if (row.attributes or {}).get("fitzpatrick") == tone]
        expected = plain_aurocs([rows[i] for i in own], images[own])
        assert metric.value == pytest.approx((expected["Ulcer"] + expected["fissure"]) / 2, abs=1e-12)
        assert metric.n == len(own)


def test_the_table_holds_the_scores(tmp_path: Path) -> None:
    rows, images = make_rows(30)
    result = concepts.run(TASK, task_input(rows, images, tmp_path))
    with (tmp_path / "concept_scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    names = ["Ulcer", "fissure", "gray", "glow"]
    assert list(lines[0]) == ["key", "patient", *names, *(f"{name}:present" for name in names)]
    assert [(line["key"], line["patient"]) for line in lines] == [(row.key, row.patient) for row in rows]
    own = [i for i, row in enumerate(rows) if "fissure" in row.concepts]
    truth = [rows[i].concepts["fissure"] for i in own]
    assert [lines[i]["fissure:present"] for i in own] == [str(int(shown)) for shown in truth]
    assert all(line["fissure:present"] == "" for i, line in enumerate(lines) if i not in own)
    again = roc_auc_score(truth, [float(lines[i]["fissure"]) for i in own])
    assert again == pytest.approx(result.per_class["fissure"].value, abs=1e-12)


def test_equal_input_gives_an_equal_result(tmp_path: Path) -> None:
    rows, images = make_rows(40)
    first, second = (concepts.run(TASK, task_input(rows, images, tmp_path)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([Row("a"), Row("b", concepts={"ulcer": True}, is_train=True)], "no image is annotated with concepts"),
        ([Row("a", concepts={"ulcer": True}), Row("b", concepts={"scale": False})], "an AUROC needs both"),
    ],
)
def test_a_set_without_concepts_lacks_the_task(rows: list[Row], reason: str) -> None:
    assert reason in (concepts.lacks(StandInData(rows)) or "")
    assert (
        concepts.lacks(StandInData([*rows, Row("c", concepts={"ulcer": False}), Row("d", concepts={"ulcer": True})]))
        is None
    )
