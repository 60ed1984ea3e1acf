"""From the text of a record to what a row says: label, captions, person, concepts, question. No file is read here."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from data_prep.schema import Demographics
from data_prep.sources.base import ImageReference, Rejection
from data_prep.sources.values import (
    Tally,
    absent_values,
    is_utf8,
    parse_person,
    present,
    split_list,
    why_no_caption,
)
from pretrain.evaluation.datasets.description import Columns, EvalDataConfig, QuestionColumns
from pretrain.evaluation.interfaces import Question

_YES = frozenset({"1", "1.0", "true", "yes", "x"})
_NO = frozenset({"0", "0.0", "false", "no"})
_ROMAN = ("I", "II", "III", "IV", "V", "VI")


@dataclass(frozen=True)
class Item:
    """A record of any source, before its label is given a class."""

    row: int  # 1 = first of the source
    table: str  # base name, for the ledger
    image: ImageReference
    key: str | None = None  # where the source has keys of our own making
    label: str | None = None  # as the source has it
    texts: tuple[str, ...] = ()
    patient: str | None = None  # salted hash
    attributes: Mapping[str, str] | None = None
    concepts: Mapping[str, bool] | None = None
    concept_names: tuple[str, ...] = ()  # of those that are present, where the source has names alone
    diagnosis_path: tuple[str, ...] = ()
    question: Question | None = None
    licence: str | None = None
    split: str | None = None  # as the source has it


class UnusableRow(Exception):  # noqa: N818 (says what it is)
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.reason = field, reason


@lru_cache(maxsize=65536)
def attributes_of(person: Demographics, body_site: str | None, source: str | None) -> Mapping[str, str] | None:
    """What rows are grouped by; only what is known. Rows that are equal in it share one mapping: not to be changed."""
    values = {
        "fitzpatrick": None if person.fitzpatrick is None else _ROMAN[person.fitzpatrick - 1],
        "sex": person.sex,
        "age_band": person.age_band,
        "body_site": body_site,
        "source": source,
    }
    return {name: value for name, value in values.items() if value is not None} or None


class RecordReader:
    """Makes items of records as `config` says; `columns` are those of its source.

    What a row says and cannot be used (a skin type "III-IV") counts as not known; `tally` remembers how often.
    """

    def __init__(
        self, config: EvalDataConfig, columns: Columns, hash_patient: Callable[[str], str], tally: Tally
    ) -> None:
        self.config, self.columns, self.hash_patient, self.tally = config, columns, hash_patient, tally
        self._absent = absent_values(config.absent)

    def item(
        self, row: int, table: str, image: ImageReference, record: Mapping[str, str], texts: tuple[str, ...] = ()
    ) -> Item | Rejection:
        """`texts`: captions that do not stand in a column."""
        columns = self.columns
        try:
            return Item(
                row=row,
                table=table,
                image=image,
                label=self._label(record),
                texts=self._texts(row, record, texts),
                patient=None if (patient := self._get(record, columns.patient)) is None else self.hash_patient(patient),
                attributes=self._attributes(row, record),
                concepts=self._concepts(row, record),
                concept_names=split_list(self._get(record, columns.concepts)),
                diagnosis_path=self._path(record),
                question=None if columns.question is None else self._question(record, columns.question),
                licence=self._get(record, columns.licence) or self.config.licence,
                split=self._split(record),
            )
        except UnusableRow as problem:
            return Rejection(table, row, problem.field, problem.reason)

    def _get(self, record: Mapping[str, str], column: str | None, field: str = "") -> str | None:
        if column is None:
            return None
        text = record[column].strip()
        changes = self.config.replace.get(field) if field else None  # type: ignore[call-overload]
        return present(text if changes is None else changes.get(text, text), self._absent)

    def _label(self, record: Mapping[str, str]) -> str | None:
        if not self.columns.one_hot:
            return self._get(record, self.columns.label)
        marked = [column for column in self.columns.one_hot if self._flag(record, column)]
        if len(marked) > 1:
            raise UnusableRow(marked[1], "more than one of the label's columns is 1")
        return marked[0] if marked else None

    def _flag(self, record: Mapping[str, str], column: str) -> bool | None:
        """None where the field is empty."""
        text = self._get(record, column)
        if text is None:
            return None
        if text.casefold() not in _YES | _NO:
            raise UnusableRow(column, "neither 0 nor 1")
        return text.casefold() in _YES

    def _texts(self, row: int, record: Mapping[str, str], texts: tuple[str, ...]) -> tuple[str, ...]:
        found = [*texts, *(record[column] for column in self.columns.texts)]
        if self.columns.text_list is not None:
            found += json_list(record[self.columns.text_list], self.columns.text_list)
        kept = [text for each in found if (text := present(each, self._absent)) and why_no_caption(text) is None]
        if not kept and (found or self.columns.texts or self.columns.text_list):
            self.tally.add("no caption", row)
        return tuple(dict.fromkeys(kept))

    def _attributes(self, row: int, record: Mapping[str, str]) -> Mapping[str, str] | None:
        columns = self.columns
        age, sex, fitzpatrick, site, source = (
            self._get(record, getattr(columns, field), field)
            for field in ("age", "sex", "fitzpatrick", "body_site", "source")
        )
        person, unusable = parse_person(age, sex, fitzpatrick)
        for field in unusable:
            self.tally.add(f"{field} cannot be used and counts as not known", row)
        return attributes_of(person, None if site is None else site.lower(), source)

    def _concepts(self, row: int, record: Mapping[str, str]) -> Mapping[str, bool] | None:
        found: dict[str, bool] = {}
        for column, name in self.columns.concept_columns.items():
            try:
                flag = self._flag(record, column)
            except UnusableRow as problem:
                self.tally.add(f"{column} is {problem.reason} and counts as not annotated", row)
                continue
            if flag is not None:  # of several columns for one concept any will do
                found[name] = found.get(name, False) or flag
        return found or None

    def _split(self, record: Mapping[str, str]) -> str | None:
        split = self._get(record, self.columns.split)
        if split is None and self.columns.split is not None:
            raise UnusableRow(self.columns.split, "no value: neither for training nor for testing")
        return split

    def _path(self, record: Mapping[str, str]) -> tuple[str, ...]:
        nodes = (self._get(record, column) for column in self.columns.diagnosis_path)
        return tuple(dict.fromkeys(node.lower() for node in nodes if node is not None))

    def _question(self, record: Mapping[str, str], columns: QuestionColumns) -> Question:
        text = self._get(record, columns.question)
        if text is None:
            raise UnusableRow(columns.question, "no question")
        if len(columns.options) == 1:
            written: list[str] = json_list(record[columns.options[0]], columns.options[0])
        else:
            written = [record[column] for column in columns.options]
        # not `absent`: "none" and "unknown" can well be an answer
        options = [" ".join(option.split()) for option in written]
        right = options[_answer(" ".join(record[columns.answer].split()), options, columns)]
        if not right:
            raise UnusableRow(columns.answer, "the answer is an option that is empty")
        kept = [option for option in options if option]  # a question with three options leaves the fourth empty
        if len({option.casefold() for option in kept}) < max(2, len(kept)):
            raise UnusableRow(columns.options[0], "fewer than two options, or two that are equal")
        return Question(text, tuple(kept), kept.index(right), self._get(record, columns.kind))


def _answer(text: str, options: list[str], columns: QuestionColumns) -> int:
    """Position among the options as written."""
    if columns.answers_are == "texts":
        if text.casefold() in (folded := [option.casefold() for option in options]) and text:
            return folded.index(text.casefold())
        raise UnusableRow(columns.answer, "the answer is none of the options")
    if columns.answers_are == "letters":
        letter = text.strip("().: ").upper()
        position = string.ascii_uppercase.find(letter) if len(letter) == 1 else -1
    else:
        position = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= position < len(options):
        raise UnusableRow(columns.answer, f"the answer is none of the {len(options)} {columns.answers_are}")
    return position


def json_list(text: str, column: str) -> list[str]:
    """["a", "b"] of a JSON list; a text that is none is one item, an empty one no item."""
    text = text.strip()
    if not text.startswith("["):
        return [text] if text else []
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        raise UnusableRow(column, "begins with [ and is no JSON list") from None
    if not all(isinstance(item, str) for item in items):
        raise UnusableRow(column, "a list of other things than texts")
    if any("\0" in item or not is_utf8(item) for item in items):  # escapes can say what no text may hold
        raise UnusableRow(column, "a NUL or half a character in the text")
    return list(items)
