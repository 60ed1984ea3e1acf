"""The ledger of rows that did not become a sample: table, row, field and reason, and nothing of what the row says."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.files import write_atomically
from data_prep.sources.base import Rejection


def write_ledger(path: Path, entries: Iterable[Rejection]) -> int:
    """A CSV with one line for each row of the source that did not become a sample (or fell short). Returns how many."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["table", "row", "field", "reason"])
    num = 0
    for entry in entries:
        writer.writerow([entry.table, entry.row, entry.field, entry.reason])
        num += 1
    write_atomically(path, text.getvalue().encode())
    return num


def read_ledger(path: Path) -> Iterator[Rejection]:
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            yield Rejection(line["table"], int(line["row"]), line["field"], line["reason"])
