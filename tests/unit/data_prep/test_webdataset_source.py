"""Existing tars, read in place: offsets are right, odd and hostile tars cost what is damaged and nothing else."""

from __future__ import annotations

import gzip
import io
import json
import logging
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig, WebDatasetSource
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.schema import Aspect, Caption, Demographics, Sample
from data_prep.sources import open_source
from data_prep.sources.base import Rejection, SourceRow

CONFIGS = Path(__file__).parents[3] / "configs" / "data"


def write_tar(path: Path, members: list[tuple[str, bytes | str]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def rows_of(folder: Path, needs_caption: bool = True, **keys: Any) -> list[Any]:
    config = WebDatasetSource.model_validate({"tar_dir": folder, **keys})
    return list(open_source(config, needs_caption).rows())


def image_of(row: SourceRow) -> bytes:
    assert row.image.path and row.image.offset is not None and row.image.num_bytes is not None
    with row.image.path.open("rb") as file:
        file.seek(row.image.offset)
        return file.read(row.image.num_bytes)


def triple(number: int) -> list[tuple[str, bytes | str]]:
    return [(f"{number}.jpg", b"image %d" % number), (f"{number}.txt", f"Caption {number}.")]


# ------------------------------------------------------------------------------------------ what comes through


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_are_found_in_place(tmp_path: Path, form: int) -> None:
    long = "x" * 60 + "/" + "y" * 90 if form == tarfile.USTAR_FORMAT else "x" * 200 + "/\u76ae\u819a" + "y" * 120
    write_tar(
        tmp_path / "b.tar",
        [
            ("./2024/case.7.JPG", b"first"),  # the key ends at the first full stop of the base name
            ("./2024/case.8.png", b"second image"),
            (f"{long}.txt", "Long."),
            (f"{long}.jpeg", b"third" * 300),
        ],
        form,
    )
    write_tar(tmp_path / "a.tar", triple(1), form)
    one, seven, long_one = rows_of(tmp_path, pattern="*.tar")
    assert (one.row, one.table, one.caption, one.caption_origin) == (1, "a.tar", "Caption 1.", "column:txt")
    assert (one.image.name, image_of(one)) == ("a.tar/1.jpg", b"image 1")
    # "7.JPG" and "8.png" are extensions of the key "case" and no images
    assert seven == Rejection("b.tar", 2, "image", "no member is an image by its extension")
    assert (long_one.row, long_one.caption, image_of(long_one)) == (3, "Long.", b"third" * 300)
    assert long_one.image.name == f"b.tar/{long}.jpeg"
    assert open_source(WebDatasetSource(tar_dir=tmp_path)).files == (tmp_path / "a.tar", tmp_path / "b.tar")


def test_labels_from_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = {
        "dx": "NV",
        "patient": {"age": 45, "sex": "F", "id": 7, "part": "test"},
        "signs": ["Scale", "erythema"],
        "a.b": "HAM",
        "scope": "Heine",
    }
    write_tar(
        tmp_path / "a.tar",
        [
            *[("1.jpg", b"1"), ("1.json", json.dumps(first))],
            *[("2.jpg", b"2"), ("2.txt", "Mine."), ("2.json", '{"patient": {"age": "old"}}')],
            *[("3.jpg", b"3"), ("3.json", '{"dx": {"code": 1}}')],
        ],
    )
    keys = {
        "columns": {
            "diagnosis": "dx",
            "concepts": "signs",
            "age": "patient.age",
            "sex": "patient.sex",
            "group": "patient.id",
            "split": "patient.part",
            "source": "a.b",
        },
        "extra_columns": {"device": "scope"},
        "caption_template": ["{A:diagnosis} seen through a {device}."],
        "replace": {"diagnosis": {"NV": "nevus"}},
        "split_values": {"test": "val"},
    }
    with caplog.at_level(logging.WARNING):
        one, two, three = rows_of(tmp_path, **keys)
    assert (one.caption, one.caption_origin) == ("A nevus seen through a Heine.", "template")
    assert (one.diagnosis, one.concepts, one.group, one.split, one.source) == (
        "nevus",
        ("scale", "erythema"),
        "7",
        "val",
        "HAM",
    )
    assert (one.demographics.age_years, one.demographics.sex) == (45, "female")
    assert (two.caption, two.caption_origin, two.diagnosis, two.split) == ("Mine.", "column:txt", None, None)
    assert three == Rejection("a.tar", 3, "dx", "a nested value, where text or a number is expected")
    assert "a.tar: age cannot be used and counts as absent in 1 row(s), the first is row 2" in caplog.text


def sample(number: int, **fields: Any) -> Sample:
    captions = (
        Caption(aspect=Aspect.CAPTION, text=f"Whole {number}.", origin="column:caption"),
        Caption(aspect=Aspect.DIAGNOSIS, text="Nevus.", origin="ontology"),
        Caption(aspect=Aspect.SYMPTOMS, text="Itchy.", origin="llm:m:0123456789ab:2026-11-02"),
    )
    return Sample(key=f"old-{number}", captions=captions, dataset="old", **fields)


def test_shards_of_our_own(tmp_path: Path) -> None:
    """Whatever a sample says comes over, its group's hash and its captions' origins too; of schema 1 as well."""
    whole = sample(
        1,
        diagnosis="nevus",
        diagnosis_path=("benign", "nevus"),
        concepts=("papule",),
        body_site="arm",
        demographics=Demographics(age_band="20-29", sex="female", fitzpatrick=3),
        modality="dermoscopy",
        group="0123456789abcdef",
        source="youtube",
        licence="CC0-1.0",
    )
    old = json.loads(sample(2).model_dump_json())
    del old["source"], old["demographics"]["age_band"]
    old["demographics"]["age_years"] = 97.0
    for caption in old["captions"]:
        del caption["origin"]
    bad = json.loads(sample(3).model_dump_json()) | {"Jane Roe": 1}
    members = [("old-1.jpg", b"1"), ("old-1.json", whole.model_dump_json()), ("old-1.txt", whole.caption)]
    members += [("old-2.jpg", b"2"), ("old-2.json", json.dumps(old)), ("old-2.txt", "x")]
    members += [("old-3.jpg", b"3"), ("old-3.json", json.dumps(bad))]
    members += [("old-4.jpg", b"4"), ("old-4.json", sample(4).model_dump_json().replace("Itchy", "It\\u0000chy"))]
    members += [("old-5.jpg", b"5"), ("old-5.txt", "x")]
    write_tar(tmp_path / "shard-000000.tar", members)
    one, two, *rest = rows_of(tmp_path, json_is_sample=True, licence="CC-BY-4.0")
    assert (one.caption, one.caption_origin, one.subcaptions) == ("Whole 1.", "column:caption", whole.captions[1:])
    for field in ("diagnosis", "diagnosis_path", "concepts", "body_site", "modality", "group", "source", "licence"):
        assert getattr(one, field) == getattr(whole, field), field
    assert one.demographics == whole.demographics
    assert (two.demographics.age_years, two.demographics.age_band) == (90, "90+")
    assert (two.source, two.licence, two.caption_origin) == ("old", "CC-BY-4.0", "")
    assert rest == [
        Rejection("shard-000000.tar", 3, "json", "no Sample of ours"),
        Rejection("shard-000000.tar", 4, "json", "a NUL in the text"),
        Rejection("shard-000000.tar", 5, "json", "the sample has no .json member"),
    ]


def test_rows_for_a_describer(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"1"), *triple(2)])
    assert [row.caption for row in rows_of(tmp_path, needs_caption=False)] == [None, "Caption 2."]
    assert rows_of(tmp_path)[0] == Rejection("a.tar", 1, "caption", "no caption")


# ------------------------------------------------------------------------------------------ samples that cannot be used


def test_samples_that_cannot_be_used(tmp_path: Path) -> None:
    groups: list[tuple[list[tuple[str, bytes | str]], str, str]] = [
        ([("a/jane-roe-1.txt", "c")], "image", "no member is an image by its extension"),
        ([("jane-roe-2.jpg", b"1"), ("jane-roe-2.png", b"2")], "image", "several members are images"),
        ([("jane-roe-3.jpg", b"1"), ("jane-roe-3.jpg", b"2")], "(row)", "two members of the same name"),
        ([("jane-roe-4.jpg", b"1"), ("jane-roe-4.txt", b"caf\xe9")], "txt", "not UTF-8"),
        ([("jane-roe-5.jpg", b"1"), ("jane-roe-5.txt", b"a\0b")], "txt", "a NUL byte in the text"),
        ([("jane-roe-6.jpg", b"1"), ("jane-roe-6.txt", "c"), ("jane-roe-6.json", "{")], "json", "no valid JSON"),
        ([("jane-roe-7.jpg", b"1"), ("jane-roe-7.txt", "c"), ("jane-roe-7.json", "[1]")], "json", "no JSON object"),
        ([("jane-roe-8.jpg", b"1"), ("jane-roe-8.txt", "c")], "json", "the sample has no .json member"),
        ([("jane-roe-9.jpg", b"1"), ("jane-roe-9.json", '{"dx": "\\ud800"}')], "dx", "a NUL or half a character"),
        ([("jane-roe-2.jpg", b"1"), ("jane-roe-2.txt", "c")], "(row)", "its key stands in two places"),
    ]
    good: list[tuple[str, bytes | str]] = [("good.jpg", b"1"), ("good.txt", "c"), ("good.json", '{"dx": "x"}')]
    write_tar(tmp_path / "a.tar", [member for members, _, _ in groups for member in members] + good)
    rows = rows_of(tmp_path, columns={"diagnosis": "dx"})
    for number, (row, (_, field, reason)) in enumerate(zip(rows, groups, strict=False), start=1):
        assert (row.table, row.row, row.field) == ("a.tar", number, field)
        assert row.reason.startswith(reason) and "jane" not in row.reason
    assert len(rows) == 11 and rows[10].caption == "c"


def test_hostile_members(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names are labels and never paths; links and devices are no images; an entry nobody asked for is counted."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, len(content)
            tar.addfile(member, io.BytesIO(content))

        add("folder", tarfile.DIRTYPE)
        add("../../etc/1.jpg", content=b"image")
        add("../../etc/1.txt", content=b"c")
        add("/etc/2.jpg", tarfile.SYMTYPE, "/etc/passwd")
        add("/etc/2.txt", content=b"c")
        add("3.jpg", tarfile.LNKTYPE, "/etc/passwd")
        add("3.txt", content=b"c")
        add("4.jpg", tarfile.CHRTYPE)
        add("._5.jpg", content=b"AppleDouble")
        add("README", content=b"hello")
        add("5.jpg", content=b"five")
        add("5.txt", content=b"c")
    with caplog.at_level(logging.WARNING):
        one, two, three, four, five = rows_of(tmp_path)
    assert (one.image.path, one.image.name, image_of(one)) == (tmp_path / "a.tar", "a.tar/../../etc/1.jpg", b"image")
    for row in (two, three, four):
        assert row.reason == "a member is a link, a device or sparse, not a plain file"
    assert image_of(five) == b"five"
    assert "a.tar: members not looked at: 3 folders, hidden files, names without an extension" in caplog.text


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "a.tar", [("caf?.jpg", b"1"), ("caf?.txt", "c")]).read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("caf\u00e9.jpg", b"1"), ("caf\u00e9.txt", b"c")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert (tmp_path / "a.tar").read_bytes() != content
    (row,) = rows_of(tmp_path)
    assert row.image.name == "a.tar/caf\\udce9.jpg" and image_of(row) == b"1"
    row.image.name.encode()


# ------------------------------------------------------------------------------------------ damaged tars


@pytest.fixture
def three_tars(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"{name}.tar", [member for number in range(5) for member in triple(number)])
    return tmp_path


def outcome(rows: list[Any]) -> list[tuple[str, int, str]]:
    return [(row.table, row.row, "" if isinstance(row, SourceRow) else row.reason) for row in rows]


@pytest.mark.parametrize(
    ("cut", "num_whole"),
    [
        (0, 0),
        (100, 0),  # in the first header
        (512 + 3, 0),  # in the first image
        (2 * 2048 + 512, 2),  # in the third sample, after a header
        (2 * 2048, 2),  # between two samples: the end is missing
        (2 * 2048 + 1024, 2),  # between an image and its caption
        (5 * 2048, 5),  # all there but the end
    ],
)
def test_a_tar_cut_short(three_tars: Path, cut: int, num_whole: int) -> None:
    path = three_tars / "b.tar"
    path.write_bytes(path.read_bytes()[:cut])
    expected = [("a.tar", row, "") for row in range(1, 6)]
    expected += [("b.tar", row, "") for row in range(6, 6 + num_whole)]
    reason = f"corrupt tar: what follows its member {2 * num_whole} cannot be read"
    expected += [("b.tar", 6 + num_whole, reason)]
    expected += [("c.tar", 6 + num_whole + row, "") for row in range(1, 6)]
    assert outcome(rows_of(three_tars)) == expected


@pytest.mark.parametrize("start", [3 * 2048, 3 * 2048 + 100, 3 * 2048 + 1024 + 148])
def test_a_damaged_header(three_tars: Path, start: int) -> None:
    """tarfile takes it for the end of the archive and says nothing."""
    path = three_tars / "b.tar"
    content = bytearray(path.read_bytes())
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)
    rows = rows_of(three_tars)
    assert [row.caption for row in rows[5:8]] == ["Caption 0.", "Caption 1.", "Caption 2."]
    assert rows[8].reason == "corrupt tar: what follows its member 6 cannot be read"
    assert [row.table for row in rows[9:]] == ["c.tar"] * 5


def test_tars_joined_end_to_end(three_tars: Path) -> None:
    """What stands behind an archive's end is read by nobody, and said."""
    path = three_tars / "b.tar"
    path.write_bytes(path.read_bytes() * 2)
    rows = rows_of(three_tars)
    assert rows[10] == Rejection("b.tar", 11, "(row)", "corrupt tar: what follows its member 10 cannot be read")


def test_a_negative_size_does_not_go_round_and_round(three_tars: Path) -> None:
    member = tarfile.TarInfo("1.jpg")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256: -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (three_tars / "b.tar").write_bytes(bytes(header) * 4 + bytes(10240))
    rows = rows_of(three_tars)
    assert rows[5].reason == "corrupt tar: what follows its member 0 cannot be read"
    assert len(rows) == 11


def test_random_damage_never_raises(tmp_path: Path) -> None:
    rng = random.Random(7)
    members = [member for number in range(6) for member in [*triple(number), (f"{number}.json", '{"dx": "nevus"}')]]
    whole = {}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = [("n" * 120 + "\u76ae" + name, content) for name, content in members]
        whole[form] = write_tar(tmp_path / "good.tar", long, form).read_bytes()
    for _ in range(300):
        content = bytearray(rng.choice(list(whole.values())))
        for _ in range(rng.choice((1, 3, 30))):
            place = rng.randrange(len(content))
            content[place : place + rng.choice((1, 8, 600))] = rng.randbytes(rng.choice((1, 8, 600)))
        (tmp_path / "bad.tar").write_bytes(content)
        rows = rows_of(tmp_path, needs_caption=False, columns={"diagnosis": "dx"})
        assert sum(row.table == "good.tar" and isinstance(row, SourceRow) for row in rows) == 6
        for row in rows:
            if isinstance(row, SourceRow):
                assert len(image_of(row)) == row.image.num_bytes


# ------------------------------------------------------------------------------------------ configuration


def test_wrong_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder; correct source\.tar_dir"):
        rows_of(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no file matches '\*\.tar'"):
        rows_of(tmp_path)
    content = write_tar(tmp_path / "x", triple(1)).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match="compressed tars have to be unpacked"):
        rows_of(tmp_path)
    (tmp_path / "b.tar").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=r"b\.tar: a compressed tar.*gunzip"):
        rows_of(tmp_path)
    with pytest.raises(InputError, match="no file matches"):
        rows_of(tmp_path, pattern="../*")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"caption": "text"}}, "no field 'caption'"),
        ({"columns": {"diagnosis": "dx.cod"}}, r"no column 'dx\.cod' \(mapped to columns\.diagnosis\).*'dx\.code'"),
        ({"json_is_sample": True, "columns": {"diagnosis": "dx"}}, "json_is_sample"),
        ({"caption_template": ["{diagnosis}."]}, "set columns.diagnosis"),
    ],
)
def test_wrong_configurations(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_tar(tmp_path / "a.tar", [*triple(1), ("1.json", '{"dx": {"code": 1}}')])
    with pytest.raises(InputError, match=message):
        rows_of(tmp_path, **keys)


def test_the_shipped_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"label": "nevus", "patient": {"age": 45, "sex": "male", "id": "p1"}}
    write_tar(tmp_path / "a.tar", [*triple(1), ("1.json", json.dumps(value))])
    monkeypatch.setenv("TARS", str(tmp_path))
    (row,) = open_source(load_config(CONFIGS / "webdataset.yaml", [], PrepareConfig).source).rows()
    assert isinstance(row, SourceRow)
    assert (row.diagnosis, row.group, row.demographics.age_band, row.licence) == ("nevus", "p1", "40-49", "CC-BY-4.0")
