"""Multiple choice: texts of options, the choice, ties, and every number of the task against loops."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.evaluation.config import MultipleChoiceTask
from pretrain.evaluation.interfaces import Question, Row
from pretrain.evaluation.methods.multiple_choice import (
    chance_level,
    check_questions,
    choose,
    encode_options,
    option_cosines,
    option_probabilities,
)
from pretrain.evaluation.tasks import multiple_choice
from tests.unit.evaluation.stand_in import StandInData, StandInEncoder, task_input, text_feature, unit

TASK = MultipleChoiceTask()
DIAGNOSES = ("melanoma", "nevus", "eczema", "psoriasis", "rosacea", "acne")
SITES = ("face", "hand", "trunk")


def text_of(question: Question, option: int) -> str:
    return f"Question: {question.text} Answer: {question.options[option]}"


def make_rows(num: int, noise: float = 3.0, seed: int = 0) -> tuple[list[Row], np.ndarray]:
    """Rows with questions of four diagnoses or three sites, and images scattered around the right option's text."""
    rng = np.random.default_rng(seed)
    rows, images = [], []
    for number in range(num):
        is_site = number % 3 == 0
        options = tuple(rng.permutation(SITES if is_site else DIAGNOSES)[: 3 if is_site else 4].tolist())
        question = Question(
            "Where is it?" if is_site else "What is it?",
            options,
            int(rng.integers(len(options))),
            "site" if is_site else None,
        )
        rows.append(
            Row(
                f"k{number}",
                patient=f"p{number // 2}",
                question=question,
                attributes={"sex": "female" if number % 4 < 2 else "male"},
            )
        )
        images.append(text_feature(text_of(question, question.answer)) + noise * unit(rng.normal(size=24)))
    return rows, unit(np.stack(images)).astype(np.float32)


def plain_answers(rows: list[Row], images: np.ndarray) -> np.ndarray:
    """(N,) bool, by one loop over questions."""
    is_right = []
    for row, image in zip(rows, images, strict=True):
        question = row.question
        assert question is not None
        cosines = [image @ text_feature(text_of(question, m)) for m in range(len(question.options))]
        is_right.append(int(np.argmax(cosines)) == question.answer)
    return np.array(is_right)


def test_texts_are_encoded_once_and_are_data() -> None:
    questions = [Question("{x} {0}?", ("{question}", "b"), 0), Question("{x} {0}?", ("b", "c", "{question}"), 1)]
    encoder = StandInEncoder()
    text_TD, text_NM = encode_options(encoder.encode_texts, questions)
    assert encoder.texts == [f"Question: {{x}} {{0}}? Answer: {option}" for option in ("{question}", "b", "c")]
    assert text_NM.tolist() == [[0, 1, -1], [1, 2, 0]] and text_TD.shape == (3, 24)


def test_options_in_templates_are_a_zero_shot_classifier() -> None:
    questions = [Question("q1", ("nevus", "acne"), 0), Question("q2", ("acne", "eczema"), 0)]
    templates = ["a photo of {}", "{} on the skin"]
    text_TD, text_NM = encode_options(StandInEncoder().encode_texts, questions, templates)
    assert text_NM.tolist() == [[0, 1], [1, 2]]
    for feature, option in zip(text_TD, ("nevus", "acne", "eczema"), strict=True):
        mean = np.mean([text_feature(template.replace("{}", option)) for template in templates], axis=0)
        np.testing.assert_allclose(feature, unit(mean), atol=1e-6)


def test_cosines_and_probabilities_are_those_of_each_questions_own_options() -> None:
    rows, images = make_rows(30)
    questions = check_questions(rows)
    text_TD, text_NM = encode_options(StandInEncoder().encode_texts, questions)
    cosines = option_cosines(images, text_TD, text_NM)
    shares = option_probabilities(cosines, 20.0)
    for question, image, cosine, share in zip(questions, images, cosines, shares, strict=True):
        num = len(question.options)
        expected = np.array([image @ text_feature(text_of(question, m)) for m in range(num)], dtype=np.float64)
        np.testing.assert_allclose(cosine[:num], expected, atol=1e-6)
        np.testing.assert_allclose(share[:num], np.exp(20 * expected) / np.exp(20 * expected).sum(), atol=1e-5)
        assert np.isnan(cosine[num:]).all() and np.isnan(share[num:]).all()


def test_a_tie_for_the_best_is_no_choice() -> None:
    cosines = np.array([[0.3, 0.3, 0.1], [0.2, 0.5, 0.5 - 1e-8], [0.1, 0.1, 0.4], [0.6, 0.1, np.nan]])
    assert choose(cosines).tolist() == [-1, -1, 2, 0]


def test_chance_is_the_mean_over_questions() -> None:
    questions = [Question("q", tuple("abcd"), 0), Question("q", ("a", "b"), 1)]
    assert chance_level(questions) == pytest.approx((1 / 4 + 1 / 2) / 2)


@pytest.mark.parametrize(
    "question", [None, Question("q", ("a",), 0), Question("q", ("a", "b"), 2), Question("q", ("a", "b"), -1)]
)
def test_questions_without_an_answer_are_refused(question: Question | None) -> None:
    with pytest.raises(InputError, match="row k7, question: expected at least two options"):
        check_questions([Row("k7", question=question)])


def test_the_numbers_of_the_task(tmp_path: Path) -> None:
    rows, images = make_rows(90)
    is_right = plain_answers(rows, images)
    assert 0.5 < is_right.mean() < 0.95
    # of the training part, and without a question: neither counts
    extra = [Row("t", is_train=True, question=rows[0].question), Row("u")]
    all_rows, all_images = [extra[0], *rows, extra[1]], np.concatenate([images[:1], images, images[:1]])
    overlap = np.zeros(92, dtype=bool)
    overlap[1:21] = True
    result = multiple_choice.run(TASK, task_input(all_rows, all_images, tmp_path, overlap))
    accuracy = result.metrics["accuracy"]
    assert result.primary == "accuracy" and accuracy.n == 90
    assert accuracy.value == pytest.approx(is_right.mean()) and accuracy.low < accuracy.value < accuracy.high
    assert accuracy.chance == pytest.approx((30 / 3 + 60 / 4) / 90)
    assert result.without_overlap["accuracy"].value == pytest.approx(is_right[20:].mean())
    assert result.without_overlap["accuracy"].n == 70
    is_site = np.arange(90) % 3 == 0
    parts = {"site": is_site, "3 options": is_site, "4 options": ~is_site}
    assert {name: (m.value, m.n) for name, m in result.per_class.items()} == {
        name: (pytest.approx(is_right[part].mean()), part.sum()) for name, part in parts.items()
    }
    assert result.per_class["4 options"].chance == 0.25
    (by_sex,) = result.by_group
    is_female = np.arange(90) % 4 < 2
    assert by_sex.groups["female"].value == pytest.approx(is_right[is_female].mean())
    assert by_sex.groups["male"].n == (~is_female).sum() and by_sex.groups["male"].chance is None
    assert not result.notes


def test_the_table_holds_what_the_numbers_are_made_of(tmp_path: Path) -> None:
    rows, images = make_rows(40)
    result = multiple_choice.run(TASK, task_input(rows, images, tmp_path))
    with (tmp_path / "multiple_choice_answers.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["key"] for line in lines] == [row.key for row in rows] and lines[3]["patient"] == "p1"
    assert np.mean([line["answer"] == line["predicted"] for line in lines]) == result.metrics["accuracy"].value
    confidences = []
    for line, row in zip(lines, rows, strict=True):
        shares = [line[f"option_{m}"] for m in range(4)]
        assert (shares[3] == "") == (len(row.question.options) == 3)
        values = [float(share) for share in shares if share]
        assert sum(values) == pytest.approx(1) and int(line["predicted"]) == int(np.argmax(values))
        confidences.append(max(values))
    # expected calibration error, 15 bins of equal width
    right = np.array([line["answer"] == line["predicted"] for line in lines])
    bins = np.ceil(np.array(confidences) * 15).astype(int)
    gaps = [abs(right[bins == b].sum() - np.array(confidences)[bins == b].sum()) for b in np.unique(bins)]
    calibration = result.metrics["calibration_error"]
    assert calibration.value == pytest.approx(sum(gaps) / 40) and calibration.lower_is_better
    (curve,) = result.curves
    assert curve.kind == "reliability" and len(curve.x) == len(np.unique(bins))


def test_ties_are_wrong_and_said(tmp_path: Path) -> None:
    question = Question("q", ("same", "other", "same"), 0)
    images = np.stack([text_feature("Question: q Answer: same")] * 4)
    rows = [Row(f"k{i}", question=question) for i in range(4)]
    result = multiple_choice.run(TASK, task_input(rows, images, tmp_path))
    assert result.metrics["accuracy"].value == 0 and result.per_class == {}
    assert result.notes[0].startswith("4 of 4 answers are ties and count as wrong")
    with (tmp_path / "multiple_choice_answers.csv").open(newline="") as file:
        assert [line["predicted"] for line in csv.DictReader(file)] == [""] * 4


def test_all_questions_in_the_overlap_leave_nothing(tmp_path: Path) -> None:
    rows, images = make_rows(6)
    result = multiple_choice.run(TASK, task_input(rows, images, tmp_path, np.ones(6, dtype=bool)))
    assert result.without_overlap["accuracy"].value is None and result.without_overlap["accuracy"].n == 0
    clean = multiple_choice.run(TASK, task_input(rows, images, tmp_path, np.zeros(6, dtype=bool)))
    assert clean.without_overlap == {} and clean.metrics == result.metrics


def test_templates_of_the_config_are_used(tmp_path: Path) -> None:
    rows, images = make_rows(12)
    given = task_input(rows, images, tmp_path)
    result = multiple_choice.run(MultipleChoiceTask(templates="plain"), given)
    assert set(given.encoder.texts) <= {*DIAGNOSES, *SITES} and result.settings["text_of_an_option"] == ("{}",)
    with pytest.raises(InputError, match="no template list named 'mine'"):
        multiple_choice.run(MultipleChoiceTask(templates="mine"), given)


def test_a_set_without_questions_lacks_the_task() -> None:
    question = Question("q", ("a", "b"), 0)
    assert multiple_choice.lacks(StandInData([Row("a"), Row("b", question=question, is_train=True)])) is not None
    assert multiple_choice.lacks(StandInData([Row("a"), Row("b", question=question)])) is None


def test_repeated_images_of_a_patient_do_not_narrow_the_interval(tmp_path: Path) -> None:
    rows, images = make_rows(60)
    repeated = [replace(row, patient=row.key) for row in rows for _ in range(9)]
    alone, grouped = (
        multiple_choice.run(TASK, task_input(each, np.repeat(images, 9, axis=0), tmp_path)).metrics["accuracy"]
        for each in ([replace(row, patient=None) for row in repeated], repeated)
    )
    assert 2 < (grouped.high - grouped.low) / (alone.high - alone.low) < 4.5  # sqrt(9) = 3


def test_one_patient_gives_no_interval(tmp_path: Path) -> None:
    rows, images = make_rows(8)
    rows = [replace(row, patient="p") for row in rows]
    for metric in multiple_choice.run(TASK, task_input(rows, images, tmp_path)).metrics.values():
        assert metric.value is not None and (metric.low, metric.high) == (None, None)
