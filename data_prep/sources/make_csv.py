"""MAKE's training table (MICCAI 2025): captions that are split already, with masks that say what counts.

Columns used: filename, caption, source, standardized_disease, ontology_final, skin_concept_standarized (so spelt),
body_location, age, gender, ontology_caption, visual_concept_caption, subcaption_1 ... subcaption_8, sub_caption_mask
(eight 0s and 1s, one a sub-caption) and knowledge_masks (three: caption, ontology_caption, visual_concept_caption).

The masks decide. A text that its mask leaves out is not used, and a mask that promises a text which is not there
promises nothing; both are counted and warned of.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from data_prep.captions.lexicon import label
from data_prep.config import MakeSource
from data_prep.schema import MAX_SUBCAPTIONS, Aspect, Caption
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.derm1m import diagnosis_and_path, group_of, person_of
from data_prep.sources.readers import parse_json
from data_prep.sources.table import OneTable
from data_prep.sources.values import (
    NO_CAPTION,
    Tally,
    find_image,
    lower_text,
    present,
    split_list,
    why_no_caption,
)

_KNOWLEDGE = ("caption", "ontology_caption", "visual_concept_caption")  # the order of knowledge_masks
_SUBCAPTIONS = tuple(f"subcaption_{number}" for number in range(1, MAX_SUBCAPTIONS + 1))
_COLUMNS = (
    *("filename", "source", "standardized_disease", "ontology_final", "skin_concept_standarized", "body_location"),
    *("age", "gender", *_KNOWLEDGE, *_SUBCAPTIONS, "sub_caption_mask", "knowledge_masks"),
)


@lru_cache(maxsize=4096)
def parse_mask(text: str, length: int) -> tuple[bool, ...]:
    """ "[1, 0, 0]" -> (True, False, False). Raises ValueError for anything but that many 0s and 1s."""
    values, _ = parse_json(text)
    if not isinstance(values, list) or len(values) != length or any(value not in (0, 1) for value in values):
        raise ValueError(f"not a list of {length} 0s and 1s")
    return tuple(map(bool, values))


class MakeRows(OneTable):
    """The `Source` of a `MakeSource`. A row brings its sub-captions, and its diagnosis and concepts as captions.

    MAKE's sub-captions have no aspect; the lexicon of the rules gives them one.
    """

    def __init__(self, config: MakeSource, needs_caption: bool = True) -> None:
        self.config, self.needs_caption = config, needs_caption
        super().__init__(config, {f"MAKE's {column}": column for column in _COLUMNS})

    def _row(self, row: int, record: Mapping[str, str], tally: Tally) -> SourceRow | Rejection:
        table, config = self.config.table_path.name, self.config
        try:
            image = find_image(config.image_dir, record["filename"].strip().removeprefix(config.path_prefix))
        except LookupError as error:
            return Rejection(table, row, "filename", str(error))
        texts: dict[str, str] = {}
        for mask, columns in (("knowledge_masks", _KNOWLEDGE), ("sub_caption_mask", _SUBCAPTIONS)):
            try:
                texts |= _unmasked(record, columns, parse_mask(record[mask], len(columns)), mask, row, tally)
            except ValueError as error:
                return Rejection(table, row, mask, str(error))
        caption = texts.pop("caption", None)
        if (reason := why_no_caption(caption)) is not None and (self.needs_caption or caption is not None):
            masked = reason == NO_CAPTION and record["caption"].strip()
            return Rejection(table, row, "caption", f"{reason}: masked by knowledge_masks" if masked else reason)
        diagnosis, path = diagnosis_and_path(record["standardized_disease"], record["ontology_final"])
        return SourceRow(
            row=row,
            table=table,
            image=image,
            caption=caption,
            caption_origin="" if caption is None else "column:caption",
            subcaptions=tuple(
                Caption(aspect=_aspect(column, text), text=text, origin=f"column:{column}")
                for column, text in texts.items()
            ),
            diagnosis=diagnosis,
            diagnosis_path=path,
            concepts=split_list(record["skin_concept_standarized"]),
            body_site=lower_text(record["body_location"]),
            demographics=person_of(record["age"], record["gender"], row, tally),
            group=group_of(image.name),
            source=lower_text(record["source"]),
            licence=config.licence,
        )


def _unmasked(
    record: Mapping[str, str], columns: tuple[str, ...], mask: tuple[bool, ...], name: str, row: int, tally: Tally
) -> dict[str, str]:
    """The texts that the mask lets through, by column."""
    texts = {}
    for column, valid in zip(columns, mask, strict=True):
        text = present(record[column])
        if text is not None and why_no_caption(text) is not None and column != "caption":
            tally.add(f"{column} without words, or far too long, left out", row)
        elif valid and text is not None:
            texts[column] = text
        elif valid:
            tally.add(f"{name} set for a text that is absent", row)
        elif text is not None:
            tally.add(f"text left out since {name} is not set for it", row)
    return texts


def _aspect(column: str, text: str) -> Aspect:
    if column == "ontology_caption":
        return Aspect.DIAGNOSIS
    return Aspect.VISUAL_CONCEPTS if column == "visual_concept_caption" else label(text)
