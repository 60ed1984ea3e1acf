"""From the text of a record to a `SourceRow`, for the sources whose labels are free: tables, folders, tars.

The configuration says which field is where, what stands for what, and how a caption is made where none is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal

from data_prep.config import FolderSource, TableColumns, TableSource, WebDatasetSource
from data_prep.errors import InputError
from data_prep.sources.base import ImageReference, Rejection, SourceRow
from data_prep.sources.values import (
    NO_CAPTION,
    Tally,
    absent_values,
    parse_person,
    present,
    split_list,
    why_no_caption,
)

FIELDS = tuple(field for field in TableColumns.model_fields if field not in ("image", "caption"))
_TEMPLATE_FIELDS = ("diagnosis", "body_site", "age", "sex", "fitzpatrick", "modality", "concepts", "source")
#: Lower-cased, so that one class is not counted as two.
_LOWER = frozenset({"diagnosis", "concepts", "body_site", "sex", "modality", "age"})
_PLACE = re.compile(r"\{(?:([aA]):)?(\w+)\}")  # {diagnosis}, {a:diagnosis}, {A:modality}


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


def _check_template(template: Iterable[str], fields: Mapping[str, str], extra: Iterable[str], where: str) -> None:
    known = {*_TEMPLATE_FIELDS, *extra}
    for sentence in template:
        names = [match.group(2) for match in _PLACE.finditer(sentence)]
        if set("{}") & set(_PLACE.sub("", sentence)):
            raise InputError(f"caption_template: {sentence!r}: write a place as {{field}} or {{a:field}}")
        for name in names:
            if name not in known:
                raise InputError(
                    f"caption_template: {sentence!r}: no field {name!r}; there are {', '.join(sorted(known))} "
                    "(add others under extra_columns)"
                )
            if name not in fields:
                raise InputError(f"caption_template: {sentence!r}: the field {name!r} has no column; set {where}{name}")


# ---------------------------------------------------------------------------------------------- rows


class Labels:
    """Makes rows as `config` says. `fields` is {field: column of a record}, the extra columns among them; `where`
    begins the name of a field's setting ("columns."), for messages.

    Raises InputError when made for a template or a replacement that names a field which is not there, and where rows
    need captions and there is neither a column nor a template for them.
    """

    def __init__(
        self,
        config: TableSource | FolderSource | WebDatasetSource,
        fields: Mapping[str, str],
        where: str,
        needs_caption: bool,
        has_captions: bool,
    ) -> None:
        self.config, self.fields, self.needs_caption = config, dict(fields), needs_caption
        if clashes := sorted(set(config.extra_columns) & set(TableColumns.model_fields)):
            raise InputError(f"extra_columns: {clashes[0]!r} is a field of columns already; choose another name")
        self.fields |= config.extra_columns
        for field in config.replace:
            if field not in self.fields or field == "image":
                raise InputError(
                    f"replace: {field!r} has no column; set it under columns or extra_columns, or remove it"
                )
        if needs_caption and not has_captions and not config.caption_template:
            raise InputError("source: neither columns.caption nor caption_template; set one of them")
        _check_template(config.caption_template, self.fields, config.extra_columns, where)
        self._absent = absent_values(config.absent)
        # most values come again and again; captions and groups do not, and are not kept
        self._known_value = lru_cache(maxsize=65536)(self._value)
        self._short = [item for item in self.fields.items() if item[0] not in ("image", "caption", "group")]

    def row(
        self,
        row: int,
        table: str,
        image: ImageReference,
        record: Mapping[str, str],
        tally: Tally,
        caption: str | None,
        caption_origin: str,
    ) -> SourceRow | Rejection:
        """`caption` as written, if any; else the template's. Raises InputError for a split that is not configured."""
        values = {field: self._known_value(field, record[column]) for field, column in self._short}
        get = values.get
        person, unusable = parse_person(get("age"), get("sex"), get("fitzpatrick"))
        for field in unusable:
            tally.add(f"{field} cannot be used and counts as absent", row)
        concepts = split_list(get("concepts"))
        caption = None if caption is None else self._value("caption", caption)
        if caption is None and self.config.caption_template:
            years = person.age_years
            age = person.age_band if years is None or years >= 90 else f"{years:g}"
            skin_type = None if person.fitzpatrick is None else str(person.fitzpatrick)
            caption = render(
                self.config.caption_template,
                values | {"age": age, "sex": person.sex, "fitzpatrick": skin_type, "concepts": ", ".join(concepts)},
            )
            caption_origin = "template"
        if (reason := why_no_caption(caption)) is not None:
            if self.needs_caption or caption is not None:
                return self._without_caption(row, table, reason)
            caption_origin = ""
        return SourceRow(
            row=row,
            table=table,
            image=image,
            caption=caption,
            caption_origin=caption_origin,
            diagnosis=get("diagnosis"),
            concepts=concepts,
            body_site=get("body_site"),
            demographics=person,
            modality=get("modality"),
            group=self._value("group", record[self.fields["group"]]) if "group" in self.fields else None,
            split=self._split(table, row, get("split")) if "split" in self.fields else None,
            source=get("source") or self.config.source,
            licence=get("licence") or self.config.licence,
        )

    def _without_caption(self, row: int, table: str, reason: str) -> Rejection:
        if self.config.caption_template and reason == NO_CAPTION:
            reason += ", and no sentence of caption_template has all its fields"
        return Rejection(table, row, self.fields.get("caption", "caption"), reason)

    def _value(self, field: str, text: str) -> str | None:
        text = text.strip()
        if field in self.config.replace:
            text = self.config.replace[field].get(text, text)
        found = present(text, self._absent)
        return found.lower() if found is not None and field in _LOWER else found

    def _split(self, table: str, row: int, value: str | None) -> Literal["train", "val"] | None:
        if value is None:
            return None
        if value not in self.config.split_values:
            raise InputError(
                f"{table}: row {row}: {self.fields['split']!r} has a value other than "
                f"{', '.join(self.config.split_values)}; add it to source.split_values as train or val"
            )
        return self.config.split_values[value]
