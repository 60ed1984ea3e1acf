"""Concept scores and AUROCs, against loops over MONET's formula and scikit-learn."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from data_prep.errors import InputError
from pretrain.evaluation.interfaces import Row
from pretrain.evaluation.methods.concepts import (
    PROMPTS,
    TERMS_PATH,
    annotate,
    annotate_rows,
    aurocs,
    concept_scores,
    encode_prompts,
    find_synonyms,
)
from tests.unit.evaluation.stand_in import WIDTH, StandInEncoder, text_feature, unit

SYNONYMS = {"ulcer": ["ulcer", "ulcerated"], "bulla": ["bulla", "bullae", "blister"], "scale": ["scaly"]}
# fmt: off
#: As their tables name them.
SKINCON = [
    "Vesicle", "Papule", "Macule", "Plaque", "Abscess", "Pustule", "Bulla", "Patch", "Nodule", "Ulcer", "Crust",
    "Erosion", "Excoriation", "Atrophy", "Exudate", "Purpura/Petechiae", "Fissure", "Induration", "Xerosis",
    "Telangiectasia", "Scale", "Scar", "Friable", "Sclerosis", "Pedunculated", "Exophytic/Fungating",
    "Warty/Papillomatous", "Dome-shaped", "Flat topped", "Brown(Hyperpigmentation)", "Translucent",
    "White(Hypopigmentation)", "Purple", "Yellow", "Black", "Erythema", "Comedo", "Lichenification", "Blue",
    "Umbilicated", "Poikiloderma", "Salmon", "Wheal", "Acuminate", "Burrow", "Gray", "Pigmented", "Cyst",
]
DERM7PT = [
    "pigment network", "blue whitish veil", "vascular structures", "pigmentation", "streaks", "dots and globules",
    "regression structures",
]
# fmt: on


def random_images(num: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(num, WIDTH))).astype(np.float32)


def plain_score(image: np.ndarray, synonyms: list[str]) -> float:
    """MONET's order: similarities averaged over synonyms, a softmax for each prompt, the mean over prompts."""
    of_prompts = []
    for with_it, without in PROMPTS:
        target = np.mean([image.astype(float) @ text_feature(with_it.format(word)).astype(float) for word in synonyms])
        reference = image.astype(float) @ text_feature(without).astype(float)
        of_prompts.append(softmax([target * np.exp(4.5944), reference * np.exp(4.5944)])[0])
    return float(np.mean(of_prompts))


def test_scores_equal_the_formula() -> None:
    images = random_images(7)
    scores = concept_scores(images, encode_prompts(StandInEncoder().encode_texts, SYNONYMS))
    expected = [[plain_score(image, words) for words in SYNONYMS.values()] for image in images]
    np.testing.assert_allclose(scores, expected, atol=1e-12)


def test_an_image_towards_the_concept_scores_high_and_away_from_it_low() -> None:
    towards = unit(sum(text_feature(with_it.format("scaly")) - text_feature(without) for with_it, without in PROMPTS))
    scores = concept_scores(np.stack([towards, -towards]), encode_prompts(StandInEncoder().encode_texts, SYNONYMS))
    assert scores[0, 2] > 0.8 and scores[1, 2] < 0.2


def test_each_text_is_encoded_once_and_words_are_data() -> None:
    encoder = StandInEncoder()
    encode_prompts(encoder.encode_texts, {"a": ["{0.__class__}", "red"], "b": ["red", "red"]})
    assert len(encoder.texts) == len(set(encoder.texts)) == len(PROMPTS) * 3
    assert "This is skin image of {0.__class__}" in encoder.texts


def test_a_repeated_synonym_weighs_twice_as_in_the_published_list() -> None:
    encode = StandInEncoder().encode_texts
    once, twice = (
        concept_scores(random_images(3), encode_prompts(encode, {"c": words}))
        for words in (["red", "blue"], ["red", "red", "blue"])
    )
    assert np.abs(once - twice).min() > 1e-6


@pytest.mark.parametrize("ties", [False, True])
def test_aurocs_of_draws_equal_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(4, size=(80, 5)) / 4 if ties else rng.normal(size=(80, 5))
    present = rng.integers(-1, 2, size=(80, 5)).astype(np.int8)
    of_rows = aurocs(present, scores)
    for rows in (np.arange(80), rng.integers(80, size=80), rng.integers(80, size=33)):
        expected = []
        for k in range(5):
            known = rows[present[rows, k] >= 0]
            expected.append(roc_auc_score(present[known, k], scores[known, k]))
        np.testing.assert_allclose(of_rows(rows), expected, atol=1e-12)


def test_auroc_is_undefined_without_both_kinds() -> None:
    present = np.array([[1, 1, 0], [1, 0, -1], [1, -1, 0]], dtype=np.int8)
    values = aurocs(present, np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.5], [0.3, 0.4, 0.5]]))(np.arange(3))
    np.testing.assert_array_equal(values, [np.nan, 1.0, np.nan])


def test_synonyms_are_found_whatever_the_case_and_number() -> None:
    words, unlisted = find_synonyms(
        ["Ulcer", "papules", "Exophytic/Fungating", "blue-whitish veil", "glow"], TERMS_PATH
    )
    assert words["Ulcer"][0] == "ulcer" and "papule" in words["papules"]
    assert words["Exophytic/Fungating"] == ("exophytic", "fungating") and len(words["blue-whitish veil"]) == 2
    assert words["glow"] == ("glow",) and unlisted == ("glow",)


def test_own_list_covers_the_published_sets() -> None:
    terms = json.loads(TERMS_PATH.read_text(encoding="utf-8"))
    for term, words in terms.items():
        assert words and len(set(words)) == len(words) and all(word.strip() == word != "" for word in words), term
    words, unlisted = find_synonyms([*SKINCON, *DERM7PT], TERMS_PATH)
    assert not unlisted and len(SKINCON) == 48
    assert {concept: terms[concept.lower()] for concept in words} == {c: list(found) for c, found in words.items()}


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is unset: needs the published ConceptTerms")
def test_the_published_list_is_read() -> None:
    path = Path(os.environ["DERMVLP_DATA"]) / "text" / "ConceptTerms.json"
    terms = json.loads(path.read_text(encoding="utf-8"))
    words, unlisted = find_synonyms(tuple(terms), path)
    assert not unlisted and {term: list(found) for term, found in words.items()} == terms
    assert len(words) == 64 and words["streaks"].count("pigmented linear extensions") == 2
    assert find_synonyms(SKINCON, path)[1] == ()


def test_annotate_pictures_and_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    pictures[2].save(tmp_path / "c.png")
    encoder = StandInEncoder()
    scores = annotate(encoder, [*pictures[:2], tmp_path / "c.png"], SYNONYMS)
    images = encoder.encode_pixels(torch.stack([encoder.transform(picture) for picture in pictures])).numpy()
    expected = [[plain_score(image, words) for words in SYNONYMS.values()] for image in images]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    (tmp_path / "d.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"d\.png"):
        annotate(encoder, [tmp_path / "d.png"], SYNONYMS)


def test_annotate_rows_writes_all_concepts_of_the_list(tmp_path: Path) -> None:
    terms_path = tmp_path / "terms.json"
    terms_path.write_text(json.dumps({**SYNONYMS, "gray, dull": []}))
    rows, images = [Row("a", patient="p1"), Row("b")], random_images(2)
    annotate_rows(StandInEncoder(), rows, images, tmp_path / "scores.csv", terms_path)
    with (tmp_path / "scores.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["key", "patient", "ulcer", "bulla", "scale", "gray, dull"]
    assert [line[:2] for line in lines] == [["a", "p1"], ["b", ""]]
    expected = [[plain_score(image, words) for words in (*SYNONYMS.values(), ["gray, dull"])] for image in images]
    np.testing.assert_allclose(np.array([line[2:] for line in lines], dtype=float), expected, atol=1e-12)


def test_unusable_input_is_refused() -> None:
    encode = StandInEncoder().encode_texts
    for synonyms, message in (
        ({}, "expected at least one"),
        ({"ulcer": []}, "concept 'ulcer': expected its synonyms"),
        ({"ulcer": ["ulcer", " "]}, "concept 'ulcer': expected its synonyms, at least one and none blank"),
    ):
        with pytest.raises(InputError, match=message):
            encode_prompts(encode, synonyms)
    prompts = encode_prompts(encode, SYNONYMS)
    with pytest.raises(InputError, match="width 8, the prompts' 24"):
        concept_scores(unit(np.ones((2, 8))), prompts)
    with pytest.raises(InputError, match="image features: 1 rows"):
        concept_scores(np.full((1, WIDTH), np.nan), prompts)
