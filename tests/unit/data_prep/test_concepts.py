"""Visual concepts: terms, synonyms and plurals are found, and nothing is guessed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.labels.concepts import Concepts

TERMS = {
    "brown(hyperpigmentation)": ["hyperpigmented"],
    "exophytic/fungating": ["fungating"],
    "patch": ["hyperpigmented", "vitiligo"],
    "bulla": ["bullae", "blister"],
    "nodule": ["nodular", "cyst"],
    "cyst": ["cyst"],
    "gray": [],
    "comedo": ["whitehead"],
    "streaks": ["starburst", "irregular"],
    "dots and globules": [],
    "xerosis": ["dry skin"],
    "purpura/petechiae": ["purpura"],
}


def load(tmp_path: Path, terms: object) -> Concepts:
    path = tmp_path / "terms.json"
    path.write_text(terms if isinstance(terms, str) else json.dumps(terms), encoding="utf-8")
    return Concepts.load(path)


@pytest.fixture
def concepts(tmp_path: Path) -> Concepts:
    return load(tmp_path, TERMS)


@pytest.mark.parametrize(
    ("text", "term", "how"),
    [
        ("Patch", "patch", "exact"),
        ("brown (hyperpigmentation)", "brown(hyperpigmentation)", "exact"),
        ("brown", "brown(hyperpigmentation)", "synonym"),
        ("hyperpigmentation", "brown(hyperpigmentation)", "synonym"),
        ("exophytic", "exophytic/fungating", "synonym"),
        ("blister", "bulla", "synonym"),
        ("petechia", "purpura/petechiae", "normalised"),
        ("blisters", "bulla", "normalised"),
        ("patches", "patch", "normalised"),
        ("comedones", "comedo", "normalised"),
        ("whiteheads", "comedo", "normalised"),
        ("streak", "streaks", "normalised"),
        ("dot and globule", "dots and globules", "normalised"),
        ("grey", "gray", "exact"),
        ("cyst", "cyst", "exact"),  # a term, though a synonym of another
        ("xerosis", "xerosis", "exact"),
    ],
)
def test_found(concepts: Concepts, text: str, term: str, how: str) -> None:
    match = concepts.look_up(text)
    assert (match.node, match.how) == (term, how)
    assert concepts.find(text) == term


@pytest.mark.parametrize(
    "text", ["", "-", "patchy", "brownish", "irregular", "blistering", "skin", "patch, bulla", "xero"]
)
def test_not_guessed(concepts: Concepts, text: str) -> None:
    assert concepts.find(text) is None


def test_a_synonym_of_two_terms_is_neither(concepts: Concepts) -> None:
    match = concepts.look_up("hyperpigmented")
    assert (match.node, match.how) == (None, "ambiguous")
    assert match.candidates == ("brown(hyperpigmentation)", "patch")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ([], "expected a JSON object"),
        ({}, "expected a JSON object"),
        ({"a": "b"}, "expected a list"),
        ({"a": [1]}, "expected a list"),
        ({"()": []}, "no letters"),
        ('{"a": [], "a": []}', "defined twice"),
    ],
)
def test_malformed_lists_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, content)
    assert "terms.json" in str(caught.value)


def test_missing_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="concepts_path"):
        Concepts.load(tmp_path / "none.json")


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_published_list() -> None:
    concepts = Concepts.load(Path(os.environ["DERMVLP_DATA"]) / "text" / "ConceptTerms.json")
    assert len(concepts.terms) == 64
    assert [term for term in concepts.terms if concepts.find(term) != term] == []
    assert concepts.find("hyperpigmented") is None
    assert concepts.find("papules") == "papule"
    assert concepts.find("white") == "white(hypopigmentation)"
    assert concepts.find("irregular") is None
