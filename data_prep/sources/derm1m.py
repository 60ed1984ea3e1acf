"""Derm1M in its published layout (Yan et al., ICCV 2025): two CSV tables beside folders of images.

Columns: filename, caption, truncated_caption, source, source_type, disease_label, hierarchical_disease_label,
skin_concept, body_location, symptoms, age, gender. The whole `caption` is used; `truncated_caption` repeats its
beginning. `symptoms` and `source_type` are not read: a SourceRow has no place for them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from data_prep.config import Derm1MSource
from data_prep.schema import Demographics
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.readers import check_table, read_records
from data_prep.sources.values import (
    Tally,
    check_image_dir,
    find_image,
    lower_text,
    parse_person,
    present,
    split_list,
    why_no_caption,
)

logger = logging.getLogger(__name__)

_COLUMNS = (
    "filename",
    "caption",
    "source",
    "disease_label",
    "hierarchical_disease_label",
    "skin_concept",
    "body_location",
    "age",
    "gender",
)

#: Remains of how captions were made: name, a word without which there are none, pattern, replacement; in this order,
#: before white space is collapsed.
_ARTEFACTS = (
    # a language model that corrected itself: the answer is what follows
    ("draft before 'Corrected:'", "Corrected:", re.compile(r"^.*\n\s*Corrected:\s*", re.DOTALL), ""),
    ("model's special token", "<", re.compile(r"\s*<(?:/?s|unk|pad)>\s*"), " "),
    ("'None' at the end", "None", re.compile(r"(?<=[.!?])\s+None\W*$"), ""),
    # labels taken from a web site's folders: "eczema photos", "psoriasis pictures lichen planus and ..."
    (
        "'photos' in a label",
        ", diagnosed as ",
        re.compile(r"(?<=, diagnosed as )(.*?) (?:photos|pictures)(?=\.$)"),
        r"\1",
    ),
    (
        "'pictures' in a label",
        ", diagnosed as ",
        re.compile(r"(?<=, diagnosed as )(.*?) (?:photos|pictures) (?=\w)"),
        r"\1, ",
    ),
)
_REMARK = re.compile(r'\s*\(from "[^"]*"\)')  # 'irritated seborrheic keratosis (from "sk/isk")'

_THREAD = re.compile(r"(\d+)_\d+(?:_\d+)*\.\w+$")
_PAGE = re.compile(r"(.+_\d{5})_\d{5}(?:_\d+)?\.\w+$")  # BOOK_PAGE_FIGURE.png, BOOK_PAGE_FIGURE_PANEL.png
#: By folder, what of a file name says that images belong together, and the group's name: a video's frames, an
#: article's figures, a forum thread's pictures (the published rows of a thread share a case and nearly a text), the
#: figures of a textbook's page (a book can be in several of the folders).
_GROUPS = {
    "youtube": (re.compile(r"(.+?)_frame_"), "youtube:{}"),
    "pubmed": (re.compile(r".*?(PMC\d+)"), "{}"),
    "IIYI": (_THREAD, "IIYI:{}"),
    "twitter": (_THREAD, "twitter:{}"),
    "reddit": (_THREAD, "reddit:{}"),
    "edu": (_PAGE, "page:{}"),
    "note": (_PAGE, "page:{}"),
    "textbook": (_PAGE, "page:{}"),  # MAKE's name for edu
}


def clean_caption(text: str) -> tuple[str, tuple[str, ...]]:
    """The caption without the remains of its making, and the names of what was removed."""
    found = []
    for name, word, pattern, replacement in _ARTEFACTS:
        if word in text:  # the patterns are ten times slower
            text, num = pattern.subn(replacement, text)
            if num:
                found.append(name)
    return " ".join(text.split()), tuple(found)


def group_of(filename: str) -> str | None:
    """The video, article, forum thread or book page that an image is of; None for the rest, whose rows stand alone."""
    folders, _, base = filename.rpartition("/")
    pattern, name = _GROUPS.get(folders.rpartition("/")[2], (None, ""))
    match = pattern.match(base) if pattern is not None else None
    return None if match is None else name.format(match.group(1))


@lru_cache(maxsize=65536)
def diagnosis_and_path(label: str, hierarchical_label: str) -> tuple[str | None, tuple[str, ...]]:
    """The label and the nodes from general to specific, lower-cased.

    The hierarchical label joins nodes with commas, also those of a label that names several diagnoses: "inflammatory,
    non-infectious, lichen planus, psoriasis". Psoriasis is no lichen planus, so such a path ends before the first of
    them, and the label says the rest.
    """
    diagnosis = present(_REMARK.sub("", label).lower())
    if diagnosis is None:
        return None, ()
    path = [part for text in _REMARK.sub("", hierarchical_label).lower().split(",") if (part := present(text))]
    several = [part.strip() for part in diagnosis.split(",")]
    if len(several) > 1:
        path = path[: min((path.index(part) for part in several if part in path), default=len(path))]
    return diagnosis, tuple(dict.fromkeys(path))


def person_of(age: str, gender: str, row: int, tally: Tally) -> Demographics:
    """Age and sex as Derm1M and MAKE write them; what cannot be used ("male, female": several people) is counted."""
    person, unusable = parse_person(present(age), present(gender), None)
    for field in unusable:
        tally.add(f"{field} cannot be used and counts as absent", row)
    return person


class Derm1MRows:
    """The `Source` of a `Derm1MSource`: the training table, then the validation table.

    Row numbers begin anew in each table. Without a validation table no row has a split. The published tables put
    frames of one video on both sides; groups are given, and deciding is left to the split.
    """

    def __init__(self, config: Derm1MSource, needs_caption: bool = True) -> None:
        self.config, self.needs_caption = config, needs_caption
        has_val = config.val_csv_path is not None
        self.tables: list[tuple[Path, Literal["train", "val"] | None]] = [
            (config.train_csv_path, "train" if has_val else None)
        ]
        if config.val_csv_path is not None:
            self.tables.append((config.val_csv_path, "val"))
        self.wanted = {f"Derm1M's {column}": column for column in _COLUMNS}
        for path, split in self.tables:
            key = "source.val_csv_path" if split == "val" else "source.train_csv_path"
            check_table(path, self.wanted, key, config.fallback_encoding)
        check_image_dir(config.image_dir, "source.image_dir")
        self._warned = False

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path, _ in self.tables)

    def rows(self) -> Iterator[SourceRow | Rejection]:
        for path, split in self.tables:
            tally, artefacts = Tally(path.name), Counter[str]()
            for record in read_records(path, self.wanted, self.config.fallback_encoding, tally):
                if isinstance(record, Rejection):
                    yield record
                else:
                    yield self._row(path.name, *record, split, tally, artefacts)
            if not self._warned:  # the tables are read several times
                tally.warn()
                if artefacts:
                    listed = ", ".join(f"{name} in {num} rows" for name, num in artefacts.items())
                    logger.info("%s: removed from captions: %s", path.name, listed)
        self._warned = True

    def _row(
        self,
        table: str,
        row: int,
        record: Mapping[str, str],
        split: Literal["train", "val"] | None,
        tally: Tally,
        artefacts: Counter[str],
    ) -> SourceRow | Rejection:
        try:
            image = find_image(self.config.image_dir, record["filename"].strip())
        except LookupError as error:
            return Rejection(table, row, "filename", str(error))
        cleaned, found = clean_caption(record["caption"])
        caption = present(cleaned)
        if (reason := why_no_caption(caption)) is not None and (self.needs_caption or caption is not None):
            return Rejection(table, row, "caption", reason)
        artefacts.update(found)
        diagnosis, path = diagnosis_and_path(record["disease_label"], record["hierarchical_disease_label"])
        return SourceRow(
            row=row,
            table=table,
            image=image,
            caption=caption,
            caption_origin="" if caption is None else "column:caption",
            diagnosis=diagnosis,
            diagnosis_path=path,
            concepts=split_list(record["skin_concept"]),
            body_site=lower_text(record["body_location"]),
            demographics=person_of(record["age"], record["gender"], row, tally),
            group=group_of(image.name),
            split=split,
            source=lower_text(record["source"]),
            licence=self.config.licence,
        )
