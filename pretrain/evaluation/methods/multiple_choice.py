"""Multiple choice with a dual encoder: the option whose text is nearest to the image.

Shapes: N questions (an image each), M options of the question with most, T distinct texts, D joint width. Arrays over
options are (N, M); beyond a question's own options they hold -1 or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from pretrain.evaluation.interfaces import Question, Row
from pretrain.evaluation.methods.zero_shot import build_classifier
from pretrain.evaluation.metrics.statistics import Floats, Ints, check_features
from pretrain.evaluation.tables import write_table

#: Cosines closer than this are a tie: features are float32, and texts that become equal tokens (two long ones, cut at
#: the same context length) differ in their last bits with the batch they are encoded in.
TIE_TOLERANCE = 1e-6

_PAIRS_PER_CHUNK = 8192


def check_questions(rows: Sequence[Row]) -> list[Question]:
    """Their questions. Raises InputError, with the row, for fewer than two options or an answer outside them."""
    questions = []
    for row in rows:
        question = row.question
        if question is None or len(question.options) < 2 or not 0 <= question.answer < len(question.options):
            raise InputError(
                f"row {row.key}, question: expected at least two options and the answer's position among them, from 0; "
                f"got {question!r}"
            )
        questions.append(question)
    return questions


def encode_options(
    encode_texts: Callable[[list[str]], Floats], questions: Sequence[Question], templates: Sequence[str] | None = None
) -> tuple[Floats, NDArray[np.int64]]:
    """Unit features of the distinct texts, (T, D), and each option's place among them, (N, M).

    An option's text is "Question: ... Answer: ...", as CLIP was first asked (Shen et al., "How Much Can CLIP Benefit
    Vision-and-Language Tasks?", 2021): general, and weak where texts of training look otherwise. With `templates` it is
    the option alone in each, features averaged, then normalised, as in zero-shot classification.
    """
    place_of: dict[str, int] = {}
    text_NM = np.full((len(questions), max(len(question.options) for question in questions)), -1, dtype=np.int64)
    for row, question in enumerate(questions):
        for m, option in enumerate(question.options):
            text = option if templates is not None else f"Question: {question.text} Answer: {option}"
            text_NM[row, m] = place_of.setdefault(text, len(place_of))
    texts = list(place_of)
    if templates is not None:
        return build_classifier(encode_texts, texts, templates), text_NM
    text_TD = np.asarray(encode_texts(texts))
    check_features(text_TD, "text features")
    return text_TD, text_NM


def option_cosines(image_ND: Floats, text_TD: Floats, text_NM: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cosine of each image with each of its options, (N, M) float64. Both features are unit vectors."""
    check_features(image_ND, "image features")
    if image_ND.shape[1] != text_TD.shape[1]:
        raise InputError(f"image features have width {image_ND.shape[1]}, text features {text_TD.shape[1]}")
    cosine_NM = np.full(text_NM.shape, np.nan)
    rows, options = np.nonzero(text_NM >= 0)
    for start in range(0, len(rows), _PAIRS_PER_CHUNK):
        row, option = rows[start : start + _PAIRS_PER_CHUNK], options[start : start + _PAIRS_PER_CHUNK]
        images, texts = image_ND[row].astype(np.float64), text_TD[text_NM[row, option]].astype(np.float64)
        cosine_NM[row, option] = np.einsum("nd,nd->n", images, texts)
    return cosine_NM


def choose(cosine_NM: NDArray[np.float64]) -> NDArray[np.int64]:
    """The nearest option of each question, (N,); -1 where another is as near, so that a tie is never right."""
    best = np.nanmax(cosine_NM, axis=1, keepdims=True)
    is_tie = (cosine_NM >= best - TIE_TOLERANCE).sum(axis=1) > 1
    return np.where(is_tie, -1, np.nanargmax(cosine_NM, axis=1))


def option_probabilities(cosine_NM: NDArray[np.float64], logit_scale: float) -> NDArray[np.float64]:
    """Softmax of `logit_scale` x cosine over a question's own options, (N, M)."""
    logits = logit_scale * cosine_NM
    exponentials = np.exp(logits - np.nanmax(logits, axis=1, keepdims=True))
    shares: NDArray[np.float64] = exponentials / np.nansum(exponentials, axis=1, keepdims=True)
    return shares


def chance_level(questions: Sequence[Question]) -> float:
    """What guessing gives: the mean of 1 / number of options."""
    return float(np.mean([1 / len(question.options) for question in questions]))


def write_answers(
    path: Path, rows: Sequence[Row], questions: Sequence[Question], predicted_N: Ints, share_NM: NDArray[np.float64]
) -> None:
    """multiple_choice_answers.csv: key, patient, answer, predicted, then a column an option with its probability.

    Positions count from 0, as in `Question.answer`; `predicted` is empty for a tie, a probability where a question has
    no such option.
    """
    header = ["key", "patient", "answer", "predicted", *(f"option_{m}" for m in range(share_NM.shape[1]))]
    lines = []
    for row, question, predicted, share_M in zip(rows, questions, predicted_N.tolist(), share_NM.tolist(), strict=True):
        shares = [share if m < len(question.options) else None for m, share in enumerate(share_M)]
        lines.append([row.key, row.patient, question.answer, None if predicted < 0 else predicted, *shares])
    write_table(path, header, lines)
