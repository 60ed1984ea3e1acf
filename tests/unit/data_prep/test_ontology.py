"""The disease hierarchy: matching without guessing, paths that every parent agrees on, and the sentences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.ontology import ROOT, Ontology, concepts_caption, diagnosis_caption

HIERARCHY = {
    "root": ["proliferations", "Nail diseases, nail disease", "inflammatory"],
    "Nail diseases, nail disease": [],
    "proliferations": ["benign", "malignant"],
    "benign": ["melanocytic"],
    "malignant": ["melanocytic", "Basal cell carcinoma", "Bowen's disease"],
    "melanocytic": ["Melanocytic nevus", "Malignant melanoma, melanoma", "Melasma, Lentigo"],
    "Melanocytic nevus": [],
    "Malignant melanoma, melanoma": [],
    "Melasma, Lentigo": [],
    "Basal cell carcinoma": [],
    "Bowen's disease": [],
    "inflammatory": ["Psoriasis", "Lichen planus", "Lichen simplex chronicus, ", "Chronic dermatitis, NOS"],
    "Psoriasis": ["Psoriasis (plaque)"],
    "Psoriasis (plaque)": [],
    "Lichen planus": [],
    "Lichen simplex chronicus, ": [],
    "Chronic dermatitis, NOS": [],
}


def load(tmp_path: Path, hierarchy: object) -> Ontology:
    path = tmp_path / "ontology.json"
    path.write_text(hierarchy if isinstance(hierarchy, str) else json.dumps(hierarchy), encoding="utf-8")
    return Ontology.load(path)


@pytest.fixture
def ontology(tmp_path: Path) -> Ontology:
    return load(tmp_path, HIERARCHY)


@pytest.mark.parametrize(
    ("label", "node"),
    [
        ("Psoriasis", "Psoriasis"),
        ("  PSORIASIS ", "Psoriasis"),
        ("melanoma", "Malignant melanoma, melanoma"),
        ("nail disease", "Nail diseases, nail disease"),
        ("Basal-cell  carcinomas", "Basal cell carcinoma"),
        ("Bowen\u2019s disease", "Bowen's disease"),
        ("bowen disease", "Bowen's disease"),
        ("nevus", "Melanocytic nevus"),
        ("Melanocytic naevi", "Melanocytic nevus"),
        ("psoriasis - plaque", "Psoriasis (plaque)"),
        ("lichen simplex chronicus", "Lichen simplex chronicus, "),
    ],
)
def test_matches_names_synonyms_and_safe_spellings(ontology: Ontology, label: str, node: str) -> None:
    assert ontology.match(label) == node


@pytest.mark.parametrize("label", ["", " , ", "NOS", "psoriasi", "melanom", "lichen", "lichen planus, psoriasis", ROOT])
def test_does_not_guess(ontology: Ontology, label: str) -> None:
    assert ontology.match(label) is None


def test_a_name_of_two_nodes_matches_neither(tmp_path: Path) -> None:
    tree = {"root": ["a, same", "b, same"], "a, same": [], "b, same": []}
    ontology = load(tmp_path, tree)
    assert ontology.match("same") is None
    assert ontology.match("a") == "a, same"


def test_path_says_only_what_all_parents_agree_on(ontology: Ontology) -> None:
    assert ontology.path("Malignant melanoma, melanoma") == ("proliferations", "melanocytic", "malignant melanoma")
    assert ontology.path("Basal cell carcinoma") == ("proliferations", "malignant", "basal cell carcinoma")


def test_a_lentigo_is_not_called_melasma(ontology: Ontology) -> None:
    node = ontology.match("lentigo")
    assert node is not None
    caption = diagnosis_caption("lentigo", ontology.path(node))
    assert caption == "This is a skin image diagnosed as proliferations, melanocytic, lentigo."


def test_canonical_path_has_each_node_once(ontology: Ontology) -> None:
    written = ("nail diseases", "nail disease", "something new")
    assert ontology.canonical_path(written) == ("nail diseases", "something new")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"root": ["a"], "a": ["b"], "b": ["a"]}, "cycle"),
        ({"root": ["a"]}, "'a', a child of 'root', is not defined"),
        ({"root": [], "a": []}, "'a' is no node's child"),
        ({"a": []}, "'root'"),
        ({"root": "a"}, "expected a list"),
        ({"root": [1]}, "expected a list"),
        (["root"], "expected a JSON object"),
        ('{"root": [], "root": []}', "defined twice"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, content)
    assert "ontology.json" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check ontology_path"):
        Ontology.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("diagnosis", "path", "words"),
    [
        ("psoriasis", (), "psoriasis"),
        ("melanoma", ("proliferations", "melanocytic", "malignant melanoma"), "proliferations, melanocytic, melanoma"),
        ("psoriasis", ("inflammatory", "psoriasis"), "inflammatory, psoriasis"),
        ("nail psoriasis", ("inflammatory", "psoriasis"), "inflammatory, psoriasis, nail psoriasis"),
        ("lichen planus, psoriasis", ("inflammatory",), "inflammatory, lichen planus, psoriasis"),
    ],
)
def test_diagnosis_caption(diagnosis: str, path: tuple[str, ...], words: str) -> None:
    assert diagnosis_caption(diagnosis, path) == f"This is a skin image diagnosed as {words}."


def test_concepts_caption() -> None:
    assert concepts_caption(("erythema", "scale")) == "This skin image shows erythema, scale."
    assert concepts_caption(()) is None


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_published_hierarchy() -> None:
    ontology = Ontology.load(Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample" / "ontology.json")
    nodes = [node for node in ontology.children if node != ROOT]
    assert len(nodes) == 369
    assert [node for node in nodes if ontology.match(node) != node] == []
    for label, general in (
        ("nevus", ("proliferations", "melanocytic")),
        ("actinic keratosis", ("exogenous",)),
        ("melanoma", ("proliferations", "melanocytic")),
    ):
        node = ontology.match(label)
        assert node is not None
        assert ontology.path(node)[:-1] == general
    assert ontology.match("vascular lesion") is None
    assert ontology.match("lichen planus, psoriasis") is None
    assert not any("benign" in ontology.path(node)[:-1] for node in nodes if "melanoma" in node)
