"""What a source yields: a row of metadata and a way to its image. No image is opened here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from data_prep.schema import Demographics


@dataclass(frozen=True)
class ImageReference:
    """A file on disk, or a recipe to draw a synthetic image (`data_prep.sources.synthetic.draw`)."""

    path: Path | None = None
    synthetic_seed: int | None = None
    synthetic_px: int | None = None


@dataclass(frozen=True)
class SourceRow:
    """One record as the source has it, absent values as None. Raw group ids stay in memory; shards get hashes."""

    row: int  # 1 = first data row of the table (for a table, the line a spreadsheet shows is row + 1)
    table: str  # base name of the table, for messages and the ledger
    image: ImageReference
    caption: str | None
    diagnosis: str | None = None
    diagnosis_path: tuple[str, ...] = ()  # where the source itself gives one, from general to specific
    concepts: tuple[str, ...] = ()
    body_site: str | None = None
    demographics: Demographics = field(default_factory=Demographics)
    modality: str | None = None
    group: str | None = None
    split: Literal["train", "val"] | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Rejection:
    """A row that does not become a sample: an entry of the ledger `rejected.csv`."""

    table: str
    row: int
    field: str  # column, or "image"
    reason: str


class Source(Protocol):
    """Raises InputError when the table, a column or the image folder is missing."""

    def rows(self) -> Iterator[SourceRow | Rejection]: ...
