from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.errors import InputError
from data_prep.salt import hash_group
from pretrain.evaluation.datasets import open_data
from pretrain.evaluation.interfaces import Question
from tests.unit.evaluation.dataset_files import describe, reasons, write_image, write_table


@pytest.fixture(autouse=True)
def _salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMVLP_SALT", "a secret")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Opens a table of these rows, described with these keys; their images are made."""

    def opened(
        rows: list[dict[str, Any]], columns: dict[str, Any], overrides: tuple[str, ...] = (), **keys: Any
    ) -> Any:
        for row in rows:
            if row.get("file"):
                write_image(tmp_path / "images" / row["file"])
        source = {
            "kind": "table",
            "table_path": str(write_table(tmp_path / "table.csv", rows)),
            "image_dir": str(tmp_path / "images"),
            "columns": {"image": "file", **columns},
        }
        return open_data(describe(tmp_path / "set.yaml", {"name": "mine", "source": source, **keys}), overrides)

    return opened


def test_every_column_reaches_its_field(make: Any) -> None:
    row = {
        "file": "a.png",
        "dx": "MEL",
        "caption": "A  dark macule.",
        "second": "Irregular border.",
        "pid": "PAT_7",
        "skin": "3.0",
        "gender": "FEMALE",
        "years": "47",
        "region": "BACK",
        "site": "Vienna",
        "scale": "1",
        "crust": "0",
        "ulcer": "",
        "level1": "Malignant",
        "level2": "Melanoma",
        "terms": "CC0-1.0",
    }
    columns = {
        "label": "dx",
        "texts": ["caption", "second"],
        "patient": "pid",
        "fitzpatrick": "skin",
        "sex": "gender",
        "age": "years",
        "body_site": "region",
        "source": "site",
        "concept_columns": {"scale": "scale", "crust": "crusting", "ulcer": "ulcer"},
        "diagnosis_path": ["level1", "level2"],
        "licence": "terms",
    }
    data = make([row], columns, labels={"mel": "melanoma"}, classnames=["nevus", "melanoma"])
    (found,) = data.rows
    assert found.key == "mine-000000001"
    assert found.label == "melanoma"
    assert found.texts == ("A dark macule.", "Irregular border.")
    assert found.patient == hash_group("mine", "PAT_7", "a secret")
    assert found.attributes == {
        "fitzpatrick": "III",
        "sex": "female",
        "age_band": "40-49",
        "body_site": "back",
        "source": "Vienna",
    }
    assert found.concepts == {"scale": True, "crusting": False}  # ulcer is not annotated
    assert found.diagnosis_path == ("malignant", "melanoma")
    assert found.licence == "CC0-1.0"
    assert data.classnames == ("nevus", "melanoma")
    assert data.notes == ("1 of 2 classes have no row: nevus",)
    assert "PAT_7" not in repr(data)


def test_one_hot_labels(make: Any) -> None:
    """As in ISIC's GroundTruth tables."""
    rows = [
        {"file": "a.png", "MEL": "1.0", "NV": "0.0"},
        {"file": "b.png", "MEL": "0", "NV": "1"},
        {"file": "c.png", "MEL": "", "NV": "X"},
        {"file": "d.png", "MEL": "1", "NV": "1"},
        {"file": "e.png", "MEL": "0.0", "NV": "0.0"},
        {"file": "f.png", "MEL": "0.7", "NV": "0.3"},
    ]
    data = make(rows, {"one_hot": ["MEL", "NV"]}, labels={"MEL": "melanoma", "NV": "nevus"})
    assert [row.label for row in data.rows] == ["melanoma", "nevus", "nevus", None]
    assert reasons(data) == [
        ("4", "NV", "more than one of the label's columns is 1"),
        ("6", "MEL", "neither 0 nor 1"),
    ]
    assert data.notes == ("rows without a label: 1",)


def test_labels_by_position_as_in_the_peers_tables(make: Any) -> None:
    rows = [{"file": f"{i}.png", "label": label} for i, label in enumerate(["1", "0.0", "2", "-1", "x", "0.5"])]
    data = make(rows, {"label": "label"}, labels_are="positions", classnames=["nevus", "melanoma"])
    assert [row.label for row in data.rows] == ["melanoma", "nevus"]
    assert [row for row, _, _ in reasons(data)] == ["3", "4", "5", "6"]
    assert data.notes == ("labels that are none of the classes: 4 different ones, in 4 rows",)


def test_spellings_of_a_label_are_one_class(make: Any) -> None:
    spellings = ["Blue nevus", "blue  nevus ", "BLUE_NEVUS", "melanoma"]
    rows = [{"file": f"{i}.png", "dx": dx} for i, dx in enumerate(spellings)]
    data = make(rows, {"label": "dx"})
    assert data.classnames == ("Blue nevus", "melanoma")
    assert [row.label for row in data.rows] == ["Blue nevus", "Blue nevus", "Blue nevus", "melanoma"]


def test_labels_that_are_no_class_are_named_and_many_are_not(make: Any) -> None:
    rows = [{"file": f"{i}.png", "dx": dx} for i, dx in enumerate(["nevus", "scar", "scar", "wart"])]
    data = make(rows, {"label": "dx"}, classnames=["nevus"])
    assert reasons(data) == [(str(row), "label", "its label is none of the classes") for row in (2, 3, 4)]
    assert data.notes == ("labels that are none of the classes: 2 different ones, in 3 rows",)
    people = [{"file": f"{i}.png", "dx": f"Jane Doe {i}"} for i in range(21)] + [{"file": "x.png", "dx": "nevus"}]
    data = make(people, {"label": "dx"}, classnames=["nevus"])
    assert data.notes == ("labels that are none of the classes: 21 different ones, in 21 rows",)


def test_rows_that_the_description_leaves_out(make: Any) -> None:
    rows = [
        {"file": "a.png", "dx": "nevus", "part": "train"},
        {"file": "b.png", "dx": "nevus", "part": "Val"},
        {"file": "c.png", "dx": "unsure", "part": "test"},
        {"file": "d.png", "dx": "nevus", "part": "test"},
    ]
    data = make(rows, {"label": "dx", "split": "part"}, labels={"unsure": None, "nevus": "nevus"})
    assert [(row.key[-1], row.is_train) for row in data.rows] == [("1", True), ("4", False)]
    assert data.notes == ("rows left out by the description: 2",)
    assert data.rejected == ()
    rows = [{"file": "a.png", "part": ""}, {"file": "b.png", "part": "test"}]
    assert reasons(make(rows, {"split": "part"})) == [("1", "part", "no value: neither for training nor for testing")]
    with pytest.raises(InputError, match=r"table.csv: row 1: its split is none of train, .*; add it to splits"):
        make([{"file": "a.png", "part": "fold 3"}], {"split": "part"})


def test_values_that_cannot_be_used_are_not_known_and_counted(make: Any) -> None:
    rows = [
        {"file": "a.png", "skin": "III-IV", "years": "old", "gender": "male"},
        {"file": "b.png", "skin": "-1", "years": "90", "gender": "?"},
        {"file": "c.png", "skin": "vi", "years": "30-39", "gender": "unknown"},
    ]
    columns = {"fitzpatrick": "skin", "age": "years", "sex": "gender"}
    data = make(rows, columns, absent=[-1])
    assert [row.attributes for row in data.rows] == [
        {"sex": "male"},
        {"age_band": "90+"},
        {"fitzpatrick": "VI", "age_band": "30-39"},
    ]
    assert set(data.notes) == {
        "fitzpatrick cannot be used and counts as not known: 1",
        "age cannot be used and counts as not known: 1",
        "sex cannot be used and counts as not known: 1",
    }


def test_replaced_values(make: Any) -> None:
    rows = [{"file": "a.png", "site": "torso"}, {"file": "b.png", "site": "n.a."}, {"file": "c.png", "site": "arm"}]
    data = make(rows, {"body_site": "site"}, replace={"body_site": {"torso": "trunk", "n.a.": ""}})
    assert [row.attributes for row in data.rows] == [{"body_site": "trunk"}, None, {"body_site": "arm"}]


def test_images_that_are_not_there(make: Any, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "empty.png")
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    (tmp_path / "images" / "folder.png").mkdir()
    table = [
        {"file": "a.png", "wanted": "a.png"},
        *({"file": "", "wanted": name} for name in ("b.png", "../a.png", "empty.png", "folder.png", "")),
    ]
    data = make(table, {"image": "wanted"})
    assert [row.key for row in data.rows] == ["mine-000000001"]
    assert [reason for _, _, reason in reasons(data)] == [
        "no such image file",
        "the image path leads out of the image folder",
        "empty file",
        "not a regular file",
        "no image path",
    ]
    assert "b.png" not in json.dumps(data.rejected)


def test_images_by_name(tmp_path: Path) -> None:
    """Ids, and paths of others' machines."""
    first = write_image(tmp_path / "images" / "part_1" / "ISIC_1.jpg", 1)
    write_image(tmp_path / "images" / "part_2" / "ISIC_2.png", 2)
    write_image(tmp_path / "images" / "part_1" / "twice.jpg", 3)
    write_image(tmp_path / "images" / "part_2" / "twice.png", 4)
    ids = ["ISIC_1", "/home/share/ISIC_2.jpg", "C:\\data\\ISIC_2.bmp", "twice", "ISIC_3", ""]
    table = write_table(tmp_path / "t.csv", [{"id": each} for each in ids])
    source = {
        "table_path": str(table),
        "image_dir": str(tmp_path / "images"),
        "images_by": "name",
        "columns": {"image": "id"},
    }
    data = open_data(describe(tmp_path / "d.yaml", {"name": "ids", "source": {"kind": "table", **source}}))
    assert [image.name for image in data.images] == ["part_1/ISIC_1.jpg", "part_2/ISIC_2.png", "part_2/ISIC_2.png"]
    assert data.read_image(0) == first
    assert [reason for _, _, reason in reasons(data)] == [
        "several images below source.image_dir have this name",
        "no such image file",
        "no image path",
    ]


def test_captions_of_one_image_are_joined(make: Any) -> None:
    rows = [
        {"file": "a.png", "text": "One.", "dx": "nevus"},
        {"file": "b.png", "text": "Two.", "dx": "nevus"},
        {"file": "a.png", "text": "Three.", "dx": "nevus"},
        {"file": "a.png", "text": "One.", "dx": "nevus"},
        {"file": "a.png", "text": "Four.", "dx": "melanoma"},
        {"file": "c.png", "text": "", "dx": "nevus"},
    ]
    data = make(rows, {"texts": ["text"], "label": "dx"})
    assert [row.texts for row in data.rows] == [("One.", "Three."), ("Two.",), ("Four.",), ()]
    assert data.notes == (
        "no caption: 1",
        "rows with further captions of an image, joined with its first row: 2",
    )


def test_lists_of_captions_and_options_in_every_format(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    captions, options = ["Red, scaly.", "A plaque."], ["acne", "psoriasis, guttate", "wart", "scar"]
    record = {"file": "a.png", "captions": captions, "q": "What is it?", "options": options, "right": "B"}
    (tmp_path / "t.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "t.parquet")
    as_text = record | {"captions": json.dumps(captions), "options": json.dumps(options)}
    write_table(tmp_path / "t.csv", [as_text])
    for name in ("t.jsonl", "t.parquet", "t.csv"):
        question = {"question": "q", "options": ["options"], "answer": "right"}
        columns = {"image": "file", "text_list": "captions", "question": question}
        source = {"kind": "table", "table_path": str(tmp_path / name), "image_dir": str(tmp_path), "columns": columns}
        data = open_data(describe(tmp_path / "d.yaml", {"name": "lists", "source": source}))
        assert data.rows[0].texts == tuple(captions), name
        assert data.rows[0].question == Question("What is it?", tuple(options), 1), name


@pytest.mark.parametrize(
    ("answers_are", "answers"),
    [("letters", ["B", "c.", "(A)"]), ("positions", ["1", "2", "0"]), ("texts", ["Wart", "scar", "acne"])],
)
def test_multiple_choice(make: Any, answers_are: str, answers: list[str]) -> None:
    rows = [
        {
            "file": f"{i}.png",
            "q": "Which?",
            "a": "acne",
            "b": "wart",
            "c": "scar",
            "d": "",
            "right": answer,
            "kind": "dx",
        }
        for i, answer in enumerate(answers)
    ]
    rows += [
        rows[0] | {"right": "E"},
        rows[0] | {"right": "D"},  # an empty option
        rows[0] | {"q": ""},
        rows[0] | {"b": "Acne"},
    ]
    columns = {"question": "q", "options": ["a", "b", "c", "d"], "answer": "right", "kind": "kind"}
    data = make(rows, {"question": {**columns, "answers_are": answers_are}})
    questions = [row.question for row in data.rows]
    assert questions == [Question("Which?", ("acne", "wart", "scar"), answer, "dx") for answer in (1, 2, 0)]
    assert len(data.rejected) == 4


def test_concepts_by_name(make: Any) -> None:
    rows = [
        {"file": "a.png", "found": "Scale; erythema"},
        {"file": "b.png", "found": "papule"},
        {"file": "c.png", "found": "No visual concepts"},
    ]
    data = make(rows, {"concepts": "found"})
    assert [row.concepts for row in data.rows] == [{"scale": True, "erythema": True}, {"papule": True}, None]
    data = make(rows, {"concepts": "found"}, unnamed_concepts="absent")
    assert [row.concepts for row in data.rows] == [
        {"erythema": True, "papule": False, "scale": True},
        {"erythema": False, "papule": True, "scale": False},
        None,
    ]


def test_concept_columns(make: Any) -> None:
    rows = [
        {"file": "a.png", "crust": "1", "scab": "0", "scale": "0"},
        {"file": "b.png", "crust": "0", "scab": "", "scale": "2"},
        {"file": "c.png", "crust": "", "scab": "", "scale": ""},
    ]
    columns = {"crust": "crust", "scab": "crust", "scale": "scale"}  # two columns, one concept
    data = make(rows, {"concept_columns": columns})
    assert [row.concepts for row in data.rows] == [{"crust": True, "scale": False}, {"crust": False}, None]
    assert data.notes == ("scale is neither 0 nor 1 and counts as not annotated: 1",)


def test_nothing_left_is_an_error_that_says_why(make: Any) -> None:
    make([{"file": "a.png"}], {})
    missing = [{"file": "", "wanted": "x.png"}, {"file": "", "wanted": "y.png"}]
    with pytest.raises(InputError, match=r"no row to evaluate on: wanted: no such image file \(2 rows\); .*=name"):
        make(missing, {"image": "wanted"})
    with pytest.raises(InputError, match=r"for training alone \(splits\) \(1 rows\)"):
        make([{"file": "a.png", "part": "train"}], {"split": "part"})
    with pytest.raises(InputError, match=r"the labels are 'wart' \(1\)"):
        make([{"file": "a.png", "dx": "wart"}], {"label": "dx"}, classnames=["nevus"])


@pytest.mark.parametrize(
    ("columns", "keys", "message"),
    [
        ({"label": "dx", "one_hot": ["dx"]}, {}, "label and one_hot"),
        ({"lable": "dx"}, {}, "lable: no such key"),
        ({"label": "dxx"}, {}, r"no column 'dxx' \(mapped to source.columns.label\); did you mean 'dx'"),
        ({"label": "dx"}, {"classnames": ["nevus", "Nevus"]}, "equal but for case"),
        ({"label": "dx"}, {"classnames": ["nevus"], "labels": {"mel": "melanoma"}}, "'melanoma' is not one of"),
        ({"label": "dx"}, {"labels_are": "positions"}, "positions needs classnames"),
        ({"image": None}, {}, "columns.image: missing"),
        ({}, {"name": "../x"}, "name: String should match"),
    ],
)
def test_wrong_descriptions(make: Any, columns: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make([{"file": "a.png", "dx": "nevus"}], columns, **keys)


def test_without_a_salt_patients_are_hashed_and_it_is_said(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"file": f"{i}.png", "pid": pid} for i, pid in enumerate(["1", "2", "1", ""])]
    monkeypatch.delenv("DERMVLP_SALT")
    first, second = make(rows, {"patient": "pid"}), make(rows, {"patient": "pid"})
    a, b, again, nobody = (row.patient for row in first.rows)
    assert a == again != b
    assert nobody is None
    assert second.rows[0].patient != a
    assert first.digest == second.digest  # the salt does not change the set
    assert first.notes == ("patients' hashes are of this run alone: DERMVLP_SALT is not set",)
    monkeypatch.setenv("DERMVLP_SALT", " ")
    with pytest.raises(InputError, match="DERMVLP_SALT: set but empty"):
        make(rows, {"patient": "pid"})


def test_digest_names_the_set(make: Any, tmp_path: Path) -> None:
    rows = [{"file": "a.png", "dx": "nevus", "text": "One."}, {"file": "b.png", "dx": "wart", "text": "Two."}]
    columns = {"label": "dx", "texts": ["text"]}
    digest = make(rows, columns).digest
    assert make(rows, columns).digest == digest
    assert make([rows[0] | {"dx": "wart"}, rows[1]], columns).digest != digest
    assert make([rows[0] | {"text": "Three."}, rows[1]], columns).digest != digest
    assert make(rows[::-1], columns).digest != digest
    assert make(rows, columns, ("classnames=[wart, nevus]",)).digest != digest
    data = make(rows, columns)
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.png").write_bytes((tmp_path / "images" / "a.png").read_bytes() + b"more")
    assert open_data(tmp_path / "set.yaml").digest != data.digest  # features of the old image are of no use


def test_goes_to_worker_processes(make: Any, tmp_path: Path) -> None:
    data = make([{"file": "a.png", "dx": "nevus"}], {"label": "dx"})
    again = pickle.loads(pickle.dumps(data))
    assert again == data
    assert again.read_image(0) == (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(InputError, match="mine: mine-000000001: no such image file; put the image back"):
        data.read_image(0)
