"""The CSV source: nothing is lost silently, nothing outside the image folder is opened, templates are filled."""

from __future__ import annotations

import logging
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig, TableSource, load_config
from data_prep.errors import InputError
from data_prep.sources import open_source
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.table import article, find_image, read_csv, render

CONFIGS = Path(__file__).parents[3] / "configs" / "data"


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """make(text of the table, **source keys) -> list of rows; images a.jpg and b.jpg exist."""
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).write_bytes(b"x")

    def rows(text: str | bytes, columns: dict[str, str], **keys: Any) -> list[SourceRow | Rejection]:
        table = tmp_path / "t.csv"
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        config = TableSource.model_validate(
            {"table_path": table, "image_dir": tmp_path / "images", "columns": {"image": "file", **columns}, **keys}
        )
        return list(open_source(config).rows())

    return rows


CAPTION = {"caption": "text"}


def test_every_column_reaches_its_field(make: Any) -> None:
    header = "file,text,dx,signs,site,age,sex,fst,kind,patient,part,rights"
    line = (
        'a.jpg,"Red  plaque,\r\non the arm",Psoriasis,"Scale; erythema, scale",ARM,45.0,Female,2.0,Clinical,P7,val,CC0'
    )
    columns = {
        "diagnosis": "dx",
        "concepts": "signs",
        "body_site": "site",
        "age": "age",
        "sex": "sex",
        "fitzpatrick": "fst",
        "modality": "kind",
        "group": "patient",
        "split": "part",
        "licence": "rights",
    }
    (row,) = make(f"\ufeff{header}\n{line}\n", CAPTION | columns)
    assert row.caption == "Red plaque, on the arm"
    assert (row.row, row.table, row.image.path.name) == (1, "t.csv", "a.jpg")
    assert (row.diagnosis, row.concepts, row.body_site) == ("psoriasis", ("scale", "erythema"), "arm")
    assert (row.demographics.age_years, row.demographics.sex, row.demographics.fitzpatrick) == (45, "female", 2)
    assert (row.modality, row.group, row.split, row.licence) == ("clinical", "P7", "val", "CC0")


def test_row_numbers_count_records_not_lines(make: Any) -> None:
    rows = make('file,text\na.jpg,"two\nlines"\n\nb.jpg,c\nnone.jpg,d\n', CAPTION)
    assert [row.row for row in rows] == [1, 3, 4]
    assert rows[2] == Rejection("t.csv", 4, "file", "no such file in the image folder")


@pytest.mark.parametrize("value", ["", "unknown", "NaN", " Unknown "])
def test_absent_values(make: Any, value: str) -> None:
    columns = CAPTION | {"diagnosis": "dx", "age": "age", "sex": "sex", "group": "g", "split": "s", "licence": "l"}
    (row,) = make("file,text,dx,age,sex,g,s,l\na.jpg,c" + f",{value}" * 6, columns, licence="CC0")
    assert (row.diagnosis, row.demographics.age_years, row.demographics.sex) == (None, None, None)
    assert (row.group, row.split, row.licence) == (None, None, "CC0")


@pytest.mark.parametrize("name", ["/etc/passwd", "../t.csv", "x/../../t.csv", "..\\t.csv", "C:/a.jpg", "C:\\a.jpg"])
def test_no_path_leaves_the_image_folder(make: Any, name: str) -> None:
    (row,) = make(f"file,text\n{name},c\n", CAPTION)
    assert isinstance(row, Rejection)
    assert row.reason == "the image path leads out of the image folder"


def test_backslashes_of_windows_tables(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(b"x")
    assert find_image(tmp_path, "sub\\a.jpg") == tmp_path / "sub" / "a.jpg"


def test_rows_that_cannot_be_used(make: Any) -> None:
    rows = make("file,text\n,c\na.jpg,unknown\na.jpg,c,d\na.jpg\nb.jpg,a\0b\n", CAPTION)
    assert [(row.row, row.field) for row in rows] == [(1, "file"), (2, "text"), (3, "(row)"), (4, "(row)"), (5, "text")]
    assert "3 fields where the header has 2" in rows[2].reason
    assert "NUL" in rows[4].reason


def test_unusable_numbers_are_absent_and_counted(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = "file,text,age,fst\n" + "".join(
        f"a.jpg,c,{age},{fst}\n"
        for age, fst in [("121", "7"), ("-1", "2.5"), ("forty", "II"), ("inf", "0"), ("0", "6"), ("120", "1"), ("", "")]
    )
    with caplog.at_level(logging.WARNING):
        rows = make(text, CAPTION | {"age": "age", "fitzpatrick": "fst"})
    assert [row.demographics.age_years for row in rows] == [None, None, None, None, 0, 120, None]
    assert [row.demographics.fitzpatrick for row in rows] == [None, None, None, None, 6, 1, None]
    (record,) = caplog.records
    assert "4 of age (first in row 1), 4 of fitzpatrick (first in row 1)" in record.getMessage()
    assert "forty" not in record.getMessage()


# ------------------------------------------------------------------------------------------ templates

TEMPLATE = ["{A:modality} of {a:diagnosis} on the {body_site}.", "{diagnosis} at {age}.", "Seen by {reader}."]
FIELDS = {"modality": "kind", "diagnosis": "dx", "body_site": "site", "age": "age"}


def test_template_drops_sentences_with_absent_fields(make: Any) -> None:
    text = (
        "file,kind,dx,site,age,who\n"
        "a.jpg,image,eczema,arm,45.0,hist\n"
        "a.jpg,image,nevus,,7.5,\n"
        "a.jpg,image,,arm,45,\n"
        "a.jpg,image,nevus,leg,130,unknown\n"
    )
    rows = make(
        text,
        FIELDS,
        extra_columns={"reader": "who"},
        caption_template=TEMPLATE,
        replace={"reader": {"hist": "histology"}},
    )
    assert [getattr(row, "caption", None) for row in rows] == [
        "An image of an eczema on the arm. Eczema at 45. Seen by histology.",
        "Nevus at 7.5.",
        None,
        "An image of a nevus on the leg.",
    ]
    assert rows[2].field == "caption_template"


def test_a_written_caption_goes_before_the_template(make: Any) -> None:
    rows = make(
        "file,text,dx\na.jpg,Mine.,x\nb.jpg,,x\n", CAPTION | {"diagnosis": "dx"}, caption_template=["{diagnosis}."]
    )
    assert [row.caption for row in rows] == ["Mine.", "X."]


def test_replace_makes_values_absent_and_cannot_be_filled_twice(make: Any) -> None:
    rows = make(
        "file,dx,site\na.jpg,bad,arm\na.jpg,{body_site},arm\n",
        {"diagnosis": "dx", "body_site": "site"},
        caption_template=["{diagnosis}.", "On the {body_site}."],
        replace={"diagnosis": {"bad": ""}},
    )
    assert [row.caption for row in rows] == ["On the arm.", "{body_site}. On the arm."]


def test_article() -> None:
    words = ["nevus", "ulcer", "unilateral rash", "80", "8", "18", "11", "110", "45", "Actinic keratosis", "eumelanin"]
    assert [article(word) for word in words] == ["a", "an", "a", "an", "an", "an", "an", "a", "a", "an", "a"]


def test_render_without_places() -> None:
    assert render(["skin."], {}) == "Skin."
    assert render([], {}) is None


# ------------------------------------------------------------------------------------------ configuration errors


@pytest.mark.parametrize(
    ("columns", "keys", "message"),
    [
        (
            {"caption": "txt"},
            {},
            "no column 'txt'.*columns.caption.*did you mean 'text'.*Columns: file, text, dx, part",
        ),
        ({}, {}, "neither columns.caption nor caption_template"),
        (CAPTION, {"caption_template": ["{nothing}."]}, "no field 'nothing'"),
        (CAPTION, {"caption_template": ["{diagnosis}."]}, "set columns.diagnosis"),
        (CAPTION, {"caption_template": ["{group}."]}, "no field 'group'"),
        (CAPTION, {"caption_template": ["{text.__class__}."]}, "write a place as"),
        (CAPTION, {"extra_columns": {"x": "gone"}}, "no column 'gone'.*extra_columns.x"),
        (CAPTION, {"extra_columns": {"sex": "dx"}}, "'sex' is a field of columns"),
        (CAPTION, {"replace": {"sex": {"m": "male"}}}, "replace: 'sex' has no column"),
        (CAPTION | {"split": "part"}, {}, "row 2: column 'part' has the value 'test'.*source.split_values"),
    ],
)
def test_wrong_configurations(make: Any, columns: dict[str, str], keys: dict[str, Any], message: str) -> None:
    text = "file,text,dx,part\na.jpg,c,d,train\nb.jpg,c,d,test\n"
    with pytest.raises(InputError, match=message):
        make(text, columns, **keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table is empty"),
        ("file,text\na.jpg,c\n".encode("utf-16-le"), "NUL bytes in the header"),
        ("file,text\na.jpg,c\n".encode("utf-16"), "not UTF-8"),
        ("file,text\na.jpg,caf\u00e9\n".encode("latin-1"), "not UTF-8 text"),
        (b'file,text\na.jpg,c\nb.jpg,"never closed\na.jpg,c\n', "row 2: "),
        (b"file,text,text\na.jpg,c,d\n", "'text'.*appears twice"),
    ],
)
def test_files_that_are_no_table(make: Any, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(content, CAPTION)


def test_missing_table_and_folder_are_found_before_any_row(tmp_path: Path) -> None:
    config = {"table_path": tmp_path / "t.csv", "image_dir": tmp_path / "gone", "columns": {"image": "file", **CAPTION}}
    with pytest.raises(InputError, match=r"no such table; correct source\.table_path"):
        open_source(TableSource.model_validate(config))
    (tmp_path / "t.csv").write_text("file,text\n")
    with pytest.raises(InputError, match=r"no such image folder; correct source\.image_dir"):
        open_source(TableSource.model_validate(config))


def test_the_table_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("file,text\n")
        file.writelines(f"{i}.jpg,{'word ' * 40}\n" for i in range(20_000))
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    num = sum(1 for _ in read_csv(path, {}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num == 20_000
    assert peak < 500_000


# ------------------------------------------------------------------------------------------ real data


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_real_table_with_the_shipped_configuration() -> None:
    config = load_config(CONFIGS / "derm_images.yaml", [], PrepareConfig)
    rows = [row for row in open_source(config.source).rows() if isinstance(row, SourceRow)]
    assert len(rows) == 3870
    assert Counter(row.split for row in rows) == {"train": 3413, "val": 457}
    assert Counter(row.diagnosis for row in rows)["nevus"] == 1417
    assert sum(row.demographics.fitzpatrick is not None for row in rows) == 534
    assert len({row.group for row in rows}) == 3525
    assert Counter(row.modality for row in rows) == {"dermoscopy": 2961, "clinical": 909}
    assert all(row.diagnosis and row.diagnosis in (row.caption or "") for row in rows)
    text = " ".join(row.caption or "" for row in rows)
    for remains in ("{", "unknown", "nan", ".0", "_", "masked", " a actinic", "None"):
        assert remains not in text
