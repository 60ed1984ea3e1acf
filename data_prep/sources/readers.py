"""Tables as streams of records: CSV and TSV, Parquet, JSON Lines. No table is ever whole in memory.

    read_records(path, {use: column}) -> (row, {column: text}) or a Rejection, in the table's order

Every value is text and "" where there is none, whatever the table's types. Only the wanted columns are looked at.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from data_prep.errors import InputError
from data_prep.sources.base import Rejection
from data_prep.sources.values import Tally, is_utf8

Record = tuple[int, dict[str, str]]  # row, 1 = first; {column: text}

#: A field longer than this is a quotation mark that is never closed: reading on would take the table into memory.
_MAX_FIELD_CHARS = 16 * 2**20
_PARQUET_BATCH = 4096
_KEYS_LOOKED_AT = 10_000  # records without any of which a JSON key counts as misspelt
_FORMATS = (".csv", ".tsv", ".parquet", ".jsonl")
_NOT_TEXT = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a spreadsheet or zip file",
    b"\x1f\x8b": "compressed with gzip",
}


def read_records(
    path: Path,
    wanted: Mapping[str, str],
    fallback_encoding: str | None = "cp1252",
    tally: Tally | None = None,
    json_lists: Collection[str] = (),
) -> Iterator[Record | Rejection]:
    """Yield (row, {column: text}) for each record below the header; `wanted` is {use: column}, uses for messages.

    Rows that are not UTF-8 are decoded as `fallback_encoding` and counted in `tally`, or rejected where that is None.
    A record with a NUL byte in a wanted column, with another number of fields than the header, or that is no JSON
    object is a Rejection. Blank lines have a number and are no rows. A JSON list of plain values is joined by commas;
    in the columns `json_lists` it is written as JSON.

    Raises InputError for a file of another kind, a missing column, and for quotation marks that swallow lines.
    """
    tally = tally or Tally(path.name)
    _check_file(path, fallback_encoding)
    columns = tuple(dict.fromkeys(wanted.values()))
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, wanted, columns, fallback_encoding, tally, json_lists)
    elif suffix == ".jsonl":
        check_keys(path, wanted, (value for _, value in _json_lines(path, fallback_encoding, tally=None)))
        yield from _read_json_lines(path, columns, fallback_encoding, tally, json_lists)
    else:
        yield from _read_csv(path, wanted, columns, "\t" if suffix == ".tsv" else ",", fallback_encoding, tally)


def check_table(path: Path, wanted: Mapping[str, str], key: str, fallback_encoding: str | None = "cp1252") -> None:
    """Raise InputError unless the table exists and has the wanted columns. `key` is its configuration key."""
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a table; give one file as {key}")
    if not path.is_file():
        raise InputError(f"{path}: no such table; correct {key}")
    next(read_records(path, wanted, fallback_encoding), None)


def _check_file(path: Path, fallback_encoding: str | None) -> None:
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: not known what its ending stands for; name it {', '.join(_FORMATS)}")
    try:
        b"x".decode(fallback_encoding or "utf-8", "ignore")
    except LookupError:
        raise InputError(
            f"source.fallback_encoding: no encoding {fallback_encoding!r}; cp1252 is Western Windows"
        ) from None
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    for mark, what in _NOT_TEXT.items():
        if start.startswith(mark):
            raise InputError(f"{path}: {what}; save the table as CSV UTF-8, uncompressed")


def check_columns(path: Path, wanted: Mapping[str, str], present: Sequence[str], where: str = "Columns") -> None:
    """Raise InputError for a wanted column that is not there, or is there twice."""
    for use, column in wanted.items():
        if column not in present:
            close = difflib.get_close_matches(column, present, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            if len(present) == 1 and (found := [mark for mark in ";\t|" if mark in present[0]]):
                hint = f"the fields are separated by {found[0]!r}: save the table with commas, or tabs as .tsv. "
            raise InputError(
                f"{path}: no column {column!r} (mapped to {use}); {hint}{where}: {', '.join(present)}. "
                f"Correct {use} in the configuration"
            )
        if present.count(column) > 1:
            raise InputError(f"{path}: column {column!r} (mapped to {use}) appears twice; rename one of them")


# ---------------------------------------------------------------------------------------------- lines of text


class _Lines:
    """The lines of a file opened with "surrogateescape", decoded; what was odd since the last `start` is remembered.

    The csv module asks for just the lines of the record it is reading, so what is remembered is the record's.
    """

    def __init__(self, file: TextIO, fallback_encoding: str | None) -> None:
        self._file, self._fallback = file, fallback_encoding
        self.start()

    def start(self) -> None:
        self.num_lines, self.has_nul, self.repaired, self.undecodable = 0, False, False, False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.num_lines += 1
            if "\0" in line:
                self.has_nul = True
            yield line if is_utf8(line) else self._decode(line)

    def _decode(self, line: str) -> str:
        raw = line.encode("utf-8", "surrogateescape")
        text = decode_otherwise(raw, self._fallback)
        self.undecodable |= text is None
        self.repaired |= text is not None
        return raw.decode("utf-8", "replace") if text is None else text

    def note(self, row: int, tally: Tally) -> str | None:
        """Counts a repair; the reason for rejection where a line could not be decoded."""
        if self.undecodable:
            return _why_undecodable(self._fallback)
        if self.repaired:
            tally.add(f"not UTF-8, read as {self._fallback},", row)
        return None


def decode_otherwise(raw: bytes, encoding: str | None) -> str | None:
    try:
        return None if encoding is None else raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _why_undecodable(fallback_encoding: str | None) -> str:
    return f"neither UTF-8 nor {fallback_encoding}" if fallback_encoding else "not UTF-8"


def _open_text(path: Path, newline: str) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


# ---------------------------------------------------------------------------------------------- CSV


def _read_csv(
    path: Path,
    wanted: Mapping[str, str],
    columns: tuple[str, ...],
    delimiter: str,
    fallback_encoding: str | None,
    tally: Tally,
) -> Iterator[Record | Rejection]:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD_CHARS))
    with _open_text(path, newline="") as file:
        lines = _Lines(file, fallback_encoding)
        # strict: otherwise a quote that is never closed swallows the rest of the table without a word
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _csv_header(path, reader, wanted, lines, tally)
        num_fields = len(header)
        num_named = max((i for i, name in enumerate(header, start=1) if name.strip()), default=0)
        positions = [header.index(column) for column in columns]
        take = itemgetter(*positions) if len(positions) > 1 else lambda fields: tuple(fields[i] for i in positions)
        row = 0
        while True:
            row += 1
            lines.start()
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if lines.num_lines > 1 or "expected after" not in str(error):
                    raise InputError(_quotes(path, row, error)) from None
                yield Rejection(path.name, row, "(row)", 'a " inside a quoted field, where it is written ""')
                continue
            if not fields:
                continue
            # a delimiter too many at the end of lines, or of the header alone, means nothing
            if not num_named <= len(fields) <= num_fields and (len(fields) < num_named or any(fields[num_fields:])):
                reason = f"{len(fields)} fields where the header has {num_fields}; check commas and quotes"
                yield Rejection(path.name, row, "(row)", reason)
                continue
            if (lines.repaired or lines.undecodable) and (reason_or_none := lines.note(row, tally)):
                yield Rejection(path.name, row, "(row)", reason_or_none)
                continue
            record = dict(zip(columns, take(fields), strict=True))
            if lines.has_nul and (nul := _with_nul(record)):
                yield Rejection(path.name, row, nul, "a NUL byte in the text")
            else:
                yield row, record


def _csv_header(
    path: Path, reader: Iterator[list[str]], wanted: Mapping[str, str], lines: _Lines, tally: Tally
) -> list[str]:
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise InputError(_quotes(path, 0, error)) from None
    if not header:
        raise InputError(f"{path}: the table is empty; its first line must name the columns")
    if lines.has_nul:
        raise InputError(f"{path}: NUL bytes in the header, as in UTF-16; save the table as CSV UTF-8")
    if reason := lines.note(0, tally):
        raise InputError(f"{path}: the header is {reason}; save the table as CSV UTF-8")
    check_columns(path, wanted, header)
    return header


def _quotes(path: Path, row: int, error: csv.Error) -> str:
    return f'{path}: row {row}: {error}; check its quotation marks (a " inside is written "")'


def _with_nul(record: Mapping[str, str]) -> str | None:
    return next((column for column, text in record.items() if "\0" in text), None)


# ---------------------------------------------------------------------------------------------- JSON Lines


def plain_text(value: Any, lists_as_json: bool = False) -> str:
    """A JSON or Arrow value as text: null and NaN are "", a list of plain values is joined by commas, or JSON.

    Raises ValueError for an object, and for a list that holds one.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(item, list | dict | bytes) for item in value):
        if lists_as_json:
            return json.dumps(value, ensure_ascii=False)
        return ", ".join(text for item in value if (text := plain_text(item)))
    if isinstance(value, list | dict | bytes):
        raise ValueError("a nested value")
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def parse_json(raw: str) -> tuple[Any, str | None]:
    """(value, None), or (None, the reason) for what is no JSON."""
    try:
        return json.loads(raw), None
    except (ValueError, RecursionError):  # RecursionError: brackets in their thousands
        return None, "no valid JSON"


def _json_lines(
    path: Path, fallback_encoding: str | None, tally: Tally | None
) -> Iterator[tuple[int, dict[str, Any] | Rejection]]:
    with _open_text(path, newline="\n") as file:
        lines = _Lines(file, fallback_encoding)
        for row, line in enumerate(lines, start=1):
            reason = lines.note(row, tally or Tally(path.name))
            lines.start()
            if not line.strip():
                continue
            value, problem = parse_json(line)
            if row == 1 and (isinstance(value, list) or line.strip() == "["):
                raise InputError(f"{path}: a JSON array, not JSON Lines; write one object a line")
            if reason := reason or problem or ("no JSON object" if not isinstance(value, dict) else None):
                yield row, Rejection(path.name, row, "(row)", reason)
            else:
                yield row, value


def check_keys(path: Path, wanted: Mapping[str, str], records: Iterable[object]) -> None:
    """Raise InputError for keys that none of the first records has: a key may well be left out of some."""
    missing, seen = set(wanted.values()), dict[str, None]()
    for number, record in enumerate(records):
        if not missing or number == _KEYS_LOOKED_AT:
            break
        if isinstance(record, dict):
            missing.difference_update(record)
            seen.update(dict.fromkeys(record))
    if not seen and missing:
        raise InputError(f"{path}: the table is empty, or no line of it is a JSON object with keys")
    check_columns(path, {use: column for use, column in wanted.items() if column in missing}, list(seen), "Keys")


def _read_json_lines(
    path: Path, columns: tuple[str, ...], fallback_encoding: str | None, tally: Tally, json_lists: Collection[str]
) -> Iterator[Record | Rejection]:
    for row, value in _json_lines(path, fallback_encoding, tally):
        if isinstance(value, Rejection):
            yield value
            continue
        record: dict[str, str] = {}
        for column in columns:
            try:
                record[column] = text = plain_text(value.get(column), column in json_lists)
            except ValueError as error:
                yield Rejection(path.name, row, column, f"{error}, where text or a number is expected")
                break
            if not is_utf8(text) or "\0" in text:  # escapes can say what no file name or caption may hold
                yield Rejection(path.name, row, column, "a NUL or half a character in the text")
                break
        else:
            yield row, record


# ---------------------------------------------------------------------------------------------- Parquet


@dataclass(frozen=True)
class _Unusable:
    reason: str


def _read_parquet(
    path: Path,
    wanted: Mapping[str, str],
    columns: tuple[str, ...],
    fallback_encoding: str | None,
    tally: Tally,
    json_lists: Collection[str],
) -> Iterator[Record | Rejection]:
    import pyarrow as pa  # here: it takes a third of a second, and most tables are CSV
    from pyarrow import parquet

    row = 0
    try:
        # read as it is needed: with its defaults pyarrow takes whole row groups, often the whole file, into memory
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            check_columns(path, wanted, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=list(columns), use_threads=False):
                cells = [
                    _cells(batch.column(column), row + 1, fallback_encoding, tally, column in json_lists)
                    for column in columns
                ]
                for values in zip(*cells, strict=True) if columns else ((),) * batch.num_rows:
                    row += 1
                    record = dict(zip(columns, values, strict=True))
                    bad = next((item for item in record.items() if isinstance(item[1], _Unusable)), None)
                    yield (row, record) if bad is None else Rejection(path.name, row, bad[0], bad[1].reason)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: cannot be read after row {row} ({type(error).__name__}); is it a whole Parquet file?"
        ) from None


def _cells(column: Any, first_row: int, fallback_encoding: str | None, tally: Tally, lists_as_json: bool) -> list[Any]:
    """Text, or an `_Unusable`, for each value of an Arrow array."""
    import pyarrow as pa

    if pa.types.is_temporal(column.type):
        column = column.cast(pa.string())
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # Parquet promises UTF-8 and nobody checks
        values = column.cast(pa.large_binary()).to_pylist()

    def text(value: object, row: int) -> str | _Unusable:
        if isinstance(value, bytes):
            decoded = decode_otherwise(value, "utf-8")
            if decoded is None:
                if (decoded := decode_otherwise(value, fallback_encoding)) is None:
                    return _Unusable(_why_undecodable(fallback_encoding))
                tally.add(f"not UTF-8, read as {fallback_encoding},", row)
            value = decoded
        try:
            found = plain_text(value, lists_as_json)
        except ValueError as error:
            return _Unusable(f"{error}, where text or a number is expected")
        return _Unusable("a NUL byte in the text") if "\0" in found else found

    return [
        value if type(value) is str and "\0" not in value else text(value, row)
        for row, value in enumerate(values, start=first_row)
    ]
