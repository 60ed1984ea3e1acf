"""The retrieval task: which rows are candidates, what is said of those left out, and the table of ranks."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.evaluation.config import RetrievalTask
from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.methods.retrieval import retrieval_metrics, retrieval_ranks
from pretrain.evaluation.tasks.retrieval import lacks, run
from tests.unit.evaluation.task_inputs import Data, task_input

NUM_IMAGES, NUM_TEXTS, WIDTH = 80, 60, 24


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def rows_and_features() -> tuple[list[Row], np.ndarray, dict[str, np.ndarray]]:
    """80 images of 40 patients with one or two of 60 texts."""
    rng = np.random.default_rng(0)
    texts = {f"caption {u}": unit(rng.normal(size=WIDTH)).astype(np.float32) for u in range(NUM_TEXTS)}
    rows, images = [], []
    for n in range(NUM_IMAGES):
        own = [f"caption {n % NUM_TEXTS}", f"caption {(7 * n) % NUM_TEXTS}"][: 1 + n % 2]
        rows.append(Row(key=f"image-{n}", texts=tuple(own), patient=f"p{n // 2}", attributes={"sex": "fm"[n % 2]}))
        images.append(unit(texts[own[0]] + 0.25 * rng.normal(size=WIDTH)))
    return rows, np.array(images, dtype=np.float32), texts


def test_numbers_are_those_of_the_functions(tmp_path: Path) -> None:
    rows, images, texts = rows_and_features()
    given = task_input(Data(rows), {"joint": images}, tmp_path, texts)
    result = run(RetrievalTask(), given)
    order = list(dict.fromkeys(text for row in rows for text in row.texts))
    pairs = np.array([(n, order.index(text)) for n, row in enumerate(rows) for text in row.texts])
    text_UD = np.stack([texts[text] for text in order])
    expected = retrieval_metrics(
        images, text_UD, pairs, ks=(1, 5, 10, 50), patients=[row.patient for row in rows], num_resamples=50
    )
    for name, estimate in expected.items():
        found = result.metrics[name]
        assert (found.value, found.low, found.high, found.n) == pytest.approx(
            (estimate.value, estimate.low, estimate.high, estimate.n)
        )
    of_three = [expected[f"{way}_recall@{k}"].value for way in ("image_to_text", "text_to_image") for k in (5, 10, 50)]
    assert result.metrics["mean_recall_5_10_50"].value == pytest.approx(np.mean(of_three))
    assert result.primary == "mean_recall" and 0.2 < (result.metrics["mean_recall"].value or 0) < 0.99
    assert result.metrics["image_to_text_median_rank"].lower_is_better
    assert result.metrics["image_to_text_recall@5"].chance == pytest.approx(0.12, abs=0.05)
    assert result.without_overlap == {}

    for curve, way in zip(result.curves, ("image_to_text", "text_to_image"), strict=True):
        at = dict(zip(curve.x, curve.y, strict=True))
        assert at[1] == pytest.approx(result.metrics[f"{way}_recall@1"].value)
        assert curve.y[-1] == 1 and list(curve.y) == sorted(curve.y)

    with (tmp_path / "retrieval_ranks.csv").open() as file:
        table = list(csv.DictReader(file))
    image_rank, text_rank = retrieval_ranks(images, text_UD, pairs)
    assert [int(line["rank"]) - 1 for line in table] == [*image_rank, *text_rank]
    assert (table[3]["direction"], table[3]["key"]) == ("image_to_text", "image-3")
    unit = {line["key"]: line["patient"] for line in table}
    of_patient = {unit[row.key] for row in rows if row.patient == rows[3].patient}
    assert of_patient == {unit["image-3"]}  # linked: a patient's images, and their texts, are one unit
    assert all(unit[f"text-{order.index(text):06d}"] == unit[row.key] for row in rows for text in row.texts)
    assert {line["direction"] for line in table[NUM_IMAGES:]} == {"text_to_image"}
    assert len({line["key"] for line in table}) == len(table)
    (by_sex,) = [each for each in result.by_group if each.attribute == "sex"]
    assert (
        by_sex.metric == "image_to_text_recall@10"
        and by_sex.groups["female" if "female" in by_sex.groups else "f"].n == 40
    )


def test_k_that_any_model_reaches_is_left_out_and_named(tmp_path: Path) -> None:
    rows, images, texts = rows_and_features()
    result = run(RetrievalTask(), task_input(Data(rows), {"joint": images}, tmp_path, texts))
    assert "image_to_text_recall@100" not in result.metrics
    assert any("recall@100 is left out: with 60 candidates" in note for note in result.notes)
    with pytest.raises(InputError, match="give a smaller k"):
        run(RetrievalTask(ks=(60,)), task_input(Data(rows), {"joint": images}, tmp_path, texts))


def test_training_rows_and_images_without_texts_are_no_candidates(tmp_path: Path) -> None:
    rows, images, texts = rows_and_features()
    alone = run(RetrievalTask(), task_input(Data(rows), {"joint": images}, tmp_path, texts))
    more = [replace(rows[0], key="train", is_train=True), Row(key="bare"), *rows]
    given = task_input(Data(more), {"joint": np.concatenate([images[:1], images[:1], images])}, tmp_path, texts)
    result = run(RetrievalTask(), given)
    assert result.metrics == alone.metrics
    assert any(note.startswith("1 images have no text") for note in result.notes)


def test_without_overlap_is_the_evaluation_of_the_rest(tmp_path: Path) -> None:
    rows, images, texts = rows_and_features()
    overlap = np.arange(NUM_IMAGES) % 3 == 0
    kept = np.flatnonzero(~overlap)
    whole = run(RetrievalTask(), task_input(Data(rows), {"joint": images}, tmp_path, texts, overlap))
    rest = run(RetrievalTask(), task_input(Data([rows[n] for n in kept]), {"joint": images[kept]}, tmp_path, texts))
    of_rest = {name: metric for name, metric in rest.metrics.items() if name != "mean_recall"}
    assert whole.without_overlap == of_rest  # among fewer candidates k = 50 is left out: the mean is another number
    assert any("among fewer candidates recall is higher" in note for note in whole.notes)
    assert whole.metrics != rest.metrics
    everything = np.ones(NUM_IMAGES, dtype=bool)
    none_left = run(RetrievalTask(), task_input(Data(rows), {"joint": images}, tmp_path, texts, everything))
    assert all(m.value is None and m.n == 0 for m in none_left.without_overlap.values())
    assert none_left.without_overlap.keys() == none_left.metrics.keys() and "too few" in none_left.notes[-1]


def test_generic_captions_are_said_to_link_everything(tmp_path: Path) -> None:
    rows, images, texts = rows_and_features()
    generic = [replace(row, texts=(f"caption {n % 3}",)) for n, row in enumerate(rows)]
    result = run(RetrievalTask(ks=(1,)), task_input(Data(generic), {"joint": images}, tmp_path, texts))
    assert any("resample images by patient" in note for note in result.notes)
    recall = result.metrics["image_to_text_recall@1"]
    assert recall.low is not None and recall.high is not None and recall.low < recall.high


def test_what_a_set_lacks() -> None:
    rows, _, _ = rows_and_features()
    assert lacks(Data(rows)) is None
    assert lacks(Data([Row(key="a"), replace(rows[0], is_train=True)])) == "no image has a text of its own"
    assert "1 distinct texts" in str(lacks(Data([replace(row, texts=("same",)) for row in rows])))
