"""Folders, tars, shards, and tables as the peers publish them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.salt import hash_group
from pretrain.data.manifest import ShardedDataset
from pretrain.evaluation.datasets import open_data
from tests.unit.evaluation.dataset_files import describe, reasons, write_image, write_table, write_tar


@pytest.fixture(autouse=True)
def _salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMVLP_SALT", "a secret")


def test_folders_of_classes(tmp_path: Path) -> None:
    for name in ("test/Basal_Cell_Carcinoma/1.jpg", "test/nevus/deeper/2.png", "train/nevus/3.png", "test/4.png"):
        write_image(tmp_path / name)
    (tmp_path / "test" / "nevus" / "notes.txt").write_text("x")
    source = {"kind": "folder", "image_dir": str(tmp_path), "levels": ["split", "label"]}
    description = {"name": "tree", "source": source, "classnames": ["nevus", "basal cell carcinoma"]}
    data = open_data(describe(tmp_path / "d.yaml", description))
    assert [(row.label, row.is_train) for row in data.rows] == [
        ("basal cell carcinoma", False),
        ("nevus", False),
        ("nevus", True),
    ]
    assert {reason for _, _, reason in reasons(data)} == {
        "not an image by its ending",
        "the file lies above the folders that source.levels names",
    }
    assert all("nevus" not in row.key for row in data.rows)


def test_a_bare_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "classes" / "nevus" / "1.png")
    write_image(tmp_path / "classes" / "melanoma" / "2.png")
    assert [row.label for row in open_data(tmp_path / "classes").rows] == ["melanoma", "nevus"]
    write_image(tmp_path / "classes" / "3.png")
    flat = open_data(str(tmp_path / "classes"))
    assert (flat.classnames, len(flat.rows), flat.name) == ((), 3, "classes")
    write_image(tmp_path / "split" / "train" / "wart" / "1.png")
    write_image(tmp_path / "split" / "test" / "wart" / "2.png")
    assert [(row.label, row.is_train) for row in open_data(tmp_path / "split").rows] == [
        ("wart", False),
        ("wart", True),
    ]
    (tmp_path / "nothing" / "val").mkdir(parents=True)
    (tmp_path / "nothing" / "val" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"no image, no tar and no manifest.json here; its splits are val: name one"):
        open_data(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no such file or folder; ready descriptions are in configs/eval/datasets"):
        open_data(tmp_path / "away")


def test_tars(tmp_path: Path) -> None:
    image = write_image(tmp_path / "x.jpg", 3)
    facts = {"dx": "nv", "patient": {"id": "P1", "age": 33}, "captions": ["One.", "Two, three."]}
    members = {"a/1.jpg": image, "a/1.txt": b"A nevus.", "a/1.json": json.dumps(facts).encode(), "b.txt": b"no image"}
    write_tar(tmp_path / "part-0.tar", members)
    columns = {"label": "dx", "patient": "patient.id", "age": "patient.age", "text_list": "captions"}
    source = {"kind": "webdataset", "tar_dir": str(tmp_path), "columns": columns}
    data = open_data(describe(tmp_path / "d.yaml", {"name": "tars", "source": source, "labels": {"nv": "nevus"}}))
    (row,) = data.rows
    assert (row.label, row.texts) == ("nevus", ("A nevus.", "One.", "Two, three."))
    assert row.patient == hash_group("tars", "P1", "a secret")
    assert row.attributes == {"age_band": "30-39"}
    assert data.read_image(0) == image
    assert reasons(data) == [("2", "image", "no member is an image by its extension")]
    for bare in (tmp_path, tmp_path / "part-*.tar", tmp_path / "part-0.tar"):
        assert [row.texts for row in open_data(bare).rows] == [("A nevus.",)]
    assert pickle.loads(pickle.dumps(open_data(tmp_path))).read_image(0) == image


def test_shards_of_ours(prepared_dir: Path) -> None:
    shards = ShardedDataset(prepared_dir / "val")
    data = open_data(prepared_dir / "val")
    assert len(data.rows) == len(shards)
    assert data.rejected == ()
    for position in (0, 7, len(shards) - 1):
        sample, row = shards.read_sample(position), data.rows[position]
        assert (row.key, row.label, row.texts) == (sample.key, sample.diagnosis, (sample.caption,))
        assert (row.patient, row.diagnosis_path, row.licence) == (sample.group, sample.diagnosis_path, sample.licence)
        assert set(row.concepts or ()) == set(sample.concepts)
        assert data.read_image(position) == shards.read_image(position)
    assert set(data.classnames) == set(shards.manifest.samples_by_diagnosis) - {"unknown"}
    again = pickle.loads(pickle.dumps(data))
    assert again.read_image(3) == shards.read_image(3)


# ---------------------------------------------------------------------------------------------- the peers' tables


def test_tables_as_the_peers_publish_them(tmp_path: Path) -> None:
    """Their columns: DermFM-Zero image_path, label, diag; PanDerm image, label, split; MAKE filename, caption."""
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "images" / name)
    zero_shot = [
        {"image_path": "images/a.png", "label": "1", "diag": "nevus"},
        {"image_path": "images/b.png", "label": "0", "diag": "melanoma"},
        {"image_path": "images/c.png", "label": "1", "diag": "nevus"},
    ]
    data = open_data(write_table(tmp_path / "zero-shot.csv", zero_shot))
    assert (data.name, data.classnames) == ("zero-shot", ("melanoma", "nevus"))
    assert [row.label for row in data.rows] == ["nevus", "melanoma", "nevus"]

    probe = [
        {"image": "a.png", "label": "0", "split": "train"},
        {"image": "b.png", "label": "1", "split": "val"},
        {"image": "c.png", "label": "1", "split": "test"},
    ]
    table = write_table(tmp_path / "probe.csv", probe)
    data = open_data(table, [f"source.image_dir={tmp_path / 'images'}"])
    assert [(row.label, row.is_train) for row in data.rows] == [("0", True), ("1", False)]
    assert any("classes are numbers" in note for note in data.notes)
    named = ["classnames=[nevus, wart]", "labels_are=positions", f"source.image_dir={tmp_path / 'images'}"]
    assert [row.label for row in open_data(table, named).rows] == ["nevus", "wart"]

    captions = [{"filename": "/VL_Data/x/a.png", "caption": "A nevus."}]
    table = write_table(tmp_path / "captions.csv", captions)
    assert open_data(table, ["source.images_by=name"]).rows[0].texts == ("A nevus.",)
    with pytest.raises(InputError, match=r"leads out of the image folder \(1 rows\); source.images_by=name finds"):
        open_data(table)

    conflict = [zero_shot[0], zero_shot[1] | {"label": "1"}]
    with pytest.raises(InputError, match=r"conflict.csv: row 2: one label, two names in diag"):
        open_data(write_table(tmp_path / "conflict.csv", conflict))
    with pytest.raises(InputError, match=r"no column image_path or filename .*Columns: x"):
        open_data(write_table(tmp_path / "other.csv", [{"x": "1"}]))
