"""The disease hierarchy: matching without guessing, paths that every parent agrees on, and the sentences."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.labels.ontology import ROOT, Ontology, concepts_caption, diagnosis_caption

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


# ---------------------------------------------------------------------------------------------- free text


@pytest.mark.parametrize(
    ("label", "node", "how"),
    [
        ("psoriasis", "Psoriasis", "exact"),
        ("malignant melanoma", "Malignant melanoma, melanoma", "synonym"),
        ("mole", "Melanocytic nevus", "alias"),
        ("lichen simplex", "Lichen simplex chronicus, ", "alias"),
        ("bowen disease", "Bowen's disease", "normalised"),
        ("dermatitis, chronic", "Chronic dermatitis, NOS", "normalised"),
        ("lichenplanus", "Lichen planus", "normalised"),
        ("suspected psoriasis", "Psoriasis", "normalised"),
        ("Severe psoriasis (biopsy-proven)", "Psoriasis", "normalised"),
        ("psoriasis?", "Psoriasis", "exact"),
        ("psoriasis vulgaris", "Psoriasis (plaque)", "alias"),
        ("psoriasis vulgaris (plaque type)", "Psoriasis (plaque)", "normalised"),
        ("basal cell carcinoma (BCC)", "Basal cell carcinoma", "normalised"),
        ("psoriasis, plaque psoriasis", "Psoriasis (plaque)", "normalised"),
        ("plaque psoriasis; psoriasis, nos", "Psoriasis (plaque)", "normalised"),
        ("psoriais", "Psoriasis", "fuzzy"),
        ("suspected psoriais", "Psoriasis", "fuzzy"),
        ("basal cell carcinma", "Basal cell carcinoma", "fuzzy"),
        ("psoriais / plaque psoriasis", "Psoriasis (plaque)", "fuzzy"),
    ],
)
def test_free_text(ontology: Ontology, label: str, node: str, how: str) -> None:
    match = ontology.find(label, 0.88)
    assert (match.node, match.how) == (node, how)
    assert match.candidates == ()
    assert (match.similarity == 1) == (how != "fuzzy")


@pytest.mark.parametrize(
    ("label", "candidates"),
    [
        ("lichen planus, psoriasis", ("Lichen planus", "Psoriasis")),
        ("psoriasis vs. lichen planus", ("Lichen planus", "Psoriasis")),
        ("psoriasis (lichen planus)", ("Lichen planus", "Psoriasis")),
        ("melanoma or Spitz tumour", ("Malignant melanoma, melanoma",)),
        # benign lies on one path to the melanoma, not on every
        ("benign, melanoma", ("Malignant melanoma, melanoma", "benign")),
    ],
)
def test_several_diagnoses_are_ambiguous(ontology: Ontology, label: str, candidates: tuple[str, ...]) -> None:
    match = ontology.find(label, 0.88)
    assert (match.node, match.how, match.similarity, match.candidates) == (None, "ambiguous", 0.0, candidates)


@pytest.mark.parametrize(
    "label",
    [
        *("no psoriasis", "non-psoriasis", "psoriasis-like rash", "history of melanoma", "melanoma excluded"),
        *("psoriasis (excluded)", "psoriasis [not confirmed]", "likely not psoriasis", "melanoma unlikely"),
        *("psoriasis with arthritis", "nail psoriasis", "seborrheic dermatitis, acne", "", "?", "nos"),
    ],
)
def test_what_names_no_node(ontology: Ontology, label: str) -> None:
    match = ontology.find(label, 0.5)
    assert (match.node, match.how) == (None, "unmatched")


def test_the_threshold_decides(ontology: Ontology) -> None:
    assert ontology.find("psoriais", 8 / 9).similarity == pytest.approx(8 / 9)
    assert ontology.find("psoriais", 0.89).how == "unmatched"
    assert ontology.find("psoriais", 1.0).how == "unmatched"
    assert ontology.find("psoriasis", 1.0).how == "exact"


def test_two_nodes_equally_near_are_ambiguous(tmp_path: Path) -> None:
    ontology = load(tmp_path, {"root": ["keratoma", "keratona"], "keratoma": [], "keratona": []})
    match = ontology.find("keratora", 0.8)
    assert (match.how, match.candidates) == ("ambiguous", ("keratoma", "keratona"))
    assert ontology.find("keratomma", 0.8).node == "keratoma"


DIFFERENT = [
    ("pityriasis rosea", "pityriasis rubra"),
    ("melanoma", "melasma"),
    ("acanthosis", "acantholysis"),
    ("lichen planus", "lichen nitidus"),
    ("tinea pedis", "tinea capitis"),
    ("tinea nigra", "linea nigra"),
    ("basal cell carcinoma", "squamous cell carcinoma"),
    ("neurofibromatosis type 1", "neurofibromatosis type 2"),
    ("leprosy reaction type 1", "leprosy reaction type 2"),
    ("benign melanocytic lesion", "malignant melanocytic lesion"),
    ("hyperpigmentation", "hypopigmentation"),
    ("postinflammatory hyperpigmentation", "postinflammatory hypopigmentation"),
    ("hypertrichosis", "hypotrichosis"),
    ("neurodermatitis", "neurodermatosis"),
    ("photodermatitis", "photodermatosis"),
    ("cutaneous t cell lymphoma", "cutaneous b cell lymphoma"),
    ("foot eczema dyshidrotic", "hand eczema dyshidrotic"),
    ("atypical nevus", "typical nevus"),
    ("scleroderma", "scleredema"),
    ("porokeratosis", "parakeratosis"),
    ("miliaria", "milia"),
    ("dermatomyositis", "dermatomycosis"),
    ("scabies", "rabies"),
    ("perioral dermatitis", "perianal dermatitis"),
    ("lymphangioma", "hemangioma"),
    ("paronychia", "pachyonychia"),
    ("hemangioma", "hemangioma of infancy"),
    ("herpes simplex 1", "herpes simplex 2"),
    ("hpv16 infection", "hpv18 infection"),
    ("chronic photodermatitis", "chronic photodermatosis"),
    ("hand food mouth disease", "hand foot mouth disease"),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_diseases_of_similar_names(tmp_path: Path, first: str, second: str) -> None:
    """Where only one of the two is in the hierarchy, the other is not taken for a misspelling of it."""
    for node, label in ((first, second), (second, first)):
        assert load(tmp_path, {"root": [node], node: []}).find(label, 0.88).node is None


def test_levels(ontology: Ontology) -> None:
    assert [ontology.level(n) for n in ("proliferations", "benign", "melanocytic", "Melasma, Lentigo")] == [1, 2, 3, 4]
    assert ontology.level("Psoriasis (plaque)") == 3


def test_the_shortest_path_gives_the_level(tmp_path: Path) -> None:
    ontology = load(tmp_path, {"root": ["a", "b"], "a": ["c"], "b": ["b1"], "b1": ["c"], "c": []})
    assert ontology.level("c") == 2


def test_a_word_of_another_name_is_no_typing_error(tmp_path: Path) -> None:
    ontology = load(
        tmp_path,
        {"root": ["Angular cheilitis", "Annular erythema"]} | {"Angular cheilitis": [], "Annular erythema": []},
    )
    assert ontology.find("annular cheilitis", 0.88).node is None
    assert ontology.find("angulr cheilitis", 0.88).node == "Angular cheilitis"


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


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_published_labels() -> None:
    data_dir = Path(os.environ["DERMVLP_DATA"])
    ontology = Ontology.load(data_dir / "derm1m-sample" / "ontology.json")
    nodes = [node for node in ontology.children if node != ROOT]
    assert {ontology.level(node) for node in nodes} == {1, 2, 3, 4, 5}
    names = json.loads((data_dir / "text" / "peer_zero_shot_classnames_and_templates.json").read_text(encoding="utf-8"))
    labels = sorted({label for key, labels in names.items() if "TEMPLATES" not in key for label in labels})
    found = {label: ontology.find(label, 0.88) for label in labels}
    fuzzy = {label: match.node for label, match in found.items() if match.how == "fuzzy"}
    assert fuzzy == {"erythema annulare centrifigum": "Erythema annulare centrifugum"}
    assert sum(match.node is not None for match in found.values()) == pytest.approx(391, abs=3)


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_misspelt_names_of_the_published_hierarchy() -> None:
    """One letter left out, doubled or swapped: found, or left unmatched; never another disease."""
    ontology = Ontology.load(Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample" / "ontology.json")
    outcomes = Counter[str]()
    for node in ontology.children:
        if node == ROOT or "," in node or "(" in node:
            continue
        for place in range(1, len(node) - 1):
            for typo in (
                node[:place] + node[place + 1 :],
                node[:place] + node[place] + node[place:],
                node[:place] + node[place + 1] + node[place] + node[place + 2 :],
            ):
                found = ontology.find(typo, 0.88).node
                outcomes["right" if found == node else "none" if found is None else typo + " -> " + found] += 1
    assert set(outcomes) == {"right", "none"}
    assert outcomes["right"] > 0.75 * outcomes.total()
