"""Derm1M in its published layout (Yan et al., ICCV 2025): two CSV tables beside folders of images.

Columns: filename, caption, truncated_caption, source, source_type, disease_label, hierarchical_disease_label,
skin_concept, body_location, symptoms, age, gender. The whole `caption` is used; `truncated_caption` repeats its
beginning. `symptoms`, `source` and `source_type` are not read: a SourceRow has no place for them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from data_prep.config import Derm1MSource
from data_prep.schema import Demographics
from data_prep.sources.base import ImageReference, Rejection, SourceRow
from data_prep.sources.table import UnusedValues, check_csv, check_image_dir, find_image, present, read_csv, split_list

logger = logging.getLogger(__name__)

_COLUMNS = (
    "filename",
    "caption",
    "disease_label",
    "hierarchical_disease_label",
    "skin_concept",
    "body_location",
    "age",
    "gender",
)
#: What the tables write where nothing is known.
_ABSENT = (
    "No age information",
    "No gender information",
    "No visual concepts",
    "No body location information",
    "no definitive diagnosis",
)

#: Remains of how captions were made: name, pattern, replacement; in this order, before white space is collapsed.
_ARTEFACTS = (
    # a language model that corrected itself: the answer is what follows
    ("draft before 'Corrected:'", re.compile(r"^.*\n\s*Corrected:\s*", re.DOTALL), ""),
    ("model's special token", re.compile(r"\s*<(?:/?s|unk|pad)>\s*"), " "),
    ("'None' at the end", re.compile(r"(?<=[.!?])\s+None\W*$"), ""),
    # labels taken from a web site's folders: "eczema photos", "psoriasis pictures lichen planus and ..."
    ("'photos' in a label", re.compile(r"(?<=, diagnosed as )(.*?) (?:photos|pictures)(?=\.$)"), r"\1"),
    ("'pictures' in a label", re.compile(r"(?<=, diagnosed as )(.*?) (?:photos|pictures) (?=\w)"), r"\1, "),
)
_REMARK = re.compile(r'\s*\(from "[^"]*"\)')  # 'irritated seborrheic keratosis (from "sk/isk")'

_VIDEO = re.compile(r"(?:^|/)youtube/(.+?)_frame_")
_ARTICLE = re.compile(r"(?:^|/)pubmed/.*?(PMC\d+)")


def clean_caption(text: str) -> tuple[str, tuple[str, ...]]:
    """The caption without the remains of its making, and the names of what was removed."""
    found = []
    for name, pattern, replacement in _ARTEFACTS:
        text, num = pattern.subn(replacement, text)
        if num:
            found.append(name)
    return " ".join(text.split()), tuple(found)


def group_of(filename: str) -> str | None:
    """The video of a frame, the article of a figure; None for the rest, whose rows stand alone."""
    if video := _VIDEO.search(filename):
        return f"youtube:{video.group(1)}"
    if article := _ARTICLE.search(filename):
        return article.group(1)
    return None


def diagnosis_and_path(label: str, hierarchical_label: str) -> tuple[str | None, tuple[str, ...]]:
    """The label and the nodes from general to specific, lower-cased.

    The hierarchical label joins nodes with commas, also those of a label that names several diagnoses: "inflammatory,
    non-infectious, lichen planus, psoriasis". Psoriasis is no lichen planus, so such a path ends before the first of
    them, and the label says the rest.
    """
    diagnosis = present(_REMARK.sub("", label).lower(), _ABSENT)
    if diagnosis is None:
        return None, ()
    path = [part for text in _REMARK.sub("", hierarchical_label).lower().split(",") if (part := present(text, _ABSENT))]
    several = [part.strip() for part in diagnosis.split(",")]
    if len(several) > 1:
        path = path[: min((path.index(part) for part in several if part in path), default=len(path))]
    return diagnosis, tuple(path)


class Derm1MRows:
    """The `Source` of a `Derm1MSource`: the training table, then the validation table.

    Row numbers begin anew in each table. Without a validation table no row has a split. The published tables put
    frames of one video on both sides; groups are given, and deciding is left to the split.
    """

    def __init__(self, config: Derm1MSource) -> None:
        self.config = config
        has_val = config.val_csv_path is not None
        self.tables: list[tuple[Path, Literal["train", "val"] | None]] = [
            (config.train_csv_path, "train" if has_val else None)
        ]
        if config.val_csv_path is not None:
            self.tables.append((config.val_csv_path, "val"))
        wanted = {f"Derm1M's {column}": column for column in _COLUMNS}
        for path, split in self.tables:
            check_csv(path, wanted, "source.val_csv_path" if split == "val" else "source.train_csv_path")
        check_image_dir(config.image_dir, "source.image_dir")
        self.wanted = wanted

    def rows(self) -> Iterator[SourceRow | Rejection]:
        for path, split in self.tables:
            unused, artefacts = UnusedValues(path.name), Counter[str]()
            for record in read_csv(path, self.wanted):
                if isinstance(record, Rejection):
                    yield record
                else:
                    yield self._row(path.name, *record, split, unused, artefacts)
            unused.warn()
            if artefacts:
                listed = ", ".join(f"{name} in {num} rows" for name, num in artefacts.items())
                logger.info("%s: removed from captions: %s", path.name, listed)

    def _row(
        self,
        table: str,
        row: int,
        record: Mapping[str, str],
        split: Literal["train", "val"] | None,
        unused: UnusedValues,
        artefacts: Counter[str],
    ) -> SourceRow | Rejection:
        filename = record["filename"].strip()
        try:
            image_path = find_image(self.config.image_dir, filename)
        except LookupError as error:
            return Rejection(table, row, "filename", str(error))
        caption, found = clean_caption(record["caption"])
        if present(caption, _ABSENT) is None:
            return Rejection(table, row, "caption", "no caption")
        artefacts.update(found)
        diagnosis, path = diagnosis_and_path(record["disease_label"], record["hierarchical_disease_label"])
        body_site = present(record["body_location"], _ABSENT)
        sex = present(record["gender"].lower(), _ABSENT)
        if sex is not None and "," in sex:  # "male, female": several people, no one's sex
            unused.add("gender", row)
            sex = None
        return SourceRow(
            row=row,
            table=table,
            image=ImageReference(path=image_path),
            caption=caption,
            diagnosis=diagnosis,
            diagnosis_path=path,
            concepts=split_list(present(record["skin_concept"], _ABSENT)),
            body_site=body_site.lower() if body_site else None,
            demographics=Demographics(
                age_years=unused.number("age", present(record["age"], _ABSENT), row, 0, 120), sex=sex
            ),
            group=group_of(filename),
            split=split,
            licence=self.config.licence,
        )
