"""What a source yields: a row of metadata and a way to its image. No image is opened here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from data_prep.schema import Caption, Demographics


@dataclass(frozen=True)
class ImageReference:
    """A file on disk, a member of a tar, or a recipe to draw a synthetic image (`data_prep.sources.synthetic.draw`).

    `name` tells images apart and is the same wherever their folder stands: the path below the image folder, the tar's
    name and the member's. It can hold names and record numbers, so it stays in memory. No file is looked at here:
    whether it exists shows when it is read.
    """

    name: str
    path: Path | None = None
    offset: int | None = None  # of the bytes in `path`, where that is a tar
    num_bytes: int | None = None
    synthetic_seed: int | None = None
    synthetic_px: int | None = None


@dataclass(frozen=True)
class SourceRow:
    """One record as the source has it, absent values as None. Raw group ids stay in memory; shards get hashes."""

    row: int  # 1 = first data row of the table (for a table, the line a spreadsheet shows is row + 1)
    table: str  # base name of the table, for messages and the ledger
    image: ImageReference
    caption: str | None  # None only where a describer is to write it
    caption_origin: str = ""  # see data_prep.schema.Caption.origin
    #: made by the source; then no decomposer is asked. Of any aspect but CAPTION
    subcaptions: tuple[Caption, ...] = ()
    diagnosis: str | None = None
    diagnosis_path: tuple[str, ...] = ()  # where the source itself gives one, from general to specific
    concepts: tuple[str, ...] = ()
    body_site: str | None = None
    demographics: Demographics = field(default_factory=Demographics)
    modality: str | None = None
    group: str | None = None
    split: Literal["train", "val"] | None = None
    source: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Rejection:
    """A row that does not become a sample: an entry of the ledger `rejected.csv`."""

    table: str
    row: int
    field: str  # column, or "image"
    reason: str


class Source(Protocol):
    """Raises InputError when the table, a column or the image folder is missing.

    `rows` streams: the table is never whole in memory. It is called several times and gives the same rows in the same
    order each time. A row is rejected with a reason that quotes nothing of the row.
    """

    @property
    def files(self) -> tuple[Path, ...]:
        """What decides the rows: tables, tars. Where one of them changes between two runs, that is noticed."""

    def rows(self) -> Iterator[SourceRow | Rejection]: ...
