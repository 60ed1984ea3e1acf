"""Derm1M's published tables: absent sentences, hierarchical labels, groups and the remains in its captions."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path

import pytest

from data_prep.config import Derm1MSource, PrepareConfig
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.labels.ontology import Ontology, diagnosis_caption
from data_prep.sources import open_source
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.derm1m import clean_caption, diagnosis_and_path, group_of

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
COLUMNS = [
    "filename",
    "caption",
    "truncated_caption",
    "source",
    "source_type",
    "disease_label",
    "hierarchical_disease_label",
    "skin_concept",
    "body_location",
    "symptoms",
    "age",
    "gender",
]
NOTHING = {
    "disease_label": "no definitive diagnosis",
    "hierarchical_disease_label": "no definitive diagnosis",
    "skin_concept": "No visual concepts",
    "body_location": "No body location information",
    "symptoms": "No symptom information",
    "age": "No age information",
    "gender": "No gender information",
}


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_absent_sentences_and_splits(tmp_path: Path) -> None:
    row = NOTHING | {"filename": "a.jpg", "caption": "Red."}
    known = row | {
        "source": " Pubmed_English",
        "age": "45",
        "gender": "Female",
        "skin_concept": "red, patch",
        "body_location": "face, neck",
    }
    train = write(tmp_path / "train.csv", row, known, row | {"filename": "/a.jpg"}, row | {"caption": " "})
    val = write(tmp_path / "val.csv", row | {"gender": "male, female", "age": "adult"})
    config = Derm1MSource(train_csv_path=train, val_csv_path=val, image_dir=tmp_path)
    first, second, gone, empty, other = open_source(config).rows()
    assert isinstance(first, SourceRow) and isinstance(second, SourceRow) and isinstance(other, SourceRow)
    assert (first.diagnosis, first.diagnosis_path, first.concepts, first.body_site) == (None, (), (), None)
    assert (first.demographics.age_years, first.demographics.sex, first.group) == (None, None, None)
    assert (second.demographics.age_years, second.demographics.sex) == (45, "female")
    assert (first.source, second.source, second.caption_origin) == (None, "pubmed_english", "column:caption")
    assert (second.concepts, second.body_site, second.licence) == (("red", "patch"), "face, neck", "CC-BY-NC-4.0")
    assert gone == Rejection("train.csv", 3, "filename", "the image path leads out of the image folder")
    assert empty == Rejection("train.csv", 4, "caption", "no caption")
    assert (other.table, other.row, other.split, first.split) == ("val.csv", 1, "val", "train")
    assert (other.demographics.age_years, other.demographics.sex) == (None, None)
    alone = Derm1MSource(train_csv_path=train, image_dir=tmp_path)
    assert next(iter(open_source(alone).rows())).split is None  # type: ignore[union-attr]


def test_unusable_values_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = NOTHING | {"filename": "a.jpg", "caption": "Red.", "age": "adult", "gender": "male, female"}
    config = Derm1MSource(train_csv_path=write(tmp_path / "t.csv", row), image_dir=tmp_path)
    list(open_source(config).rows())
    for field in ("age", "sex"):
        assert f"{field} cannot be used and counts as absent in 1 row(s), the first is row 1" in caplog.text


def test_rows_for_a_describer(tmp_path: Path) -> None:
    row = NOTHING | {"filename": "a.jpg", "caption": "", "disease_label": "eczema"}
    config = Derm1MSource(train_csv_path=write(tmp_path / "t.csv", row), image_dir=tmp_path)
    (only,) = open_source(config, needs_caption=False).rows()
    assert isinstance(only, SourceRow)
    assert (only.caption, only.caption_origin, only.diagnosis) == (None, "", "eczema")
    assert open_source(config).files == (tmp_path / "t.csv",)


@pytest.mark.parametrize(
    ("label", "hierarchical", "diagnosis", "path"),
    [
        ("psoriasis", "inflammatory, non-infectious, psoriasis", "psoriasis", "inflammatory/non-infectious/psoriasis"),
        (
            "lichen planus, psoriasis",
            "inflammatory, lichen planus, psoriasis",
            "lichen planus, psoriasis",
            "inflammatory",
        ),
        ("a, b", "root of all", "a, b", "root of all"),
        ('SK (from "sk/isk")', 'benign, SK (from "sk/isk")', "sk", "benign/sk"),
        ("no definitive diagnosis", "inflammatory", None, ""),
        ("No Definitive Diagnosis", "no definitive diagnosis", None, ""),
        ("eczema", "", "eczema", ""),
        (
            "nummular eczema",
            "inflammatory, eczema, eczema, nummular eczema",
            "nummular eczema",
            "inflammatory/eczema/nummular eczema",
        ),
    ],
)
def test_labels(label: str, hierarchical: str, diagnosis: str | None, path: str) -> None:
    assert diagnosis_and_path(label, hierarchical) == (diagnosis, tuple(path.split("/")) if path else ())


@pytest.mark.parametrize(
    ("filename", "group"),
    [
        ("youtube/ypkfPgxNFms_frame_14593_12.jpg", "youtube:ypkfPgxNFms"),
        ("youtube/mad_-Uza6Dk_frame_3288_0.jpg", "youtube:mad_-Uza6Dk"),
        ("pubmed/75_4a_PMC4660531_MEAJO_22_452_g002.png", "PMC4660531"),
        ("edu/A textbook on PMC99_00391_0.png", None),
        ("public/ISIC_1.jpg", None),
        ("public/warts-common_77_1.jpg", None),
        ("IIYI/31089_5.png", "IIYI:31089"),
        ("Derm1M/twitter/10920_0_1.jpg", "twitter:10920"),
        ("reddit/565_1.png", "reddit:565"),
        ("edu/Atlas, 2nd (ed.)-Elsevier (2016)_00213_02424.png", "page:Atlas, 2nd (ed.)-Elsevier (2016)_00213"),
        ("note/Atlas, 2nd (ed.)-Elsevier (2016)_00213_00011_1.png", "page:Atlas, 2nd (ed.)-Elsevier (2016)_00213"),
    ],
)
def test_groups(filename: str, group: str | None) -> None:
    assert group_of(filename) == group


@pytest.mark.parametrize(
    ("text", "clean", "num"),
    [
        ("Drain it.</s> This image shows pus.", "Drain it. This image shows pus.", 1),
        ("A skin disease. \n\nNone", "A skin disease.", 1),
        ("Complications: None", "Complications: None", 0),
        ("Wrong text. \n\nCorrected:\n\nThis image shows SJS.", "This image shows SJS.", 1),
        ("A clinical skin image, diagnosed as eczema photos.", "A clinical skin image, diagnosed as eczema.", 1),
        (
            "An image, diagnosed as psoriasis pictures lichen planus.",
            "An image, diagnosed as psoriasis, lichen planus.",
            1,
        ),
        ("He sent photos.  Lesions <2 cm and >1 cm.", "He sent photos. Lesions <2 cm and >1 cm.", 0),
    ],
)
def test_remains_in_captions(text: str, clean: str, num: int) -> None:
    cleaned, found = clean_caption(text)
    assert (cleaned, len(found)) == (clean, num)


def test_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("filename,captions\n")
    with pytest.raises(InputError, match=r"no column 'caption'.*did you mean 'captions'"):
        open_source(Derm1MSource(train_csv_path=tmp_path / "t.csv", image_dir=tmp_path))
    with pytest.raises(InputError, match=r"source\.val_csv_path"):
        train = write(tmp_path / "u.csv")
        open_source(Derm1MSource(train_csv_path=train, val_csv_path=tmp_path / "none.csv", image_dir=tmp_path))


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_real_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """900 published rows; their images are not to be had, and no source opens one."""
    sample = Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample"
    monkeypatch.setenv("DERM1M_DIR", str(sample))
    config = load_config(CONFIGS / "derm1m.yaml", [f"source.image_dir={tmp_path}"], PrepareConfig)
    rows = [row for row in open_source(config.source).rows() if isinstance(row, SourceRow)]
    assert len(rows) == 900
    assert Counter(row.split for row in rows) == {"train": 794, "val": 106}
    assert sum(row.diagnosis is None for row in rows) == 20
    assert sum(not row.diagnosis_path for row in rows) == 20
    assert sum(row.demographics.age_years is not None for row in rows) == 70
    assert sum(row.concepts != () for row in rows) == 900 - 376
    assert sum((row.group or "").startswith("youtube:") for row in rows) == 394
    assert len({row.group for row in rows if (row.group or "").startswith(("youtube:", "PMC"))}) == 299 + 112
    # five of IIYI's threads and one of Twitter's have several pictures, two book pages two figures
    assert sum((row.group or "").startswith(("IIYI:", "twitter:", "reddit:")) for row in rows) == 117 + 12 + 1
    assert len({row.group for row in rows if (row.group or "").startswith(("IIYI:", "twitter:", "reddit:"))}) == 130 - 6
    assert sum((row.group or "").startswith("page:") for row in rows) == 92 + 36
    assert len({row.group for row in rows if (row.group or "").startswith("page:")}) == 128 - 2
    assert Counter(row.source for row in rows)["pubmed_english"] == 74 and not any(row.source is None for row in rows)
    assert {row.caption_origin for row in rows} == {"column:caption"}
    assert not any("</s>" in (row.caption or "") or "Corrected" in (row.caption or "") for row in rows)
    assert config.ontology_path is not None
    ontology = Ontology.load(config.ontology_path)
    for row in rows:
        if row.diagnosis is not None:
            path = ontology.canonical_path(row.diagnosis_path)
            assert all(ontology.match(part) for part in path)
            assert diagnosis_caption(row.diagnosis, path).endswith(f"{row.diagnosis}.")
