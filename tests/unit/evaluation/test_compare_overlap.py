"""Differences without the images that either model was trained on, against computations of their own."""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from data_prep.errors import InputError
from pretrain.evaluation.comparison.compare import Comparison, compare
from pretrain.evaluation.config import ConceptsTask, ZeroShotTask
from pretrain.evaluation.results import Leakage, Metric, read_result, write_result
from pretrain.evaluation.tables import write_table
from pretrain.evaluation.tasks import concepts, zero_shot
from tests.unit.evaluation.open_clip_set import make_input, make_rows, write_evaluation
from tests.unit.evaluation.test_compare import made_up, made_up_task, multiple_choice, with_concepts


def trained_on(folder: Path, *keys: str) -> Path:
    """As `dermvlp evaluate` leaves it where the training data hold these rows."""
    leakage = Leakage(training_data="train", num_compared=99, num_same_pixels=len(keys), num_near=0)
    write_result(folder, read_result(folder).model_copy(update={"leakage": leakage}))
    write_table(folder / "trained_on.csv", ("key",), [(key,) for key in keys])
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_that_either_was_trained_on_are_left_out(tmp_path: Path) -> None:
    first = trained_on(multiple_choice(tmp_path / "a", "a", "1100-21011"), "q0", "q8")
    second = trained_on(multiple_choice(tmp_path / "b", "b", "1111011101"), "q2")
    (found,) = compare([first, second]).differences
    assert found.value.n == 10 and found.value.value == pytest.approx((8 - 5) / 10)
    mine, theirs = (np.array([code == "1" for code in text], int) for text in ("100-211", "1101111"))
    assert found.without_overlap is not None and found.p_without_overlap is not None
    assert found.without_overlap.n == 7 and found.without_overlap.value == pytest.approx((theirs - mine).mean())
    # every way to swap the two models' answers
    gains = [abs(np.sum(np.array(signs) * (theirs - mine))) for signs in product((-1, 1), repeat=7)]
    expected = np.mean(np.array(gains) >= abs(np.sum(theirs - mine)))
    assert found.p_without_overlap.permutation == pytest.approx(expected)
    assert found.p_without_overlap.is_exact and found.p_without_overlap.holm == pytest.approx(expected)
    assert found.without_overlap.low <= found.without_overlap.value <= found.without_overlap.high
    again = compare([first, second])
    assert Comparison.model_validate_json(again.model_dump_json()) == again


def test_nothing_is_left_out_where_nothing_was_trained_on(tmp_path: Path) -> None:
    first = trained_on(multiple_choice(tmp_path / "a", "a", "1100"))
    second = trained_on(multiple_choice(tmp_path / "b", "b", "1110"), "a row without a question")
    found = compare([first, second])
    assert found.differences[0].without_overlap is None and found.notes == ()


@pytest.mark.parametrize("classnames", [("melanoma", "nevus", "psoriasis"), ("benign lesion", "melanoma")])
def test_zero_shot_without_the_overlap(tmp_path: Path, classnames: tuple[str, ...]) -> None:
    rows, folders, expected, stated = make_rows(60, classnames), [], [], []
    overlap_N = np.arange(60) % 4 == 0
    kept = {row.key for row, is_known in zip(rows, overlap_N, strict=True) if not is_known}
    for model in range(2):
        given = make_input(tmp_path / str(model), rows, classnames, model_seed=model, overlap_N=overlap_N)
        result = zero_shot.run(ZeroShotTask(), given)
        folder = write_evaluation(given, result)
        folders.append(trained_on(folder, *(row.key for row in rows if row.key not in kept)))
        left = [row for row in rows_of(folder / "zero_shot_probabilities.csv") if row["key"] in kept]
        labels = [row["label"] for row in left]
        if len(classnames) == 2:
            scores = [np.log(float(row[classnames[1]])) - np.log(float(row[classnames[0]])) for row in left]
            expected.append(roc_auc_score([label == classnames[1] for label in labels], scores))
        else:
            expected.append(balanced_accuracy_score(labels, [row["predicted"] for row in left]))
        stated.append(result.without_overlap[result.primary].value)
    (found,) = compare(folders, num_resamples=100, num_permutations=100).differences
    assert found.without_overlap is not None and found.without_overlap.n == 45
    assert found.without_overlap.value == pytest.approx(expected[1] - expected[0], abs=1e-12)
    assert found.without_overlap.value == pytest.approx(stated[1] - stated[0], abs=1e-12)
    assert found.without_overlap.value != pytest.approx(found.value.value, abs=1e-6)


def test_concepts_that_become_too_rare_leave_the_mean(tmp_path: Path) -> None:
    """As in the task's own numbers without the overlap: of ulcer four images are left, and five are needed."""
    rows, folders, stated, expected = with_concepts(80), [], [], []
    ulcers = [number for number, row in enumerate(rows) if (row.concepts or {})["ulcer"]]
    overlap_N = np.isin(np.arange(80), ulcers[4:])
    keys = [row.key for row, is_known in zip(rows, overlap_N, strict=True) if is_known]
    for model in range(2):
        given = make_input(tmp_path / str(model), rows, model_seed=model, overlap_N=overlap_N)
        result = concepts.run(ConceptsTask(), given)
        folders.append(trained_on(write_evaluation(given, result), *keys))
        stated.append(result.without_overlap["mean_auroc"])
        table = [row for row in rows_of(given.out_dir / "concept_scores.csv") if row["key"] not in keys]
        known = [row for row in table if row["scale:present"]]
        expected.append(roc_auc_score([int(r["scale:present"]) for r in known], [float(r["scale"]) for r in known]))
    (found,) = compare(folders, num_resamples=100, num_permutations=100).differences
    assert found.without_overlap is not None
    assert found.without_overlap.value == pytest.approx(expected[1] - expected[0], abs=1e-12)
    assert found.without_overlap.value == pytest.approx(stated[1].value - stated[0].value, abs=1e-12)
    assert found.without_overlap.n == stated[0].n


def test_holm_counts_every_pair_without_the_overlap_too(tmp_path: Path) -> None:
    """One pair has no such images: its only test stands for it."""
    folders = [
        multiple_choice(tmp_path / name, name, codes)
        for name, codes in (("a", "0000000000"), ("b", "1111110000"), ("c", "1111111111"))
    ]
    trained_on(folders[2], "q9")
    ab, ac, bc = compare(folders).differences
    assert ab.without_overlap is None and ab.p_without_overlap is None
    p = sorted([ab.p.permutation, ac.p_without_overlap.permutation, bc.p_without_overlap.permutation])
    assert p == [2 / 2**9, 2 / 2**6, 2 / 2**3]
    assert ac.p_without_overlap.holm == pytest.approx(3 * p[0])
    assert bc.p_without_overlap.holm == pytest.approx(p[2]) and bc.p.holm == pytest.approx(2 / 2**4)


def test_where_there_is_none_a_note_says_why(tmp_path: Path) -> None:
    recalls = {"image_to_text_recall@1": Metric(value=1, n=2)}
    folders = []
    for name in "ab":
        folder = made_up(tmp_path / name, name, made_up_task("retrieval", "mean_recall", 1.0, **recalls))
        rows = [(direction, f"{i}", "", 1) for direction in ("image_to_text", "text_to_image") for i in range(2)]
        write_table(folder / "retrieval_ranks.csv", ("direction", "key", "patient", "rank"), rows)
        folders.append(trained_on(folder, "0"))
    found = compare(folders)
    assert found.differences[0].without_overlap is None and "other candidates" in found.notes[0]

    good, other = (multiple_choice(tmp_path / f"mc {name}", name, "11") for name in "ab")
    found = compare([trained_on(good, "q0", "q1"), other])
    assert found.differences[0].without_overlap is None
    assert found.notes == ("multiple_choice on set: a and b: undefined without the 2 images that were trained on.",)
    (good / "trained_on.csv").unlink()
    found = compare([good, other])
    assert found.differences[0].without_overlap is None and "evaluate again for the difference" in found.notes[0]
    write_table(good / "trained_on.csv", ("key",), [("q0",)])
    with pytest.raises(InputError, match=r"trained_on.csv: names 1 rows, evaluation.json beside it counts 2"):
        compare([good, other])
    names = ("benign lesion", "melanoma")
    for name in "ab":
        folder = made_up(tmp_path / f"one class {name}", name, made_up_task("zero_shot", "auroc", 1.0))
        rows = [(str(i), None, names[i % 2], names[i % 2], 1 - i % 2, i % 2) for i in range(4)]
        write_table(folder / "zero_shot_probabilities.csv", ("key", "patient", "label", "predicted", *names), rows)
    found = compare([trained_on(tmp_path / "one class a", "1", "3"), tmp_path / "one class b"])
    assert "undefined without the 2 images" in found.notes[0]
