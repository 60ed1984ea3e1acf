"""The CSV source: nothing is lost silently, nothing outside the image folder is opened, templates are filled."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig, TableSource
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.sources import open_source
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.labels import article, render
from data_prep.sources.values import find_image, parse_age, parse_person

CONFIGS = Path(__file__).parents[3] / "configs" / "data"


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """make(text of the table, columns, needs_caption, **source keys) -> list of rows; the image folder is empty."""
    (tmp_path / "images").mkdir()

    def rows(
        text: str | bytes, columns: dict[str, str], needs_caption: bool = True, **keys: Any
    ) -> list[SourceRow | Rejection]:
        table = tmp_path / "t.csv"
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        config = TableSource.model_validate(
            {"table_path": table, "image_dir": tmp_path / "images", "columns": {"image": "file", **columns}, **keys}
        )
        return list(open_source(config, needs_caption).rows())

    return rows


CAPTION = {"caption": "text"}


def test_every_column_reaches_its_field(make: Any) -> None:
    header = "file,text,dx,signs,site,age,sex,fst,kind,patient,part,rights,from"
    line = (
        'a.jpg,"Red  plaque,\r\non the arm",Psoriasis,"Scale; erythema, scale",ARM,45.0,Female,2.0,'
        "Clinical,P7,val,CC0,Clinic A"
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
        "source": "from",
    }
    (row,) = make(f"\ufeff{header}\n{line}\n", CAPTION | columns)
    assert row.caption == "Red plaque, on the arm"
    assert (row.row, row.table, row.image.name, row.image.path.name) == (1, "t.csv", "a.jpg", "a.jpg")
    assert (row.caption_origin, row.source, row.subcaptions) == ("column:text", "Clinic A", ())
    assert (row.diagnosis, row.concepts, row.body_site) == ("psoriasis", ("scale", "erythema"), "arm")
    assert (row.demographics.age_years, row.demographics.sex, row.demographics.fitzpatrick) == (45, "female", 2)
    assert row.demographics.age_band == "40-49"
    assert (row.modality, row.group, row.split, row.licence) == ("clinical", "P7", "val", "CC0")


def test_row_numbers_count_records_not_lines(make: Any) -> None:
    rows = make('file,text\na.jpg,"two\nlines"\n\nb.jpg,c\nnone.jpg,d\n', CAPTION)
    assert [row.row for row in rows] == [1, 3, 4]
    assert isinstance(rows[2], SourceRow)  # whether an image exists shows when it is read
    assert rows[2].image.path == rows[0].image.path.parent / "none.jpg"


@pytest.mark.parametrize("value", ["", "unknown", "NaN", " Unknown ", "None", "n/a", "No  age information", "-9"])
def test_absent_values(make: Any, value: str) -> None:
    columns = CAPTION | {"diagnosis": "dx", "age": "age", "sex": "sex", "group": "g", "split": "s", "licence": "l"}
    (row,) = make(
        "file,text,dx,age,sex,g,s,l\na.jpg,c" + f",{value}" * 6, columns, licence="CC0", absent=["-9"], source="A"
    )
    assert (row.diagnosis, row.demographics.age_years, row.demographics.sex) == (None, None, None)
    assert (row.group, row.split, row.licence, row.source) == (None, None, "CC0", "A")


@pytest.mark.parametrize("name", ["/etc/passwd", "../t.csv", "x/../../t.csv", "..\\t.csv", "C:/a.jpg", "C:\\a.jpg"])
def test_no_path_leaves_the_image_folder(make: Any, name: str) -> None:
    (row,) = make(f"file,text\n{name},c\n", CAPTION)
    assert isinstance(row, Rejection)
    assert row.reason == "the image path leads out of the image folder"


def test_spellings_of_an_image_path(tmp_path: Path) -> None:
    """One image, one name; what a file name may hold is let through."""
    for written in ("sub\\a.jpg", "./sub//a.jpg", "sub/./a.jpg", "sub/a.jpg"):
        found = find_image(tmp_path, written)
        assert (found.name, found.path) == ("sub/a.jpg", tmp_path / "sub" / "a.jpg")
    for name in ("Manual-Diagno...-\u6279\u91cf OCR_1.png", "..a.jpg", "a, b (c) - d..png", "1:2.jpg", "x../y.jpg"):
        assert find_image(tmp_path, name).name == name
    for name in ("a\0.jpg", "\udc80.jpg", "", ".", "./"):
        with pytest.raises(LookupError):
            find_image(tmp_path, name)


def test_rows_that_cannot_be_used(make: Any) -> None:
    rows = make("file,text\n,c\na.jpg,unknown\na.jpg,c,d\na.jpg\nb.jpg,a\0b\n", CAPTION)
    assert [(row.row, row.field) for row in rows] == [(1, "file"), (2, "text"), (3, "(row)"), (4, "(row)"), (5, "text")]
    assert "3 fields where the header has 2" in rows[2].reason
    assert "NUL" in rows[4].reason


def test_unusable_values_are_absent_and_counted(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = "file,text,age,fst,sex\n" + "".join(
        f"a.jpg,c,{age},{fst},{sex}\n"
        for age, fst, sex in [
            ("121", "7", "M"),
            ("-1", "2.5", "Woman"),
            ("forty", "0", '"male, female"'),
            ("inf", "IV-V", "Jane Roe"),
            ("0", "6", "male"),
            ("120", "Type II", ""),
            ("", "", "female"),
        ]
    )
    with caplog.at_level(logging.WARNING):
        rows = make(text, CAPTION | {"age": "age", "fitzpatrick": "fst", "sex": "sex"})
    assert [row.demographics.age_years for row in rows] == [None, None, None, None, 0, 90, None]
    assert [row.demographics.fitzpatrick for row in rows] == [None, None, None, None, 6, 2, None]
    assert [row.demographics.sex for row in rows] == ["male", "female", None, None, "male", None, "female"]
    (record,) = caplog.records
    message = record.getMessage()
    for part in ("age cannot be used and counts as absent in 4 row(s), the first is row 1", "sex .* in 2 row.*row 3"):
        assert re.search(re.escape(part) if "*" not in part else part, message)
    assert "forty" not in message and "Jane" not in message


@pytest.mark.parametrize(
    ("text", "years", "band"),
    [
        ("45", 45, "40-49"),
        ("45.5 Years", 45.5, "40-49"),
        ("7-year-old", 7, "0-9"),
        ("6 months", 0.5, "0-9"),
        ("89", 89, "80-89"),
        ("90", 90, "90+"),
        ("104", 90, "90+"),
        ("20-29", None, "20-29"),
        ("20\u201329 years", None, "20-29"),
        ("5 to 14", None, "5-14"),
        ("30s", None, "30-39"),
        ("90s", None, "90+"),
        ("90+", None, "90+"),
        ("\u2265 90", None, "90+"),
        ("95-99", None, "90+"),
    ],
)
def test_ages(text: str, years: float | None, band: str) -> None:
    assert parse_age(text) == (years, band)
    person, unusable = parse_person(text, None, None)
    assert (person.age_years, person.age_band, unusable) == (years, band, ())


@pytest.mark.parametrize("text", ["29-20", "85-120", "80+", "1e1", "adult", "20-", "4 5", "45 m"])
def test_no_ages(text: str) -> None:
    with pytest.raises(ValueError):
        parse_age(text)


def test_rows_of_one_image_all_come_through(make: Any) -> None:
    rows = make("file,text\na.jpg,one\n./a.jpg,two\na.jpg,one\n", CAPTION)
    assert [(row.row, row.image.name, row.caption) for row in rows] == [
        (1, "a.jpg", "one"),
        (2, "a.jpg", "two"),
        (3, "a.jpg", "one"),
    ]


def test_captions_for_a_describer(make: Any) -> None:
    """Without captions, rows come through where a describer is to write them, and are rejected otherwise."""
    text = "file,text,dx\na.jpg,None,nevus\nb.jpg,Mine.,\na.jpg,...,nevus\n"
    rows = make(text, CAPTION | {"diagnosis": "dx"}, needs_caption=False)
    assert [(row.caption, row.caption_origin) for row in rows[:2]] == [(None, ""), ("Mine.", "column:text")]
    assert rows[2] == Rejection("t.csv", 3, "text", "no caption")  # there is one, and it cannot be used
    assert [isinstance(row, Rejection) for row in make(text, CAPTION)] == [True, False, True]
    assert [row.diagnosis for row in make(text, {"diagnosis": "dx"}, needs_caption=False)] == ["nevus", None, "nevus"]


def test_a_caption_of_ten_megabytes(make: Any) -> None:
    text = f"file,text,blob\na.jpg,{'word ' * 2_000_000},x\na.jpg,c,{'word ' * 2_000_000}\n"
    rows = make(text, CAPTION)
    assert isinstance(rows[0], Rejection) and "more than 100,000 characters" in rows[0].reason
    assert isinstance(rows[1], SourceRow)


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
        "a.jpg,,nevus,,95,\n"
        "a.jpg,,nevus,,30s,\n"
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
        "Nevus at 90+.",
        "Nevus at 30-39.",
    ]
    assert rows[2].reason == "no caption, and no sentence of caption_template has all its fields"
    assert rows[0].caption_origin == "template"


def test_a_written_caption_goes_before_the_template(make: Any) -> None:
    rows = make(
        "file,text,dx\na.jpg,Mine.,x\nb.jpg,,x\n", CAPTION | {"diagnosis": "dx"}, caption_template=["{diagnosis}."]
    )
    assert [(row.caption, row.caption_origin) for row in rows] == [("Mine.", "column:text"), ("X.", "template")]


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
        (CAPTION | {"split": "part"}, {}, "row 2: 'part' has a value other than train, val; .*source.split_values"),
    ],
)
def test_wrong_configurations(make: Any, columns: dict[str, str], keys: dict[str, Any], message: str) -> None:
    text = "file,text,dx,part\na.jpg,c,d,train\nb.jpg,c,d,test\n"
    with pytest.raises(InputError, match=message):
        make(text, columns, **keys)


def test_missing_table_and_folder_are_found_before_any_row(tmp_path: Path) -> None:
    config = {"table_path": tmp_path / "t.csv", "image_dir": tmp_path / "gone", "columns": {"image": "file", **CAPTION}}
    with pytest.raises(InputError, match=r"no such table; correct source\.table_path"):
        open_source(TableSource.model_validate(config))
    (tmp_path / "t.csv").write_text("file,text\n")
    with pytest.raises(InputError, match=r"no such image folder; correct source\.image_dir"):
        open_source(TableSource.model_validate(config))


def test_files_and_repeated_reading(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("file,text,age\na.jpg,c,x\n", CAPTION | {"age": "age"})
    config = {"table_path": tmp_path / "t.csv", "image_dir": tmp_path, "columns": {"image": "file", "age": "age"}}
    source = open_source(TableSource.model_validate(config), needs_caption=False)
    assert source.files == (tmp_path / "t.csv",)
    caplog.clear()
    assert list(source.rows()) == list(source.rows())
    assert len(caplog.records) == 1  # said once, however often the rows are read


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
