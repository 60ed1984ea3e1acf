"""A CSV table of images and labels, read row by row: the table is never whole in memory.

`read_csv` is shared with the other sources that are tables.
"""

from __future__ import annotations

import csv
import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from data_prep.config import TableSource
from data_prep.errors import InputError
from data_prep.schema import Demographics
from data_prep.sources.base import ImageReference, Rejection, SourceRow

logger = logging.getLogger(__name__)

_ABSENT = {"", "unknown", "nan"}
_TEMPLATE_FIELDS = ("diagnosis", "body_site", "age", "sex", "fitzpatrick", "modality", "concepts")
_PLACE = re.compile(r"\{(?:([aA]):)?(\w+)\}")  # {diagnosis}, {a:diagnosis}, {A:modality}


# ---------------------------------------------------------------------------------------------- CSV


def read_csv(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]] | Rejection]:
    """Yield (row, {column: text}) for each record, 1 = the first below the header; `wanted` is {use: column}.

    UTF-8 with or without a byte order mark; quoted line breaks are kept. Blank lines have a number and are no rows.
    A record that has a NUL byte or not as many fields as the header is a Rejection. Raises InputError for a file that
    is not a UTF-8 CSV table, from the first unusable record on.
    """
    row = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: otherwise a quote that is never closed swallows the rest of the table without a word
            reader = csv.reader(file, strict=True)
            header = _header(path, reader, wanted)
            for row, fields in enumerate(reader, start=1):
                if not fields:
                    continue
                if len(fields) != len(header):
                    reason = f"{len(fields)} fields where the header has {len(header)}; check commas and quotes"
                    yield Rejection(path.name, row, "(row)", reason)
                elif nul := [column for column, text in zip(header, fields, strict=True) if "\0" in text]:
                    yield Rejection(path.name, row, nul[0], "a NUL byte in the text")
                else:
                    yield row, dict(zip(header, fields, strict=True))
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text after row {row}; save the table as CSV UTF-8") from None
    except csv.Error as error:
        raise InputError(
            f'{path}: row {row + 1}: {error}; check its quotation marks (a " inside is written "")'
        ) from None


def _header(path: Path, reader: Iterator[list[str]], wanted: Mapping[str, str]) -> list[str]:
    header = next(reader, None)
    if not header:
        raise InputError(f"{path}: the table is empty; its first line must name the columns")
    if any("\0" in name for name in header):
        raise InputError(f"{path}: NUL bytes in the header, as in UTF-16; save the table as CSV UTF-8")
    for use, column in wanted.items():
        if column not in header:
            close = difflib.get_close_matches(column, header, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(
                f"{path}: no column {column!r} (mapped to {use}); {hint}Columns: {', '.join(header)}. "
                f"Correct {use} in the configuration"
            )
        if header.count(column) > 1:
            raise InputError(f"{path}: column {column!r} (mapped to {use}) appears twice; rename one of them")
    return header


def check_csv(path: Path, wanted: Mapping[str, str], key: str) -> None:
    """Raise InputError unless the table exists and has the wanted columns. `key` is its configuration key."""
    if not path.is_file():
        raise InputError(f"{path}: no such table; correct {key}")
    next(read_csv(path, wanted), None)


def check_image_dir(path: Path, key: str) -> None:
    if not path.is_dir():
        raise InputError(f"{path}: no such image folder; correct {key}")


def find_image(image_dir: Path, written: str) -> Path:
    """The file below `image_dir` that the table's text names. Raises LookupError with the reason where it is unusable.

    The reason does not repeat the path, which can hold a name or a record number; the row finds it.
    The check is on the text: links inside the folder are the user's own and are followed.
    """
    if not written:
        raise LookupError("no image path")
    relative = PurePosixPath(written.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or re.match(r"[A-Za-z]:", written):
        raise LookupError("the image path leads out of the image folder")
    path = image_dir / relative
    if not path.is_file():
        raise LookupError("no such file in the image folder")
    return path


# ---------------------------------------------------------------------------------------------- values


def present(text: str, absent: Iterable[str] = ()) -> str | None:
    """The text with its white space collapsed; None for "", "unknown", "nan" and those in `absent`, in any case."""
    text = " ".join(text.split())
    folded = text.casefold()
    return None if folded in _ABSENT or folded in {a.casefold() for a in absent} else text


def split_list(text: str | None) -> tuple[str, ...]:
    """ "erythema, scale; erythema" -> ("erythema", "scale")."""
    parts = (present(part) for part in re.split(r"[,;]", text or ""))
    return tuple(dict.fromkeys(part.lower() for part in parts if part))


def number_in(text: str | None, low: float, high: float, *, whole: bool = False) -> float | None:
    """The number if it lies in [low, high] (and is whole); ValueError for any other text; None for None."""
    if text is None:
        return None
    value = float(text)
    if not (math.isfinite(value) and low <= value <= high) or (whole and value != int(value)):
        raise ValueError(text)
    return value


class UnusedValues:
    """Counts values that were there and could not be used, for one warning at the end of a table."""

    def __init__(self, table: str) -> None:
        self.table = table
        self.counts: Counter[str] = Counter()
        self.first_row: dict[str, int] = {}

    def number(
        self, field: str, text: str | None, row: int, low: int, high: int, *, whole: bool = False
    ) -> float | None:
        try:
            return number_in(text, low, high, whole=whole)
        except ValueError:
            self.add(field, row)
            return None

    def add(self, field: str, row: int) -> None:
        self.counts[field] += 1
        self.first_row.setdefault(field, row)

    def warn(self) -> None:
        # rows, never values: a shifted column could put a name here
        if self.counts:
            listed = ", ".join(
                f"{n} of {field} (first in row {self.first_row[field]})" for field, n in self.counts.items()
            )
            logger.warning("%s: values that cannot be used, taken as absent: %s", self.table, listed)


# ---------------------------------------------------------------------------------------------- caption template


def article(word: str) -> str:
    """ "a" or "an" by the first letter; a number by its sound: an 8, 11, 18, 80-89. "u" counts as a vowel except in
    "uni-" and "eu"."""
    word = word.casefold()
    if word[:1].isdigit():
        return "an" if re.match(r"(8|1[18](?!\d))", word) else "a"
    return "an" if re.match(r"(?!uni|eu)[aeiou]", word) else "a"


def render(template: Iterable[str], values: Mapping[str, str | None]) -> str | None:
    """Fill the sentences' {field} places; a sentence with an absent field is left out; None where none is left.

    `{a:field}` puts "a" or "an" before the value, `{A:field}` capitalises it. Sentences begin with a capital.
    """

    def fill(match: re.Match[str]) -> str:
        value = values[match.group(2)] or ""
        form = match.group(1)
        word = article(value) if form else ""
        return f"{word.capitalize() if form == 'A' else word} {value}".strip()

    sentences = [
        _PLACE.sub(fill, sentence)
        for sentence in template
        if all(values[match.group(2)] for match in _PLACE.finditer(sentence))
    ]
    return " ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences) or None


def _check_template(config: TableSource) -> None:
    known = {*_TEMPLATE_FIELDS, *config.extra_columns}
    for sentence in config.caption_template:
        names = [match.group(2) for match in _PLACE.finditer(sentence)]
        if set("{}") & set(_PLACE.sub("", sentence)):
            raise InputError(f"caption_template: {sentence!r}: write a place as {{field}} or {{a:field}}")
        for name in names:
            if name not in known:
                raise InputError(
                    f"caption_template: {sentence!r}: no field {name!r}; there are {', '.join(sorted(known))} "
                    "(add others under extra_columns)"
                )
            if name in _TEMPLATE_FIELDS and getattr(config.columns, name) is None:
                raise InputError(
                    f"caption_template: {sentence!r}: the field {name!r} has no column; set columns.{name}"
                )


# ---------------------------------------------------------------------------------------------- the source


class TableRows:
    """The `Source` of a `TableSource`. Raises InputError when made, before any row, for what is missing.

    Labels, sites, sex and modality are lower-cased, so that one class is not counted as two. `rows` raises InputError
    for a split value that the configuration does not name.
    """

    def __init__(self, config: TableSource) -> None:
        self.config = config
        columns = {field: column for field, column in config.columns.model_dump().items() if column is not None}
        clashes = set(config.extra_columns) & set(type(config.columns).model_fields)
        if clashes:
            raise InputError(
                f"extra_columns: {sorted(clashes)[0]!r} is a field of columns already; choose another name"
            )
        self.columns: dict[str, str] = {**columns, **config.extra_columns}
        for field in config.replace:
            if field not in self.columns or field == "image":
                raise InputError(
                    f"replace: {field!r} has no column; set it under columns or extra_columns, or remove it"
                )
        if config.columns.caption is None and not config.caption_template:
            raise InputError("source: neither columns.caption nor caption_template; set one of them")
        _check_template(config)
        wanted = {f"columns.{field}": column for field, column in columns.items()}
        wanted |= {f"extra_columns.{name}": column for name, column in config.extra_columns.items()}
        check_csv(config.table_path, wanted, "source.table_path")
        check_image_dir(config.image_dir, "source.image_dir")
        self.wanted = wanted

    def rows(self) -> Iterator[SourceRow | Rejection]:
        unused = UnusedValues(self.config.table_path.name)
        for record in read_csv(self.config.table_path, self.wanted):
            yield record if isinstance(record, Rejection) else self._row(*record, unused)
        unused.warn()

    def _row(self, row: int, record: Mapping[str, str], unused: UnusedValues) -> SourceRow | Rejection:
        config, table = self.config, self.config.table_path.name
        try:
            path = find_image(config.image_dir, record[config.columns.image].strip())
        except LookupError as error:
            return Rejection(table, row, config.columns.image, str(error))
        values = {field: self._value(field, record[column]) for field, column in self.columns.items()}
        lower = {name: text.lower() if (text := values.get(name)) else None for name in _TEMPLATE_FIELDS}
        age = unused.number("age", values.get("age"), row, 0, 120)
        fitzpatrick = unused.number("fitzpatrick", values.get("fitzpatrick"), row, 1, 6, whole=True)
        concepts = split_list(lower["concepts"])
        caption = values.get("caption") or render(
            config.caption_template,
            values
            | lower
            | {
                "age": None if age is None else f"{age:g}",
                "fitzpatrick": None if fitzpatrick is None else f"{fitzpatrick:g}",
                "concepts": ", ".join(concepts),
            },
        )
        if caption is None:
            field = config.columns.caption or "caption_template"
            return Rejection(table, row, field, "no caption, and no sentence of caption_template has all its fields")
        return SourceRow(
            row=row,
            table=table,
            image=ImageReference(path=path),
            caption=caption,
            diagnosis=lower["diagnosis"],
            concepts=concepts,
            body_site=lower["body_site"],
            demographics=Demographics(
                age_years=age, sex=lower["sex"], fitzpatrick=None if fitzpatrick is None else int(fitzpatrick)
            ),
            modality=lower["modality"],
            group=values.get("group"),
            split=self._split(values.get("split"), row),
            licence=values.get("licence") or config.licence,
        )

    def _value(self, field: str, text: str) -> str | None:
        text = text.strip()
        return present(self.config.replace.get(field, {}).get(text, text))

    def _split(self, value: str | None, row: int) -> Literal["train", "val"] | None:
        if value is None:
            return None
        if value not in self.config.split_values:
            raise InputError(
                f"{self.config.table_path}: row {row}: column {self.columns['split']!r} has the value {value!r}; "
                f"known are {', '.join(self.config.split_values)}: add it to source.split_values as train or val"
            )
        return self.config.split_values[value]
