"""Record readers: the same records from CSV, TSV, Parquet and JSON Lines; odd bytes are repaired or rejected, counted,
and never lost; no table is whole in memory."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.errors import InputError
from data_prep.sources.base import Rejection
from data_prep.sources.readers import check_table, parse_json, plain_text, read_records
from data_prep.sources.values import Tally

ROOT = Path(__file__).parents[3]
WANTED = {"columns.image": "file", "columns.caption": "text"}


def read(
    tmp_path: Path, content: bytes | str, name: str = "t.csv", fallback: str | None = "cp1252", **wanted: str
) -> tuple[list[Any], Tally]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tally = Tally(name)
    return list(read_records(path, wanted or WANTED, fallback, tally)), tally


def texts(records: list[Any]) -> list[tuple[int, str] | Rejection]:
    return [record if isinstance(record, Rejection) else (record[0], record[1]["text"]) for record in records]


# ------------------------------------------------------------------------------------------ CSV


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_mark(tmp_path: Path, end: str, mark: str) -> None:
    text = end.join([f"{mark}file,text", 'a.jpg,"one', 'two"', "", "b.jpg,", ""])
    records, _ = read(tmp_path, text)
    assert records == [(1, {"file": "a.jpg", "text": f"one{end}two"}), (3, {"file": "b.jpg", "text": ""})]


@pytest.mark.parametrize(
    ("header", "line", "good"),
    [
        ("file,text", "a.jpg,c,", True),  # a delimiter at the end of lines
        ("file,text,", "a.jpg,c", True),  # of the header
        ("file,text,", "a.jpg,c,", True),
        ("file,text,", "a.jpg,c,more", True),
        ("file,text,,", "a.jpg,c,,,,", True),
        ("file,text", "a.jpg,c,d", False),
        ("file,text", "a.jpg", False),
        (",file,text", "0,a.jpg,c", True),  # the index that pandas writes
        (",file,text", "a.jpg,c", False),
    ],
)
def test_delimiters_at_the_end(tmp_path: Path, header: str, line: str, good: bool) -> None:
    (record,), _ = read(tmp_path, f"{header}\n{line}\n")
    if good:
        assert record == (1, {"file": "a.jpg", "text": "c"})
    else:
        assert record.reason.endswith("check commas and quotes")


def test_rows_in_another_encoding(tmp_path: Path) -> None:
    """Row by row: the ones before and after stay UTF-8."""
    rows = [
        "file,text",
        "a.jpg,\u7d05\u6591",
        "b.jpg,caf\u00e9",
        "c.jpg,plain",
        'd.jpg,"na\u00efve',
        'line"',
        "e.jpg,\u00b5",
    ]
    encoded = [row.encode("cp1252" if row[0] in "bd" else "utf-8") for row in rows]
    records, tally = read(tmp_path, b"\n".join(encoded))
    assert texts(records) == [
        (1, "\u7d05\u6591"),
        (2, "caf\u00e9"),
        (3, "plain"),
        (4, "na\u00efve\nline"),
        (5, "\u00b5"),
    ]
    assert (tally.counts, tally.first_row) == (
        {"not UTF-8, read as cp1252,": 2},
        {"not UTF-8, read as cp1252,": 2},
    )
    records, tally = read(tmp_path, b"\n".join(encoded), fallback=None)
    assert [record[0] for record in records if not isinstance(record, Rejection)] == [1, 3, 5]
    assert [r for r in records if isinstance(r, Rejection)] == [
        Rejection("t.csv", row, "(row)", "not UTF-8") for row in (2, 4)
    ]
    assert not tally.counts
    chinese = "file,text\na.jpg,\u7d05\u6591\n".encode("gb18030")
    assert texts(read(tmp_path, chinese, fallback="gb18030")[0]) == [(1, "\u7d05\u6591")]


def test_bytes_that_no_encoding_has(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, b"file,text\na.jpg,\x81\xff\n")  # 81 is nothing in cp1252
    assert record == Rejection("t.csv", 1, "(row)", "neither UTF-8 nor cp1252")
    with pytest.raises(InputError, match="header is not UTF-8"):
        read(tmp_path, b"file,text,\xe9\na.jpg,c,\n", fallback=None)


def test_nul_bytes(tmp_path: Path) -> None:
    records, _ = read(tmp_path, "file,text,other\na.jpg,b\0c,d\nb.jpg,c,\0\nc.jpg,d,e\n")
    assert texts(records) == [Rejection("t.csv", 1, "text", "a NUL byte in the text"), (2, "c"), (3, "d")]


def test_a_broken_quotation_costs_its_row_only(tmp_path: Path) -> None:
    records, _ = read(tmp_path, 'file,text\na.jpg,"he said "no" twice"\nb.jpg,he said "no"\nc.jpg,c\n')
    assert isinstance(records[0], Rejection) and 'a " inside a quoted field' in records[0].reason
    assert texts(records[1:]) == [(2, 'he said "no"'), (3, "c")]


@pytest.mark.parametrize(
    "content",
    [
        'file,text\na.jpg,c\nb.jpg,"never closed\nc.jpg,c\n',
        'file,text\na.jpg,c\nb.jpg,"never closed\nc.jpg,"next"\nd.jpg,d\n',
        'file,text\na.jpg,c\nb.jpg,"never closed\n' + "c.jpg,c\n" * 2_500_000,  # 20 MB
    ],
    ids=["end", "another", "long"],
)
def test_a_quotation_that_swallows_lines_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"row 2: .*quotation marks"):
        read(tmp_path, content)


def test_fields_of_ten_megabytes(tmp_path: Path) -> None:
    records, _ = read(tmp_path, f"file,text,blob\na.jpg,c,{'x' * 10_000_000}\nb.jpg,{'y' * 10_000_000},z\n")
    assert [(row, len(record["text"])) for row, record in records] == [(1, 1), (2, 10_000_000)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table is empty"),
        (b"\n\n", "the table is empty"),
        ("file,text\na.jpg,c\n".encode("utf-16-le"), "NUL bytes in the header"),
        ("file,text\na.jpg,c\n".encode("utf-16"), "UTF-16 text; save the table as CSV UTF-8"),
        (b"PK\x03\x04....", "a spreadsheet or zip file"),
        (b"\x1f\x8b....", "compressed with gzip"),
        (b"file,text,text\na.jpg,c,d\n", "'text'.*appears twice"),
        (b"file,Text\na.jpg,c\n", r"no column 'text' \(mapped to columns.caption\); did you mean 'Text'.*file, Text"),
        (b"file;text\na.jpg;c\n", "separated by ';': save the table with commas"),
        (b'file,"text\n', "row 0: unexpected end of data"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


def test_paths_that_are_no_table(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path, "a folder, not a table"),
        (tmp_path / "none.csv", r"no such table; correct source\.table_path"),
    ]:
        with pytest.raises(InputError, match=message):
            check_table(path, WANTED, "source.table_path")
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"ending stands for; name it \.csv"):
        check_table(tmp_path / "t.xlsx", WANTED, "source.table_path")
    (tmp_path / "t.csv").write_bytes(b"file,text\n")
    with pytest.raises(InputError, match="no encoding 'latin-99'"):
        check_table(tmp_path / "t.csv", WANTED, "source.table_path", "latin-99")


# ------------------------------------------------------------------------------------------ all formats alike


def test_the_same_records_from_every_format(tmp_path: Path) -> None:
    rows = [(f"{i}.jpg", f'a "caption", of\ntwo lines \u00e9\u7d05 {i}') for i in range(9000)]  # more than one batch
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=mark).writerows([("file", "x", "text"), *((f, "0", t) for f, t in rows)])
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": text, "file": file, "x": {"y": 0}}) + "\n" for file, text in rows)
    )
    parquet.write_table(
        pa.table({"text": [t for _, t in rows], "x": [{"y": 0}] * len(rows), "file": [f for f, _ in rows]}),
        tmp_path / "t.PARQUET",
    )
    expected = [(i, {"file": file, "text": text}) for i, (file, text) in enumerate(rows, start=1)]
    for name in ("t.csv", "t.tsv", "t.jsonl", "t.PARQUET"):
        assert list(read_records(tmp_path / name, WANTED)) == expected, name


# ------------------------------------------------------------------------------------------ JSON Lines


def test_json_values_and_lines(tmp_path: Path) -> None:
    lines = [
        r'{"file": "a.jpg", "text": 45}',
        r'{"file": "a.jpg", "text": 45.5, "more": {"deep": 1}}',
        "",
        r'{"file": "a.jpg", "text": null}',
        r'{"file": "a.jpg"}',
        r'{"file": "a.jpg", "text": NaN}',
        r'{"file": "a.jpg", "text": ["erythema", 2, null, "scale"]}',
        r'{"file": "a.jpg", "text": true}',
        r'{"file": "a.jpg", "text": {"en": "red"}}',
        r'{"file": "a.jpg", "text": "half \ud83d"}',
        r'{"file": "a.jpg", "text": "nul \u0000"}',
        r'{"file": "a.jpg", "text": "whole \ud83d\ude00"}',
        r'["a.jpg", "text"]',
        r'{"file": "a.jpg", "text": "cut',
        "[" * 100_000,
        "1" * 5000,
        '{"file": "a.jpg", "text": "line\u2028separator"}',
    ]
    records, _ = read(tmp_path, "\n".join(lines), "t.jsonl")
    nested = "a nested value, where text or a number is expected"
    half = "a NUL or half a character in the text"
    assert texts(records) == [
        (1, "45"),
        (2, "45.5"),
        (4, ""),
        (5, ""),
        (6, ""),
        (7, "erythema, 2, scale"),
        (8, "true"),
        Rejection("t.jsonl", 9, "text", nested),
        Rejection("t.jsonl", 10, "text", half),
        Rejection("t.jsonl", 11, "text", half),
        (12, "whole \U0001f600"),
        Rejection("t.jsonl", 13, "(row)", "no JSON object"),
        *(Rejection("t.jsonl", row, "(row)", "no valid JSON") for row in (14, 15, 16)),
        (17, "line\u2028separator"),
    ]


def test_json_lines_in_another_encoding(tmp_path: Path) -> None:
    content = '{"file": "a.jpg", "text": "caf\u00e9"}\n'.encode("latin-1") + b'{"file": "b.jpg", "text": "\x81"}\n'
    records, tally = read(tmp_path, content, "t.jsonl")
    assert texts(records) == [(1, "caf\u00e9"), Rejection("t.jsonl", 2, "(row)", "neither UTF-8 nor cp1252")]
    assert tally.counts == {"not UTF-8, read as cp1252,": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the table is empty"),
        ('[{"file": "a.jpg", "text": "c"}]', "a JSON array, not JSON Lines"),
        ('[\n{"file": "a.jpg", "text": "c"}\n]', "a JSON array, not JSON Lines"),
        ('{"file": "a.jpg", "Text": "c"}\n', "no column 'text'.*did you mean 'Text'.*Keys: file, Text"),
        ("file,text\na.jpg,c\n", "no line of it is a JSON object"),
    ],
)
def test_files_that_are_no_json_lines(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, content, "t.jsonl")


def test_plain_values() -> None:
    assert parse_json('{"a": [1]}') == ({"a": [1]}, None)
    assert [plain_text(value) for value in (False, 0, 1e-7, [], [[]][0])] == ["false", "0", "1e-07", "", ""]
    for nested in ({}, [[1]], b"x"):
        with pytest.raises(ValueError):
            plain_text(nested)


# ------------------------------------------------------------------------------------------ Parquet


def parquet_values(tmp_path: Path, column: Any, fallback: str | None = "cp1252") -> list[str | Rejection]:
    table = pa.table({"file": ["a.jpg"] * len(column), "text": column, "unread": [{"x": 1}] * len(column)})
    parquet.write_table(table, tmp_path / "t.parquet")
    records = read_records(tmp_path / "t.parquet", WANTED, fallback)
    return [record if isinstance(record, Rejection) else record[1]["text"] for record in records]


def test_parquet_types(tmp_path: Path) -> None:
    assert parquet_values(tmp_path, [45, None]) == ["45", ""]
    assert parquet_values(tmp_path, [45.0, None, float("nan")]) == ["45.0", "", ""]
    assert parquet_values(tmp_path, [True, False]) == ["true", "false"]
    assert parquet_values(tmp_path, [["red", "scale"], [], None]) == ["red, scale", "", ""]
    assert parquet_values(tmp_path, pa.array(["x", "y", None, "x"]).dictionary_encode()) == ["x", "y", "", "x"]
    assert parquet_values(tmp_path, [datetime.date(2026, 11, 2)]) == ["2026-11-02"]
    assert parquet_values(tmp_path, pa.nulls(2)) == ["", ""]
    assert parquet_values(tmp_path, ["a\0b", "c"])[0] == Rejection("t.parquet", 1, "text", "a NUL byte in the text")
    nested = parquet_values(tmp_path, [{"en": "red"}])[0]
    assert isinstance(nested, Rejection) and nested.reason.startswith("a nested value")


def test_parquet_bytes_and_broken_text(tmp_path: Path) -> None:
    raw = ["caf\u00e9".encode(), "caf\u00e9".encode("cp1252"), None, b"\x81"]
    rejected = Rejection("t.parquet", 4, "text", "neither UTF-8 nor cp1252")
    assert parquet_values(tmp_path, raw) == ["caf\u00e9", "caf\u00e9", "", rejected]
    offsets, data = pa.array(raw, pa.binary()).buffers()[1:]
    broken = pa.StringArray.from_buffers(4, offsets, data)  # a writer that does not check its own text
    assert parquet_values(tmp_path, broken)[:2] == ["caf\u00e9", "caf\u00e9"]
    assert parquet_values(tmp_path, broken, None)[1] == Rejection("t.parquet", 2, "text", "not UTF-8")


def test_parquet_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    for content in (b"", b"file,text\na,b\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is it a whole Parquet file"):
            check_table(path, WANTED, "source.table_path")
    parquet.write_table(pa.table({"file": ["a.jpg"], "Text": ["c"]}), path)
    with pytest.raises(InputError, match=r"no column 'text'.*did you mean 'Text'"):
        check_table(path, WANTED, "source.table_path")
    rows = pa.table({"file": [f"{i}.jpg" for i in range(50_000)], "text": [f"{i * 7919}" for i in range(50_000)]})
    parquet.write_table(rows, path, row_group_size=10_000)
    content = bytearray(path.read_bytes())
    start = len(content) // 2
    content[start : start + 4000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read after row"):
        list(read_records(path, WANTED))


# ------------------------------------------------------------------------------------------ size and speed

_PEAK = """
import re, sys, time
from pathlib import Path
from data_prep.sources.readers import read_records
if sys.argv[1].endswith("parquet"):
    import pyarrow.parquet
def peak_mb():  # not ru_maxrss: a child begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak_mb()
num = sum(1 for _ in read_records(Path(sys.argv[1]), {"a": "file", "b": "text"}))
print(num, peak_mb() - before, time.process_time())
"""


def test_memory_and_speed(tmp_path: Path) -> None:
    """100 MB of each format, in a process of its own: no more than a few MB over what the imports take (Parquet: some
    batches and Arrow's pools), and at least 50,000 rows a second of the processor (measured: over 150,000)."""
    caption = "word " * 60
    num = 300_000
    lines = [f"{i}.jpg,{caption}{i}\n" for i in range(num)]
    (tmp_path / "t.csv").write_text("file,text\n" + "".join(lines))
    (tmp_path / "t.jsonl").write_text("".join(f'{{"file": "{i}.jpg", "text": "{caption}{i}"}}\n' for i in range(num)))
    files = [f"{i}.jpg" for i in range(num)]
    table = pa.table({"file": files, "text": [caption + file for file in files]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=50_000, compression="none", use_dictionary=False)
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        assert (tmp_path / name).stat().st_size > 90_000_000
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        out = subprocess.run(
            [sys.executable, "-c", _PEAK, str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        rows, peak_mb, cpu_s = out.stdout.split()
        print(f"{name}: {num / float(cpu_s):.0f} rows a CPU second, peak {float(peak_mb):.0f} MB over the baseline")
        assert int(rows) == num
        assert float(peak_mb) < (10 if name != "t.parquet" else 100)
        assert float(cpu_s) < num / 50_000  # with the start of Python; wall time says more about the neighbours
