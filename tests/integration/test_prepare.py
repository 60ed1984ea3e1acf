"""From a source to shards: nothing lost, nothing leaked, groups on one side."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import random
from pathlib import Path

import pytest
from PIL import Image

from data_prep.config import PrepareConfig, TableSource
from data_prep.errors import InputError
from data_prep.prepare import assign_split, prepare
from data_prep.schema import Aspect
from data_prep.sources import open_source
from data_prep.sources.base import SourceRow
from pretrain.data.manifest import ShardedDataset
from tests.integration.tables import contents, plain_rows, samples, table_config, write_image, write_table

SALT = "a secret of these tests"


@pytest.fixture(autouse=True)
def salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMVLP_SALT", SALT)


# ---------------------------------------------------------------------------------------------- nothing is lost


def test_every_row_is_a_sample_or_a_line_of_the_ledger(tmp_path: Path) -> None:
    rows = plain_rows(9)
    rows[1]["text"] = ". . . -"  # no words
    rows[2]["text"] = ""
    write_table(tmp_path, rows)
    (tmp_path / "img" / "scan003.png").unlink()
    (tmp_path / "img" / "scan004.png").write_bytes(b"")
    content = (tmp_path / "img" / "scan005.png").read_bytes()
    (tmp_path / "img" / "scan005.png").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (40, 20)).save(tmp_path / "img" / "scan006.png")
    with (tmp_path / "t.csv").open("a", encoding="utf-8") as file:
        file.write("one,field,too many\n")
    manifest = prepare(table_config(tmp_path, samples_per_shard=4))["train"]

    with (tmp_path / "out" / "train" / "rejected.csv").open(encoding="utf-8", newline="") as file:
        ledger = {int(row["row"]): row for row in csv.DictReader(file)}
    assert {row: (line["table"], line["field"]) for row, line in ledger.items()} == {
        2: ("t.csv", "caption.text"),
        3: ("t.csv", "text"),
        4: ("t.csv", "file"),
        5: ("t.csv", "image"),
        6: ("t.csv", "image"),
        7: ("t.csv", "image"),
        10: ("t.csv", "(row)"),
    }
    assert ledger[2]["reason"] == "a caption must contain words"
    assert ledger[5]["reason"] == "empty file"
    assert ledger[6]["reason"] == "truncated or corrupt image data"
    assert ledger[7]["reason"] == "40 x 20 px: shorter side below 32 px"
    assert (manifest.num_samples, manifest.num_rejected) == (3, 7)
    assert [sample.key for sample in samples(tmp_path / "out" / "train")] == [f"set-00000000{row}" for row in (1, 8, 9)]


def test_a_split_without_a_sample_keeps_its_ledger_and_loses_its_old_shards(tmp_path: Path) -> None:
    write_table(tmp_path, plain_rows(6, part=lambda i: "val" if i > 3 else "train"))
    config = table_config(tmp_path, {"split": "part"})
    assert set(prepare(config)) == {"train", "val"}
    for name in ("scan004.png", "scan005.png"):
        (tmp_path / "img" / name).write_bytes(b"")
    assert set(prepare(config)) == {"train"}
    val_dir = tmp_path / "out" / "val"
    assert sorted(path.name for path in val_dir.iterdir()) == ["rejected.csv", "shard-000000.json"]
    assert [
        line.split(",")[1:] for line in (val_dir / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
    ] == [
        ["5", "image", "empty file"],
        ["6", "image", "empty file"],
    ]


def test_nothing_usable_is_an_input_error_that_names_the_ledger(tmp_path: Path) -> None:
    write_table(tmp_path, plain_rows(2))
    for name in ("scan000.png", "scan001.png"):
        (tmp_path / "img" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"no row became a training sample; .*'empty file': 2.*train/rejected.csv"):
        prepare(table_config(tmp_path))
    assert (tmp_path / "out" / "train" / "rejected.csv").read_text(encoding="utf-8").count("empty file") == 2
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_captions_of_a_sample(tmp_path: Path) -> None:
    """The path that a source gives is put into the ontology's words; a label without a path is looked up."""
    ontology = {
        "root": ["Inflammatory"],
        "Inflammatory": ["Ulcers, ulcer", "Eczema"],
        "Ulcers, ulcer": [],
        "Eczema": [],
    }
    (tmp_path / "o.json").write_text(json.dumps(ontology), encoding="utf-8")
    header = "filename,caption,disease_label,hierarchical_disease_label,skin_concept,body_location,age,gender"
    lines = [
        'a.png,A sore.,ulcer,"inflammatory, ulcers, ulcer","Erythema, crust",Leg,60,female',
        "b.png,A rash.,eczema,,No visual concepts,No body location information,No age information,male",
        "c.png,A spot.,no definitive diagnosis,,No visual concepts,,,",
    ]
    (tmp_path / "t.csv").write_text("\n".join([header, *lines]), encoding="utf-8")
    (tmp_path / "img").mkdir()
    for number, name in enumerate("abc"):
        write_image(tmp_path / "img" / f"{name}.png", number)
    source = {"kind": "derm1m", "train_csv_path": tmp_path / "t.csv", "image_dir": tmp_path / "img"}
    prepare(table_config(tmp_path, source=source, ontology_path=tmp_path / "o.json"))
    ulcer, eczema, spot = samples(tmp_path / "out" / "train")
    assert ulcer.diagnosis_path == ("inflammatory", "ulcers")
    assert eczema.diagnosis_path == ("inflammatory", "eczema")
    assert (spot.diagnosis, spot.diagnosis_path) == (None, ())
    by_aspect = {caption.aspect: caption.text for caption in ulcer.captions}
    assert by_aspect[Aspect.CAPTION] == "A sore."
    assert by_aspect[Aspect.DIAGNOSIS] == "This is a skin image diagnosed as inflammatory, ulcer."
    assert by_aspect[Aspect.VISUAL_CONCEPTS] == "This skin image shows erythema, crust."
    assert (ulcer.demographics.age_years, ulcer.demographics.sex, ulcer.body_site) == (60, "female", "leg")
    assert {caption.aspect for caption in spot.captions} & {Aspect.DIAGNOSIS, Aspect.VISUAL_CONCEPTS} == set()
    assert ulcer.image_sha256 == hashlib.sha256(ShardedDataset(tmp_path / "out" / "train").read_image(0)).hexdigest()


# ---------------------------------------------------------------------------------------------- nothing is leaked


def test_group_ids_file_names_and_exif_are_in_no_byte(tmp_path: Path) -> None:
    rows = plain_rows(24, patient=lambda i: f"MRN-55{i // 3:04d}")
    for i, row in enumerate(rows):
        row["file"] = f"Muster_Erika_{i:02d}.jpg"
    exif = Image.Exif()
    exif[0x010E] = "Erika Muster, 1971-02-03"  # ImageDescription
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 12.0, 34.5), 29: "2024:01:02"})
    (tmp_path / "img").mkdir()
    for i, row in enumerate(rows):
        write_image(tmp_path / "img" / row["file"], i, format="JPEG", exif=exif, comment=b"taken by Dr Geheim")
    assert b"Erika Muster" in (tmp_path / "img" / "Muster_Erika_00.jpg").read_bytes()  # there to be found
    write_table(tmp_path, rows)
    (tmp_path / "img" / "Muster_Erika_05.jpg").write_bytes(b"no image")
    manifests = prepare(table_config(tmp_path, {"group": "patient"}, val_fraction=0.3, samples_per_shard=5))
    assert manifests["train"].num_rejected + manifests["val"].num_rejected == 1

    secrets = (b"MRN-55", b"Muster", b"Erika", b"Geheim", b"2024:01:02", b"Exif", b"GPS")
    written = contents(tmp_path / "out")
    assert len(written) > 10
    for name, content in written.items():
        for secret in secrets:
            assert secret.lower() not in content.lower() and secret not in name.encode(), (secret, name)

    groups: dict[str, set[str]] = {}  # hash -> patients
    for split in ("train", "val"):
        for sample in samples(tmp_path / "out" / split):
            number = int(sample.key.rpartition("-")[2])
            groups.setdefault(sample.group, set()).add(rows[number - 1]["patient"])
    assert len(groups) == 8 and all(len(patients) == 1 for patients in groups.values())
    assert len(set.union(*groups.values())) == 8  # equal ids, equal hashes; others, others


def test_group_hashes_depend_on_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path, plain_rows(2, patient=lambda i: "P1"))
    config = table_config(tmp_path, {"group": "patient"})

    def group() -> str:
        prepare(config)
        (hashed,) = {sample.group for sample in samples(tmp_path / "out" / "train")}
        return str(hashed)

    first = group()
    assert group() == first
    monkeypatch.setenv("DERMVLP_SALT", "another")
    assert group() != first
    monkeypatch.delenv("DERMVLP_SALT")
    own = group()
    assert own not in (first, hashlib.blake2b(b"set/P1", digest_size=8).hexdigest())
    secret = tmp_path / "out" / ".salt"
    assert secret.stat().st_mode & 0o077 == 0 and len(secret.read_text(encoding="utf-8")) == 32
    assert group() == own  # made once, kept
    monkeypatch.setenv("DERMVLP_SALT", "")
    with pytest.raises(InputError, match="DERMVLP_SALT: set but empty"):
        prepare(config)


# ---------------------------------------------------------------------------------------------- splits


def splits(config: PrepareConfig) -> dict[tuple[str | None, str], str]:
    rows = [row for row in open_source(config.source).rows() if isinstance(row, SourceRow)]
    return {(row.group, row.caption or ""): assign_split(config, row) for row in rows}


def test_groups_stay_on_one_side_and_where_they_were(tmp_path: Path) -> None:
    rows = plain_rows(400, patient=lambda i: f"P{i // 2}" if i < 200 else "")
    write_table(tmp_path, rows[:300])
    config = table_config(tmp_path, {"group": "patient"}, val_fraction=0.2)
    first = splits(config)
    sides: dict[str, set[str]] = {}
    for (group, _), split in first.items():
        if group is not None:
            sides.setdefault(group, set()).add(split)
    assert len(sides) == 100 and all(len(side) == 1 for side in sides.values())
    assert 0.1 < sum(split == "val" for split in first.values()) / 300 < 0.3

    random.Random(0).shuffle(rows)  # rows are added, and all stand elsewhere
    write_table(tmp_path, rows)
    later = splits(config)
    assert len(later) == 400 and {key: later[key] for key in first} == first
    more = splits(config.model_copy(update={"val_fraction": 0.4}))
    assert {key for key, split in later.items() if split == "val"} < {k for k, split in more.items() if split == "val"}

    (tmp_path / "img").rename(tmp_path / "moved")  # without a group the image's name decides, not the folder
    assert isinstance(config.source, TableSource)
    source = config.source.model_copy(update={"image_dir": tmp_path / "moved"})
    assert splits(config.model_copy(update={"source": source})) == later


def test_a_source_that_splits_a_group_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = plain_rows(6, patient=lambda i: f"MRN{i // 2}", part=lambda i: "val" if i in (1, 4, 5) else "train")
    write_table(tmp_path, rows)
    with caplog.at_level(logging.WARNING):
        prepare(table_config(tmp_path, {"group": "patient", "split": "part"}))
    (record,) = caplog.records
    assert "1 of 3 groups" in record.getMessage() and "MRN" not in record.getMessage()
