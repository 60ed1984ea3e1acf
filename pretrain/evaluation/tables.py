"""Tables of rows that an evaluation writes beside its numbers, and a comparison reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.errors import InputError
from data_prep.files import write_atomically


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV with a header, whole or not at all; None is an empty cell, and a float reads back as the same one."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # its line ends, \r\n, are what makes it quote a cell that holds one of them
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_table(
    path: Path, first_columns: Sequence[str], *, may_be_empty: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Header and rows. Cells go by position, since a class may have the name of another column.

    Raises InputError for a missing file, one that is no CSV, a header that does not begin with `first_columns`, no row
    (unless it `may_be_empty`), or a row of another length.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except FileNotFoundError:
        raise InputError(f"{path}: no such table; `dermvlp evaluate` writes it beside evaluation.json") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV table ({error}); evaluate again") from None
    if len(lines) < (1 if may_be_empty else 2):
        raise InputError(f"{path}: no rows; evaluate again")
    header, *rows = lines
    if header[: len(first_columns)] != list(first_columns):
        raise InputError(f"{path}: expected {', '.join(first_columns)} as its first columns; evaluate again")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(f"{path}: row {number} has {len(row)} cells, the header {len(header)}; evaluate again")
    return header, rows
