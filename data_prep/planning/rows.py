"""A source's rows as arrays: what a plan for a million of them needs, and whether the source changed since.

Texts, labels and names are here as hashes and codes only, at 39 bytes a row.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.files import atomic, file_sha256, write_atomically
from data_prep.salt import hash_group, hash_name
from data_prep.schema import text_hash
from data_prep.sources.base import Rejection, Source, SourceRow

ROW_DTYPE = np.dtype(
    [
        ("table", "<u2"),
        ("row", "<u4"),
        ("digest", "<u8"),  # of all that the row says, but its number
        ("image", "<u4"),  # position among the distinct images
        ("caption", "<u8"),  # text_hash; 0 = none
        ("group", "<u8"),  # salted hash; 0 = none
        ("diagnosis", "<i4"),  # code; -1 = none
        ("split", "u1"),  # the source's own: an index of SPLIT_CODES
    ]
)
SPLIT_CODES = (None, "train", "val")
_BLOCK = 65_536  # rows that are Python objects at a time


@dataclass
class RowTable:
    rows: NDArray[np.void]  # (N,) ROW_DTYPE, without the rejected ones
    images: NDArray[np.uint64]  # (M,) salted hashes of the distinct images' names, in order of appearance
    tables: list[str]
    diagnoses: Counter[str]  # label -> rows; codes are positions
    concepts: Counter[str]
    rejected: list[Rejection] = field(default_factory=list)


def read_rows(source: Source, dataset: str, salt: str, advance: Callable[[int], None] = lambda count: None) -> RowTable:
    """One pass over the source. The order of rows and images is that in which the source yields them."""
    tables: dict[str, int] = {}
    images: dict[int, int] = {}
    diagnoses, concepts, rejected = Counter[str](), Counter[str](), list[Rejection]()
    codes: dict[str, int] = {}
    blocks: list[NDArray[np.void]] = []
    block: list[tuple[object, ...]] = []
    for row in source.rows():
        if isinstance(row, Rejection):
            rejected.append(row)
            continue
        name = hash_name(row.image.name, salt)
        if row.diagnosis is not None:
            codes.setdefault(row.diagnosis, len(codes))
            diagnoses[row.diagnosis] += 1
        concepts.update(row.concepts)
        block.append(
            (
                tables.setdefault(row.table, len(tables)),
                row.row,
                row_digest(row, salt),
                images.setdefault(name, len(images)),
                0 if row.caption is None else text_hash(row.caption),
                0 if row.group is None else int(hash_group(dataset, row.group, salt), 16),
                -1 if row.diagnosis is None else codes[row.diagnosis],
                SPLIT_CODES.index(row.split),
            )
        )
        if len(block) == _BLOCK:
            blocks.append(np.array(block, dtype=ROW_DTYPE))
            advance(len(block))
            block = []
    blocks.append(np.array(block, dtype=ROW_DTYPE))
    names = np.fromiter(images, dtype=np.uint64, count=len(images))
    return RowTable(np.concatenate(blocks), names, list(tables), diagnoses, concepts, rejected)


def row_digest(row: SourceRow, salt: str) -> int:
    """Of everything a row says. Keyed: it covers the group's name."""
    person = row.demographics
    parts = (
        *(row.image.name, row.caption, row.caption_origin, row.diagnosis, *row.diagnosis_path, "", *row.concepts, ""),
        *(row.body_site, person.age_years, person.age_band, person.sex, person.fitzpatrick, row.modality, row.group),
        *(row.split, row.source, row.licence, row.image.offset, row.image.num_bytes, row.image.synthetic_seed),
        *(f"{caption.aspect} {caption.origin} {caption.text}" for caption in row.subcaptions),
    )
    text = "\x1f".join("\x00" if part is None else str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), key=salt.encode()[:64], digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------- changes


class SourceState:
    """What the source was when this preparation began: `source.json` and, once planned, `rows.npy`."""

    def __init__(self, directory: Path) -> None:
        self._files_path, self._rows_path = directory / "source.json", directory / "rows.npy"

    def check(self, source: Source, settings: str, read: Callable[[], RowTable]) -> None:
        """Raises InputError where a table changed since the last run under equal settings, and says how.

        `settings` is the source's configuration: another one is the user's own doing and is no surprise.
        """
        files = {path.name: _fingerprint(path) for path in source.files}
        try:
            before = json.loads(self._files_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            before = None
        if before is not None and before["settings"] == settings and before["files"] != files:
            names = sorted(set(before["files"].items()) ^ set(files.items()))
            changed = ", ".join(dict.fromkeys(name for name, _ in names))
            difference = self.difference(read()) if self._rows_path.is_file() else ""
            if difference is not None:
                raise _changed(changed, difference)
        write_atomically(self._files_path, json.dumps({"settings": settings, "files": files}, indent=1).encode())

    def check_rows(self, table: RowTable, settings: str) -> None:
        """The same for sources whose rows are not decided by a file (a tree of folders)."""
        path = self._rows_path.with_name("rows.json")
        same_settings = path.is_file() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings
        if same_settings and self._rows_path.is_file() and (difference := self.difference(table)) is not None:
            raise _changed("the source", difference)

    def save(self, table: RowTable, settings: str) -> None:
        with atomic(self._rows_path) as file:
            np.save(file, table.rows, allow_pickle=False)
        content = {"settings": settings, "tables": table.tables}
        write_atomically(self._rows_path.with_name("rows.json"), json.dumps(content).encode())

    def forget_files(self) -> None:
        """The next check takes the tables as they are."""
        self._files_path.unlink(missing_ok=True)

    def difference(self, table: RowTable) -> str | None:
        """ "3 rows are new (first: row 17 of t.csv), 1 is gone (first: row 5 of t.csv)"; None where rows are equal."""
        old: NDArray[np.void] = np.load(self._rows_path, allow_pickle=False)
        tables = json.loads(self._rows_path.with_name("rows.json").read_text(encoding="utf-8"))["tables"]
        new = table.rows
        parts = []
        for rows, others, names, what in ((new, old, table.tables, "new or changed"), (old, new, tables, "gone")):
            only = rows[~np.isin(rows["digest"], others["digest"])]
            if len(only):
                parts.append(
                    f"{len(only)} row(s) {what}, the first is row {only['row'][0]} of {names[only['table'][0]]}"
                )
        if not parts and not np.array_equal(old["digest"], new["digest"]):
            parts.append("the same rows in another order, or repeated another number of times")
        return "; ".join(parts) or None


def _changed(what: str, difference: str) -> InputError:
    return InputError(
        f"{what}: changed since this preparation began{': ' if difference else ''}{difference}. Run with "
        "--accept-changes to go on with the new content (splits stay where they are), or give another out_dir"
    )


def _fingerprint(path: Path) -> str:
    if path.suffix == ".tar":  # too many bytes to read each time
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    return file_sha256(path)


def iter_survivors(
    source: Source, rows: NDArray[np.void], fate: NDArray[np.uint8], salt: str
) -> Iterator[tuple[int, SourceRow]]:
    """(position in ROW arrays, row) of the rows that the plan keeps.

    Raises InputError at the first row that is not what it was when it was planned: captions must not go to the
    pictures of other rows.
    """
    position = -1
    for row in source.rows():
        if isinstance(row, Rejection):
            continue
        position += 1
        if position >= len(fate) or row_digest(row, salt) != rows["digest"][position]:
            raise InputError(
                f"{row.table}: row {row.row} is not what it was when it was planned; run the stage plan again"
            )
        if fate[position]:
            yield position, row
    if position + 1 != len(fate):
        raise InputError("the source has fewer rows than when it was planned; run the stage plan again")
