"""How an evaluation set is described: where its rows are, which column holds what, and what its classes are called.

A YAML of this form is all that a data set needs; configs/eval/datasets/ holds ready ones.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from data_prep.schema import Frozen
from pretrain.prompts import TEMPLATES_PATH, load_templates


def fold(text: str) -> str:
    """Two labels are one where these are equal: case, white space, underscores and the way in which Unicode composes
    accents do not tell classes apart."""
    return " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split()).casefold()


def _text_keys(value: Any) -> Any:
    """YAML reads `{0: benign}` with a number as its key."""
    if not isinstance(value, dict):
        return value
    return {str(key) if type(key) in (int, float) else key: item for key, item in value.items()}


Values = Annotated[dict[str, str], BeforeValidator(_text_keys)]


class QuestionColumns(Frozen):
    """Multiple choice."""

    question: str
    options: tuple[str, ...] = Field(min_length=1)  # a column an option, in their order; or one column with a list
    answer: str
    #: A, B, ... ; 0, 1, ... ; or the right option's own text
    answers_are: Literal["letters", "positions", "texts"] = "letters"
    kind: str | None = None  # of question: diagnosis, body site, ...


class Columns(Frozen):
    """Which column of the table, or which key of KEY.json, holds what."""

    image: str | None = None  # of tables, where it must be; tars bring their images
    label: str | None = None
    #: Instead of `label`: columns of which one is 1 (also 1.0, true, yes, x); the label is that column's name.
    one_hot: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # captions, for retrieval: one text a column
    text_list: str | None = None  # a list of captions: of JSON Lines and Parquet, or written as a JSON list
    patient: str | None = None  # or lesion: whose rows are not independent; kept as a salted hash alone
    fitzpatrick: str | None = None  # 1 ... 6 or I ... VI
    sex: str | None = None
    age: str | None = None  # years or a band
    body_site: str | None = None
    source: str | None = None  # hospital, web site, ...
    concepts: str | None = None  # names of those that are present, separated by commas or semicolons
    concept_columns: dict[str, str] = Field(default_factory=dict)  # column of 0 and 1 -> concept; empty: not annotated
    diagnosis_path: tuple[str, ...] = ()  # columns of ontology nodes, from general to specific
    split: str | None = None
    licence: str | None = None
    question: QuestionColumns | None = None

    @model_validator(mode="after")
    def _one_label(self) -> Self:
        if self.label is not None and self.one_hot:
            raise ValueError("label and one_hot: set one of them")
        if self.concepts is not None and self.concept_columns:
            raise ValueError("concepts and concept_columns: set one of them")
        return self

    def named(self) -> dict[str, str]:
        """{use: column}, uses as they stand in the configuration, for messages."""
        one = ("image", "label", "text_list", "patient", "fitzpatrick", "sex", "age", "body_site", "source", "concepts")
        found = {f"columns.{use}": column for use in (*one, "split", "licence") if (column := getattr(self, use))}
        for use in ("one_hot", "texts", "diagnosis_path", "concept_columns"):
            found |= {f"columns.{use}.{i}": column for i, column in enumerate(getattr(self, use))}
        if self.question is not None:
            question = self.question
            found |= {"columns.question.question": question.question, "columns.question.answer": question.answer}
            found |= {f"columns.question.options.{i}": column for i, column in enumerate(question.options)}
            if question.kind is not None:
                found["columns.question.kind"] = question.kind
        return found

    def of_lists(self) -> frozenset[str]:
        """The columns whose lists must stay lists."""
        options = self.question.options if self.question is not None and len(self.question.options) == 1 else ()
        return frozenset((self.text_list, *options)) - {None}  # type: ignore[return-value]


class TableData(Frozen):
    """.csv, .tsv, .parquet or .jsonl (by the file's ending), and a folder of images."""

    kind: Literal["table"] = "table"
    table_path: Path
    image_dir: Path
    #: path: the column holds paths below image_dir. name: its file names count alone, without folder and ending, and
    #: are looked for in all folders below image_dir: for ids (ISIC_0024306), and for others' absolute paths.
    images_by: Literal["path", "name"] = "path"
    fallback_encoding: str | None = "cp1252"  # of rows that are not UTF-8; null: such rows are rejected
    columns: Columns

    @model_validator(mode="after")
    def _has_images(self) -> Self:
        if self.columns.image is None:
            raise ValueError("columns.image: missing; name the column that holds the image's path or id")
        return self


class FolderData(Frozen):
    """Image folders whose names say something: `image_dir/LEVEL/.../file.jpg`. Underscores in names are spaces."""

    kind: Literal["folder"] = "folder"
    image_dir: Path
    #: What the folders' names are, from the outermost; deeper folders are not told apart. None: unlabelled.
    levels: tuple[Literal["split", "label", "patient", "source", "body_site", "ignore"], ...] = ("label",)

    @model_validator(mode="after")
    def _once(self) -> Self:
        named = [level for level in self.levels if level != "ignore"]
        if len(set(named)) < len(named):
            raise ValueError("levels: one of them is there twice; call the other ignore")
        return self


class TarsData(Frozen):
    """WebDataset tars (`KEY.jpg`, `KEY.txt`, `KEY.json`), read in place. `columns` are keys of KEY.json."""

    kind: Literal["webdataset"] = "webdataset"
    tar_dir: Path
    pattern: str = "*.tar"
    caption_extension: str = "txt"  # a text of the row, before those of columns.texts
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _brings_images(self) -> Self:
        if self.columns.image is not None:
            raise ValueError("columns.image: a tar's images are its members; remove it")
        return self


class ShardsData(Frozen):
    """A split that `dermvlp prepare` wrote: a folder with manifest.json."""

    kind: Literal["shards"] = "shards"
    path: Path


class Derm1MData(Frozen):
    """One table of Derm1M in its published layout, for retrieval: captions cleaned as for training, rows grouped by
    video, article, thread or page. A label that names several diagnoses is none."""

    kind: Literal["derm1m"] = "derm1m"
    table_path: Path
    image_dir: Path


Source = Annotated[TableData | FolderData | TarsData | ShardsData | Derm1MData, Field(discriminator="kind")]


class EvalDataConfig(Frozen):
    """One evaluation set."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")  # begins every row's key
    source: Source
    #: As prompts write them, in the order of the results. None given: the labels that the rows have, sorted.
    classnames: tuple[str, ...] = ()
    #: Value in the table -> class name; null: such rows are left out, and counted. Keys are compared by `fold`.
    labels: Annotated[dict[str, str | None], BeforeValidator(_text_keys)] = Field(default_factory=dict)
    #: names: values are class names, or keys of `labels`. positions: 0, 1, ... in `classnames`, as the peers' tables.
    labels_are: Literal["names", "positions"] = "names"
    #: Value of the split column, or folder -> what its rows are for. train: the linear probe alone.
    splits: Annotated[dict[str, Literal["test", "train", "leave_out"]], BeforeValidator(_text_keys)] = Field(
        default={"train": "train", "val": "leave_out", "valid": "leave_out", "validation": "leave_out", "test": "test"}
    )
    #: fitzpatrick, sex, age, body_site, source -> value in the table -> value to use ("" = not known)
    replace: dict[Literal["fitzpatrick", "sex", "age", "body_site", "source"], Values] = Field(default_factory=dict)
    absent: Annotated[tuple[str, ...], BeforeValidator(lambda value: [str(each) for each in value])] = ()
    #: Concepts that a row with concepts does not name (columns.concepts): not in its image, or not annotated.
    unnamed_concepts: Literal["absent", "unknown"] = "unknown"
    templates: str | None = None  # list in configs/eval/templates.json that class names are put into; None: dermatology
    licence: str | None = None  # where the table has no such column

    @field_validator("templates")
    @classmethod
    def _is_a_list(cls, templates: str | None) -> str | None:
        if templates is not None:
            load_templates(TEMPLATES_PATH, templates)
        return templates

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        folded = [fold(name) for name in self.classnames]
        if len(set(folded)) < len(folded):
            raise ValueError("classnames: two of them are equal but for case, spaces and underscores")
        if len({fold(raw) for raw in self.labels}) < len(self.labels):
            raise ValueError("labels: two keys are equal but for case, spaces and underscores")
        known = set(self.classnames)
        if known and (strange := sorted({name for name in self.labels.values() if name is not None} - known)):
            raise ValueError(f"labels: {strange[0]!r} is not one of classnames")
        if self.labels_are == "positions" and (not known or self.labels):
            raise ValueError("labels_are: positions needs classnames, in the table's order, and no labels")
        return self
