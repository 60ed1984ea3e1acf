"""A tree of labelled images: the same rows each time, no file skipped without a word, no way out of the tree."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import FolderSource, PrepareConfig
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.sources import open_source
from data_prep.sources.base import Rejection, SourceRow

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
TEMPLATE = {"caption_template": ["A photograph of {diagnosis}."]}


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    """tree(paths, needs_caption, **source keys) -> rows of a tree of files, empty: no source opens an image."""
    root = tmp_path / "images"

    def rows(*paths: str, needs_caption: bool = True, **keys: Any) -> list[Any]:
        root.mkdir(exist_ok=True)
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        config = FolderSource.model_validate({"image_dir": root, **(keys or TEMPLATE)})
        return list(open_source(config, needs_caption).rows())

    return rows


def names(rows: list[Any]) -> list[str]:
    return [row.image.name for row in rows if isinstance(row, SourceRow)]


def test_levels_become_fields(tree: Any, tmp_path: Path) -> None:
    rows = tree(
        "train/Basal_Cell_Carcinoma/p_1/extra/b.JPG",
        "test/nv/p2/a.webp",
        levels=["split", "diagnosis", "group"],
        split_values={"train": "train", "test": "val"},
        replace={"diagnosis": {"nv": "melanocytic nevus"}},
        caption_template=["{A:diagnosis} photographed."],
        licence="CC0-1.0",
        source="Clinic",
    )
    first, second = rows
    assert (first.row, first.table, first.split, first.diagnosis, first.group) == (
        1,
        "images",
        "val",
        "melanocytic nevus",
        "p2",
    )
    assert (second.split, second.diagnosis, second.group) == ("train", "basal cell carcinoma", "p_1")
    assert (second.caption, second.caption_origin) == ("A basal cell carcinoma photographed.", "template")
    assert (second.licence, second.source) == ("CC0-1.0", "Clinic")
    assert second.image.name == "train/Basal_Cell_Carcinoma/p_1/extra/b.JPG"
    assert second.image.path == tmp_path / "images" / second.image.name


def test_the_order_is_that_of_names(tree: Any, tmp_path: Path) -> None:
    paths = [f"{label}/{number}.png" for label in ("b", "a c", "A", "\u00e9", "a") for number in (2, 10, 1)]
    rows = tree(*paths)
    expected = [f"{label}/{number}.png" for label in ("A", "a", "a c", "b", "\u00e9") for number in (1, 10, 2)]
    assert names(rows) == expected
    assert [row.row for row in rows] == list(range(1, 16))
    other = tmp_path / "other"
    for path in reversed(paths):
        (other / path).parent.mkdir(parents=True, exist_ok=True)
        (other / path).touch()
    assert names(list(open_source(FolderSource.model_validate({"image_dir": other, **TEMPLATE})).rows())) == expected


def test_no_file_is_passed_over_in_silence(tree: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = tree("a/1.jpg", "a/notes.txt", "a/2", "top.jpg", "a/.DS_Store", "a/Thumbs.db", ".git/x.jpg", "a/._1.jpg")
    assert names(rows) == ["a/1.jpg"]
    assert [(row.row, row.field, row.reason) for row in rows if isinstance(row, Rejection)] == [
        (2, "image", "not an image by its ending"),
        (3, "image", "not an image by its ending"),
        (4, "image", "the file lies above the folders that source.levels names"),
    ]
    (record,) = caplog.records
    assert "4 hidden files or folders, and litter such as Thumbs.db" in record.getMessage()


def test_links(tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree("a/1.jpg")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.jpg").touch()
    (tmp_path / "images" / "a" / "2.jpg").symlink_to(outside / "x.jpg")
    (tmp_path / "images" / "a" / "3.jpg").symlink_to(outside / "gone.jpg")
    (tmp_path / "images" / "b").symlink_to(outside)
    (tmp_path / "images" / "c").symlink_to(tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "a" / "4.jpg")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rows = tree()
    assert names(rows) == ["a/1.jpg", "a/2.jpg"]
    reason = "neither a file nor a folder, or a link to nothing"
    assert rows[2:] == [Rejection("images", 3, "image", reason), Rejection("images", 4, "image", reason)]
    assert "2 links to folders" in caplog.text


def test_names_that_are_not_utf8(tree: Any, tmp_path: Path) -> None:
    tree("a/1.jpg")
    (tmp_path / "images" / os.fsdecode(b"\xff") / "x").mkdir(parents=True)
    (tmp_path / "images" / os.fsdecode(b"\xff") / "1.jpg").touch()
    assert tree()[1] == Rejection("images", 2, "image", "a file or folder name that is not UTF-8")


def test_a_tree_deeper_than_the_stack(tree: Any, tmp_path: Path) -> None:
    tree("a/1.jpg")
    deepest = folder = tmp_path / "images" / "a"
    for _ in range(1200):
        deepest = deepest / "d"
        deepest.mkdir()
    (deepest / "2.jpg").touch()
    try:
        assert len(names(tree())) == 2
    finally:  # shutil.rmtree, which pytest tidies up with, is not so patient
        (deepest / "2.jpg").unlink()
        while deepest != folder:
            deepest.rmdir()
            deepest = deepest.parent


def test_rows_for_a_describer(tree: Any) -> None:
    rows = tree("a/1.jpg", "unknown/2.jpg", needs_caption=False, levels=["diagnosis"])
    assert [(row.caption, row.diagnosis) for row in rows] == [(None, "a"), (None, None)]
    rejected = tree("a/1.jpg", "unknown/2.jpg")[1]
    assert rejected.reason == "no caption, and no sentence of caption_template has all its fields"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"levels": ["diagnosis"]}, "neither columns.caption nor caption_template"),
        (TEMPLATE | {"levels": ["split", "diagnosis"]}, r"'split' has a value other than train, val; "),
        (TEMPLATE | {"levels": ["diagnosis", "diagnosis"]}, "'diagnosis' is there twice"),
        (TEMPLATE | {"levels": ["group"]}, "the field 'diagnosis' has no column; set levels: diagnosis"),
        (TEMPLATE | {"extra_columns": {"x": "y"}}, "a folder tree has no columns"),
        (TEMPLATE | {"replace": {"sex": {"m": "male"}}}, "replace: 'sex' has no column"),
    ],
)
def test_wrong_configurations(tree: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tree("a/b/1.jpg", **keys)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such image folder; correct source\.image_dir"):
        open_source(FolderSource.model_validate({"image_dir": tmp_path / "gone", **TEMPLATE}))
    assert open_source(FolderSource.model_validate({"image_dir": tmp_path, **TEMPLATE})).files == ()


def test_the_shipped_example(tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree("train/bcc/1.jpg", "test/nevus/2.jpg", "val/other/3.jpg")
    monkeypatch.setenv("IMAGES", str(tmp_path / "images"))
    config = load_config(CONFIGS / "folder.yaml", [], PrepareConfig)
    rows = list(open_source(config.source).rows())
    assert [getattr(row, "caption", None) for row in rows] == [
        "A clinical photograph of nevus.",
        "A clinical photograph of basal cell carcinoma.",
        None,
    ]


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_a_real_folder() -> None:
    config = FolderSource(image_dir=Path(os.environ["DERMVLP_DATA"]) / "derm-images", levels=("ignore",))
    rows = list(open_source(config, needs_caption=False).rows())
    assert len(names(rows)) == 3870
    assert [row.reason for row in rows if isinstance(row, Rejection)] == ["not an image by its ending"]  # metadata.csv
