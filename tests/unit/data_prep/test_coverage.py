"""Coverage: every row is counted once, and what needs a person is listed."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from data_prep.labels.concepts import Concepts
from data_prep.labels.coverage import concept_coverage, diagnosis_coverage, print_coverage
from data_prep.labels.ontology import Ontology

HIERARCHY = {"root": ["inflammatory"], "inflammatory": ["Psoriasis", "Eczema"], "Psoriasis": [], "Eczema": []}
LABELS = {"psoriasis": 50, "psoriais": 3, "suspected eczema": 4, "psoriasis, eczema": 5, "lupus": 7, "inflammatory": 1}


@pytest.fixture
def ontology(tmp_path: Path) -> Ontology:
    path = tmp_path / "ontology.json"
    path.write_text(json.dumps(HIERARCHY), encoding="utf-8")
    return Ontology.load(path)


def test_diagnoses(ontology: Ontology) -> None:
    coverage = diagnosis_coverage(LABELS, ontology, 0.88)
    assert coverage["rows"] == {"all": 70, "exact": 51, "fuzzy": 3, "normalised": 4, "ambiguous": 5, "unmatched": 7}
    assert coverage["labels"] == {"all": 6, "exact": 2, "fuzzy": 1, "normalised": 1, "ambiguous": 1, "unmatched": 1}
    assert coverage["levels"] == {"1": 1, "2": 57}
    assert coverage["fuzzy"] == {"psoriais": {"node": "Psoriasis", "similarity": 0.8889, "rows": 3}}
    assert coverage["ambiguous"] == {"psoriasis, eczema": {"candidates": ["Eczema", "Psoriasis"], "rows": 5}}
    assert coverage["unmatched"] == {"lupus": 7}
    assert json.loads(json.dumps(coverage)) == coverage


def test_the_threshold_moves_rows_to_unmatched(ontology: Ontology) -> None:
    coverage = diagnosis_coverage(LABELS, ontology, 0.95)
    assert coverage["fuzzy"] == {}
    assert list(coverage["unmatched"].items()) == [("lupus", 7), ("psoriais", 3)]


def test_no_labels(ontology: Ontology, capsys: pytest.CaptureFixture[str]) -> None:
    coverage = diagnosis_coverage({}, ontology, 0.88)
    assert coverage["rows"] == {"all": 0}
    print_coverage("diagnoses", coverage)
    assert capsys.readouterr().out == "diagnoses: 0 distinct in 0 rows\n"


def test_printed(ontology: Ontology, capsys: pytest.CaptureFixture[str]) -> None:
    print_coverage("diagnoses", diagnosis_coverage(LABELS | {"x": 2, "y": 1}, ontology, 0.88), num_listed=1)
    out = capsys.readouterr().out
    assert "diagnoses: 8 distinct in 73 rows" in out
    assert "fuzzy: 'psoriais' -> 'Psoriasis', similarity 0.889, 3 rows" in out
    assert "ambiguous: 'psoriasis, eczema' may be 'Eczema' or 'Psoriasis', 5 rows" in out
    assert "unmatched: 'lupus' 7 rows" in out
    assert "unmatched: 2 more" in out


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_real_rows() -> None:
    data_dir = Path(os.environ["DERMVLP_DATA"])
    labels, concepts = Counter[str](), Counter[str]()
    for path in (data_dir / "derm1m-sample").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["disease_label"] != "no definitive diagnosis":
                    labels[row["disease_label"]] += 1
                if row["skin_concept"] != "No visual concepts":
                    concepts.update(name.strip() for name in row["skin_concept"].split(",") if name.strip())
    ontology = Ontology.load(data_dir / "derm1m-sample" / "ontology.json")
    diagnoses = diagnosis_coverage(labels, ontology, 0.88)
    assert "unmatched" not in diagnoses["rows"]
    assert set(diagnoses["ambiguous"]) == {"lichen planus, psoriasis", "candidiasis, tinea"}
    assert set(diagnoses["levels"]) == {"1", "2", "3", "4", "5"}
    found = concept_coverage(concepts, Concepts.load(data_dir / "text" / "ConceptTerms.json"))
    assert found["rows"]["exact"] + found["rows"]["synonym"] > 0.8 * found["rows"]["all"]
    assert next(iter(found["unmatched"])) == "raised"
