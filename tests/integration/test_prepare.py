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

from data_prep.errors import InputError
from data_prep.prepare import prepare
from data_prep.schema import Aspect
from data_prep.shards.manifest import verify
from pretrain.data.manifest import ShardedDataset
from tests.integration.tables import contents, plain_rows, published, samples, table_config, write_image, write_table

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

    with (tmp_path / "out" / "rejected.csv").open(encoding="utf-8", newline="") as file:
        ledger = {int(row["row"]): row for row in csv.DictReader(file)}
    assert {row: (line["table"], line["field"]) for row, line in ledger.items()} == {
        2: ("t.csv", "text"),
        3: ("t.csv", "text"),
        4: ("t.csv", "image"),
        5: ("t.csv", "image"),
        6: ("t.csv", "image"),
        7: ("t.csv", "image"),
        10: ("t.csv", "(row)"),
    }
    assert ledger[2]["reason"] == ledger[3]["reason"] == "no caption"
    assert ledger[4]["reason"] == "no such image file"
    assert ledger[5]["reason"] == "empty file"
    assert ledger[6]["reason"] == "truncated or corrupt image data"
    assert ledger[7]["reason"] == "40 x 20 px: shorter side below 32 px"
    assert (manifest.num_samples, manifest.num_rejected) == (3, 7)
    assert [sample.key for sample in samples(tmp_path / "out" / "train")] == [f"set-00000000{row}" for row in (1, 8, 9)]


def test_a_split_without_a_sample_loses_its_old_shards(tmp_path: Path) -> None:
    write_table(tmp_path, plain_rows(6, part=lambda i: "val" if i > 3 else "train"))
    config = table_config(tmp_path, {"split": "part"})
    assert set(prepare(config)) == {"train", "val"}
    for name in ("scan004.png", "scan005.png"):
        (tmp_path / "img" / name).write_bytes(b"")
    assert set(prepare(config)) == {"train"}
    assert list((tmp_path / "out" / "val").iterdir()) == []
    lines = (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [line.split(",")[1:] for line in lines] == [["5", "image", "empty file"], ["6", "image", "empty file"]]


def test_nothing_usable_is_an_input_error_that_names_the_ledger(tmp_path: Path) -> None:
    write_table(tmp_path, plain_rows(2))
    for name in ("scan000.png", "scan001.png"):
        (tmp_path / "img" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"no row became a training sample; .*'empty file': 2.*work/rejected.csv"):
        prepare(table_config(tmp_path))
    assert (tmp_path / "out" / "work" / "rejected.csv").read_text(encoding="utf-8").count("empty file") == 2
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
    header = "filename,caption,source,disease_label,hierarchical_disease_label,skin_concept,body_location,age,gender"
    lines = [
        'a.png,A sore.,edu,ulcer,"inflammatory, ulcers, ulcer","Erythema, crust",Leg,60,female',
        "b.png,A rash.,edu,eczema,,No visual concepts,No body location information,No age information,male",
        "c.png,A spot.,edu,no definitive diagnosis,,No visual concepts,,,",
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
    assert manifests["train"].num_rejected == manifests["val"].num_rejected == 1

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

    def group(out: str) -> str:
        prepare(table_config(tmp_path, {"group": "patient"}, out_dir=tmp_path / out))
        (hashed,) = {sample.group for sample in samples(tmp_path / out / "train")}
        return str(hashed)

    first = group("out")
    assert group("out") == first == group("again")
    monkeypatch.setenv("DERMVLP_SALT", "another")
    before = published(tmp_path / "out")
    with pytest.raises(InputError, match="out/work: made with another salt; export the DERMVLP_SALT"):
        group("out")
    assert published(tmp_path / "out") == before
    assert group("other") != first
    monkeypatch.delenv("DERMVLP_SALT")
    own = group("own")
    assert own not in (first, hashlib.blake2b(b"set/P1", digest_size=8).hexdigest())
    secret = tmp_path / "own" / "work" / "salt"
    assert secret.stat().st_mode & 0o077 == 0 and len(secret.read_text(encoding="utf-8")) == 32
    assert group("own") == own  # made once, kept
    monkeypatch.setenv("DERMVLP_SALT", "")
    with pytest.raises(InputError, match="DERMVLP_SALT: set but empty"):
        group("own")


# ---------------------------------------------------------------------------------------------- splits


def sides(out_dir: Path) -> dict[str, str]:
    """Caption -> split."""
    return {sample.caption: split for split in ("train", "val") for sample in samples(out_dir / split)}


def test_groups_stay_on_one_side_and_where_they_were(tmp_path: Path) -> None:
    rows = plain_rows(120, patient=lambda i: f"P{i // 2}" if i < 80 else "", dx=lambda i: ("acne", "eczema")[i % 2])
    write_table(tmp_path, rows[:90])
    config = table_config(tmp_path, {"group": "patient", "diagnosis": "dx"}, val_fraction=0.2)
    prepare(config)
    first = sides(tmp_path / "out")
    of_patient: dict[str, set[str]] = {}
    for row in rows[:80]:
        of_patient.setdefault(row["patient"], set()).add(first[row["text"]])
    assert len(of_patient) == 40 and all(len(side) == 1 for side in of_patient.values())
    assert 0.15 < sum(split == "val" for split in first.values()) / 90 < 0.25

    random.Random(0).shuffle(rows)  # rows are added, and all stand elsewhere
    (tmp_path / "t.csv").unlink()
    write_table(tmp_path, rows)
    with pytest.raises(InputError, match=r"30 row\(s\) new or changed"):
        prepare(config)
    prepare(config, accept_changes=True)
    later = sides(tmp_path / "out")
    assert len(later) == 120 and {caption: later[caption] for caption in first} == first
    assert 0.15 < sum(split == "val" for split in later.values()) / 120 < 0.25
    prepare(config.model_copy(update={"val_fraction": 0.4}))  # what was decided stays: it is for rows to come
    assert sides(tmp_path / "out") == later


def test_a_group_on_both_sides_of_the_sources_own_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = plain_rows(6, patient=lambda i: f"MRN{i // 2}", part=lambda i: "val" if i in (1, 4, 5) else "train")
    write_table(tmp_path, rows)
    columns = {"group": "patient", "split": "part"}
    assert {s: m.num_samples for s, m in prepare(table_config(tmp_path, columns)).items()} == {"train": 2, "val": 3}
    ledger = (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert ledger == ["t.csv,1,group,leakage: its group is also in val"]
    with pytest.raises(InputError, match=r"1 training rows are also in .*; the pairs of images are in .*duplicates"):
        prepare(table_config(tmp_path, columns, duplicates={"leakage": "fail"}))
    with caplog.at_level(logging.WARNING):
        manifests = prepare(table_config(tmp_path, columns, duplicates={"leakage": "keep"}))
    assert {split: manifest.num_samples for split, manifest in manifests.items()} == {"train": 3, "val": 3}
    (record,) = caplog.records
    assert "1 share a group with val" in record.getMessage() and "MRN" not in record.getMessage()


def test_evaluation_sets_are_kept_out_of_training(tmp_path: Path) -> None:
    """A folder of images, one of them a re-encoded copy of ours, and a split that was prepared before."""
    write_table(tmp_path, plain_rows(8))
    judged = tmp_path / "judged" / "deep"
    judged.mkdir(parents=True)
    smooth = Image.effect_mandelbrot((90, 80), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    smooth.save(tmp_path / "img" / "scan003.png")
    smooth.resize((180, 160)).save(judged / "Muster_Erika.JPG", format="JPEG", quality=70)
    (judged / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "other" / "img").mkdir(parents=True)
    (tmp_path / "img" / "scan005.png").rename(tmp_path / "other" / "img" / "scan000.png")
    write_table(tmp_path / "other", plain_rows(3))
    (tmp_path / "img" / "scan005.png").write_bytes((tmp_path / "other" / "img" / "scan000.png").read_bytes())
    for number in (0, 1, 2):
        if number:
            write_image(tmp_path / "other" / "img" / f"scan00{number}.png", 50 + number)
    prepare(table_config(tmp_path / "other"))
    sets = [
        {"name": "folder", "path": tmp_path / "judged"},
        {"name": "prepared", "path": tmp_path / "other" / "out" / "train"},
    ]
    config = table_config(tmp_path, duplicates={"against": sets})
    assert prepare(config)["train"].num_samples == 6
    ledger = (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert ledger == [
        't.csv,4,image,"leakage: its image, or a near copy, is in the evaluation set folder"',
        't.csv,6,image,"leakage: its image, or a near copy, is in the evaluation set prepared"',
    ]
    page = (tmp_path / "out" / "duplicates.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 4 and "Muster" not in page and "scan00" not in page
    verify(tmp_path / "out" / "train")
    for wrong, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "out" / "val", "no image here")):
        with pytest.raises(InputError, match=f"duplicates.against: folder: .*{message}"):
            prepare(table_config(tmp_path, duplicates={"against": [{"name": "folder", "path": wrong}]}))
