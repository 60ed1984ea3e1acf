"""Multiple choice: how often the option nearest to the image is the right one. Shapes: N questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.config import EvaluationSettings, MultipleChoiceTask
from pretrain.evaluation.interfaces import JOINT, EvalData, Question, Row, TaskInput
from pretrain.evaluation.methods.multiple_choice import (
    TIE_TOLERANCE,
    chance_level,
    check_questions,
    choose,
    encode_options,
    option_cosines,
    option_probabilities,
    write_answers,
)
from pretrain.evaluation.metrics.calibration import calibration_error, reliability_curve
from pretrain.evaluation.metrics.groups import by_group
from pretrain.evaluation.metrics.statistics import (
    Bools,
    Estimate,
    Floats,
    Ints,
    bootstrap_interval,
    group_codes,
    proportion_interval,
)
from pretrain.evaluation.results import TABLES, Metric, TaskResult
from pretrain.prompts import TEMPLATES_PATH, load_templates


def lacks(data: EvalData) -> str | None:
    """None where some image has a question."""
    has_question = any(row.question is not None for row in data.rows if not row.is_train)
    return None if has_question else "no image has a multiple-choice question"


def run(task: MultipleChoiceTask, given: TaskInput) -> TaskResult:
    """Answers into multiple_choice_answers.csv; accuracy, by kind of question and by number of options; calibration.

    A tie is wrong. Raises InputError for a question that cannot be answered (`check_questions`).
    """
    positions = [i for i, row in enumerate(given.data.rows) if row.question is not None and not row.is_train]
    rows = [given.data.rows[position] for position in positions]
    questions = check_questions(rows)
    templates = None if task.templates is None else load_templates(TEMPLATES_PATH, task.templates)
    text_TD, text_NM = encode_options(given.encoder.encode_texts, questions, templates)
    cosine_NM = option_cosines(np.asarray(given.features(JOINT))[positions], text_TD, text_NM)
    predicted_N = choose(cosine_NM)
    share_NM = option_probabilities(cosine_NM, given.encoder.logit_scale)
    write_answers(given.out_dir / TABLES["multiple_choice"], rows, questions, predicted_N, share_NM)

    is_right_N = predicted_N == [question.answer for question in questions]
    probability_N = np.nanmax(share_NM, axis=1)
    overlap_N = None if given.overlap_N is None else given.overlap_N[positions]
    all_rows = np.arange(len(rows))
    without_overlap = {}
    if overlap_N is not None and overlap_N.any():
        kept = np.flatnonzero(~overlap_N)
        without_overlap = _metrics(rows, questions, is_right_N, probability_N, kept, given.settings)
    has_one_chance = len({len(question.options) for question in questions}) == 1
    return TaskResult(
        task="multiple_choice",
        primary="accuracy",
        metrics=_metrics(rows, questions, is_right_N, probability_N, all_rows, given.settings),
        without_overlap=without_overlap,
        by_group=by_group(
            rows,
            "accuracy",
            np.mean,
            [is_right_N],
            given.settings,
            chance=chance_level(questions) if has_one_chance else None,
        ),
        per_class=_by_kind(rows, questions, is_right_N, given.settings.confidence),
        curves=(
            reliability_curve(probability_N, is_right_N, [row.patient for row in rows], given.settings.confidence),
        ),
        settings={
            "text_of_an_option": "Question: ... Answer: ..." if templates is None else tuple(templates),
            "logit_scale": given.encoder.logit_scale,
            "tie_tolerance": TIE_TOLERANCE,
            "num_texts": len(text_TD),
        },
        notes=_notes(int((predicted_N < 0).sum()), len(rows)),
    )


def _metrics(
    rows: Sequence[Row],
    questions: Sequence[Question],
    is_right_N: Bools,
    probability_N: Floats,
    chosen: Ints,
    settings: EvaluationSettings,
) -> dict[str, Metric]:
    """Of the chosen rows. Undefined where none is chosen; without an interval where all are of one patient."""
    if not len(chosen):
        return {"accuracy": Metric(value=None, n=0), "calibration_error": Metric(value=None, n=0, lower_is_better=True)}
    patients = [rows[row].patient for row in chosen.tolist()]
    is_right, probability = is_right_N[chosen], probability_N[chosen]

    def estimate(statistic: Callable[..., float], *arrays: NDArray[Any], centred: bool = False) -> Estimate:
        return bootstrap_interval(
            statistic,
            arrays,
            groups=patients,
            **settings.resampling,
            centred=centred,
        )

    accuracy = Metric.of(estimate(np.mean, is_right), chance=chance_level([questions[row] for row in chosen.tolist()]))
    # repeated rows make the error larger, so its draws are centred; it cannot be below 0
    error = Metric.of(estimate(calibration_error, probability, is_right, centred=True), lower_is_better=True)
    no_interval = {"low": None, "high": None} if group_codes(patients).max() == 0 else {}
    return {
        "accuracy": accuracy.model_copy(update=no_interval),
        "calibration_error": error.model_copy(update={"low": max(error.low or 0.0, 0.0), **no_interval}),
    }


def _by_kind(
    rows: Sequence[Row], questions: Sequence[Question], is_right_N: Bools, confidence: float
) -> dict[str, Metric]:
    """Accuracy of each kind of question and, where they differ, of each number of options, each with its own chance."""
    kinds = [question.kind for question in questions]
    counts = [len(question.options) for question in questions]
    parts: dict[str, list[int]] = {}
    for row, kind in enumerate(kinds):
        if kind is not None:
            parts.setdefault(kind, []).append(row)
    if len(set(counts)) > 1:
        for count in sorted(set(counts)):
            parts[f"{count} options"] = [row for row, own in enumerate(counts) if own == count]
    return {
        name: Metric.of(
            proportion_interval(is_right_N[own], [rows[row].patient for row in own], confidence),
            chance=chance_level([questions[row] for row in own]),
        )
        for name, own in parts.items()
    }


def _notes(num_ties: int, num_questions: int) -> tuple[str, ...]:
    if not num_ties:
        return ()
    return (
        f"{num_ties} of {num_questions} answers are ties and count as wrong: the nearest two options look the same to "
        "the text tower. Equal options, or long questions cut at its context length, do that.",
    )
