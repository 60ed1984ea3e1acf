"""MAKE's table: sub-captions, masks and captions made from the ontology come through; no disagreement is silent."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import MakeSource, PrepareConfig
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.schema import Aspect
from data_prep.sources import open_source
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.make_csv import parse_mask

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
ROW = {
    "filename": "/VL_Data/textbook/Atlas...-\u6279\u91cf, 2nd_00384_19121.png",
    "caption": "Red scaly plaque on the elbow. Itchy and painful.",
    "source": "Textbook_English",
    "standardized_disease": "psoriasis",
    "ontology_final": "inflammatory, non-infectious, psoriasis",
    "skin_concept_standarized": "plaque, scale",
    "body_location": "Elbow",
    "age": "45",
    "gender": "male",
    "ontology_caption": "This is a skin photo diagnosed as psoriasis.",
    "visual_concept_caption": "This skin photo shows plaque, scale.",
    **{f"subcaption_{number}": "" for number in range(1, 9)},
    "subcaption_1": "Red scaly plaque on the elbow",
    "subcaption_2": "Itchy and painful",
    "sub_caption_mask": "[1, 1, 0, 0, 0, 0, 0, 0]",
    "knowledge_masks": "[1, 1, 1]",
}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def rows(*changes: dict[str, str], needs_caption: bool = True) -> list[SourceRow | Rejection]:
        with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ROW))
            writer.writeheader()
            writer.writerows(ROW | change for change in changes)
        config = MakeSource(table_path=tmp_path / "t.csv", image_dir=tmp_path)
        return list(open_source(config, needs_caption).rows())

    return rows


def test_everything_reaches_its_field(make: Any, tmp_path: Path) -> None:
    (row,) = make({})
    name = "textbook/Atlas...-\u6279\u91cf, 2nd_00384_19121.png"
    assert (row.image.name, row.image.path) == (name, tmp_path / name)
    assert (row.caption, row.caption_origin) == (ROW["caption"], "column:caption")
    assert [(caption.aspect, caption.text, caption.origin) for caption in row.subcaptions] == [
        (Aspect.DIAGNOSIS, ROW["ontology_caption"], "column:ontology_caption"),
        (Aspect.VISUAL_CONCEPTS, ROW["visual_concept_caption"], "column:visual_concept_caption"),
        (Aspect.MORPHOLOGY, "Red scaly plaque on the elbow", "column:subcaption_1"),
        (Aspect.SYMPTOMS, "Itchy and painful", "column:subcaption_2"),
    ]
    assert (row.diagnosis, row.diagnosis_path) == ("psoriasis", ("inflammatory", "non-infectious", "psoriasis"))
    assert (row.concepts, row.body_site, row.source) == (("plaque", "scale"), "elbow", "textbook_english")
    assert (row.demographics.age_years, row.demographics.age_band, row.demographics.sex) == (45, "40-49", "male")
    assert (row.group, row.licence) == ("page:Atlas...-\u6279\u91cf, 2nd_00384", "CC-BY-NC-4.0")


def test_absent_sentences(make: Any) -> None:
    nothing = {
        "standardized_disease": "no definitive diagnosis",
        "ontology_final": "no definitive diagnosis",
        "skin_concept_standarized": "No visual concepts",
        "body_location": "No body location information",
        "age": "No age information",
        "gender": "No gender information",
        "ontology_caption": "",
        "visual_concept_caption": "",
        "knowledge_masks": "[1, 0, 0]",
    }
    (row,) = make(nothing)
    assert (row.diagnosis, row.diagnosis_path, row.concepts, row.body_site) == (None, (), (), None)
    assert (row.demographics.age_band, row.demographics.sex) == (None, None)
    assert [caption.origin for caption in row.subcaptions] == ["column:subcaption_1", "column:subcaption_2"]


def test_the_masks_decide_and_disagreement_is_counted(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fewer, more, wordless = make(
            {"sub_caption_mask": "[0, 1, 0, 0, 0, 0, 0, 0]", "knowledge_masks": "[1, 0, 0]"},
            {"sub_caption_mask": "[1, 1, 1, 0, 0, 0, 0, 1]"},
            {"subcaption_2": "..."},
        )
    assert [caption.text for caption in fewer.subcaptions] == ["Itchy and painful"]
    assert len(more.subcaptions) == 4 and len(wordless.subcaptions) == 3
    (record,) = caplog.records
    message = record.getMessage()
    assert "text left out since sub_caption_mask is not set for it in 1 row(s), the first is row 1" in message
    assert "text left out since knowledge_masks is not set for it in 2 row(s)" in message
    assert "sub_caption_mask set for a text that is absent in 2 row(s), the first is row 2" in message
    assert "subcaption_2 without words, or far too long, left out in 1 row(s), the first is row 3" in message


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"sub_caption_mask": "[1, 1]"}, "sub_caption_mask", "not a list of 8 0s and 1s"),
        ({"sub_caption_mask": ""}, "sub_caption_mask", "not a list of 8 0s and 1s"),
        ({"knowledge_masks": "[1, 1, 2]"}, "knowledge_masks", "not a list of 3 0s and 1s"),
        ({"knowledge_masks": "[1, [1], 1]"}, "knowledge_masks", "not a list of 3 0s and 1s"),
        ({"knowledge_masks": "__import__('os').abort()"}, "knowledge_masks", "not a list of 3 0s and 1s"),
        ({"knowledge_masks": "[0, 1, 1]"}, "caption", "no caption: masked by knowledge_masks"),
        ({"caption": ""}, "caption", "no caption"),
        ({"filename": "/home/x.png"}, "filename", "the image path leads out of the image folder"),
        ({"filename": "/VL_Data/../x.png"}, "filename", "the image path leads out of the image folder"),
        ({"filename": "/VL_Data//x.png"}, "filename", "the image path leads out of the image folder"),
    ],
)
def test_rows_that_cannot_be_used(make: Any, change: dict[str, str], field: str, reason: str) -> None:
    assert make({}, change)[1] == Rejection("t.csv", 2, field, reason)


def test_rows_for_a_describer(make: Any) -> None:
    (row,) = make({"knowledge_masks": "[0, 1, 0]"}, needs_caption=False)
    assert (row.caption, row.caption_origin, len(row.subcaptions)) == (None, "", 3)


def test_masks() -> None:
    assert parse_mask("[1, 0, true]", 3) == (True, False, True)
    for text in ("", "[]", "1", "[1, 0]", '{"a": 1}', "(1, 0, 0)", "[1, 0, null]", "[1, 0, 0"):
        with pytest.raises(ValueError):
            parse_mask(text, 3)


def test_missing_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("filename,caption\n")
    with pytest.raises(InputError, match="no column 'source'"):
        open_source(MakeSource(table_path=tmp_path / "t.csv", image_dir=tmp_path))


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_the_published_example_comes_through_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ten real rows. Their images are not to be had, and no source opens one."""
    config = load_config(CONFIGS / "make.yaml", [f"source.image_dir={tmp_path}"], PrepareConfig)
    assert isinstance(config.source, MakeSource)
    source = open_source(config.source)
    with caplog.at_level(logging.WARNING):
        rows = [row for row in source.rows() if isinstance(row, SourceRow)]
    assert [row.row for row in rows] == list(range(1, 11))
    assert not caplog.records
    with config.source.table_path.open(encoding="utf-8-sig", newline="") as file:
        records = list(csv.DictReader(file))
    for row, record in zip(rows, records, strict=True):
        assert record["filename"] == f"/VL_Data/{row.image.name}"
        assert (row.caption, row.source) == (record["caption"], record["source"])
        assert row.diagnosis == record["standardized_disease"]
        by_origin = {caption.origin.removeprefix("column:"): caption.text for caption in row.subcaptions}
        assert by_origin == {
            column: text
            for column, text in record.items()
            if text and (column.startswith("subcaption_") or column in ("ontology_caption", "visual_concept_caption"))
        }
        aspects = [caption.aspect for caption in row.subcaptions]
        assert aspects[0] is Aspect.DIAGNOSIS and Aspect.OTHER not in aspects
    assert Counter(len(row.subcaptions) for row in rows) == {3: 8, 4: 1, 2: 1}
    assert [row.demographics.sex for row in rows] == [None] * 9 + ["male"]
    assert sum(row.body_site is not None for row in rows) == 1
    assert all(row.group and row.group.startswith("page:") for row in rows)
