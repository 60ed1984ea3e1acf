"""The descriptions in configs/eval/datasets: on rows in each set's published layout, and on real tables."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config_file import load_config
from pretrain.evaluation.datasets import open_data
from pretrain.evaluation.datasets.description import EvalDataConfig
from pretrain.evaluation.methods.zero_shot import build_classifier
from pretrain.prompts import load_templates
from tests.unit.evaluation.dataset_files import write_image, write_table

READY = Path(__file__).parents[3] / "configs" / "eval" / "datasets"
TEMPLATES_PATH = READY.parent / "templates.json"
NAMES = sorted(path.stem for path in READY.glob("*.yaml"))


@pytest.fixture
def data_dir() -> Path:
    if "DERMVLP_DATA" not in os.environ:
        pytest.skip("DERMVLP_DATA is unset: no real data")
    return Path(os.environ["DERMVLP_DATA"])


def ready(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The description, with its folder of images here."""
    path = READY / f"{name}.yaml"
    (variable,) = set(re.findall(r"\$\{(\w+)\}", path.read_text(encoding="utf-8")))
    monkeypatch.setenv(variable, str(folder))
    return path


#: name -> (table, a row of it in the published columns, its image, class, attributes)
PUBLISHED: dict[str, tuple[str, dict[str, str], str, str, dict[str, str]]] = {
    "ham10000": (
        "HAM10000_metadata.csv",
        {
            "lesion_id": "L1",
            "image_id": "ISIC_1",
            "dx": "bkl",
            "dx_type": "histo",
            "age": "80.0",
            "sex": "male",
            "localization": "scalp",
        },
        "HAM10000_images_part_1/ISIC_1.jpg",
        "benign keratosis",
        {"age_band": "80-89", "sex": "male", "body_site": "scalp"},
    ),
    "pad_ufes_20": (
        "metadata.csv",
        dict(
            *[
                {
                    "patient_id": "PAT_1",
                    "lesion_id": "2",
                    "age": "8",
                    "gender": "",
                    "fitspatrick": "3.0",
                    "region": "ARM",
                }
            ],
            diagnostic="NEV",
            img_id="PAT_1_2_3.png",
            biopsed="False",
        ),
        "imgs_part_2/PAT_1_2_3.png",
        "nevus",
        {"age_band": "0-9", "fitzpatrick": "III", "body_site": "arm"},
    ),
    "isic2020": (
        "ISIC_2020_Training_GroundTruth.csv",
        {
            "image_name": "ISIC_2",
            "patient_id": "IP_1",
            "sex": "female",
            "age_approx": "45.0",
            "anatom_site_general_challenge": "head/neck",
            "diagnosis": "unknown",
            "benign_malignant": "benign",
            "target": "0",
        },
        "train/ISIC_2.jpg",
        "benign",
        {"sex": "female", "age_band": "40-49", "body_site": "head/neck"},
    ),
    "fitzpatrick17k": (
        "fitzpatrick17k.csv",
        {
            "md5hash": "5e82",
            "fitzpatrick_scale": "6",
            "fitzpatrick_centaur": "-1",
            "label": "dariers disease",
            "nine_partition_label": "genodermatoses",
            "three_partition_label": "non-neoplastic",
            "qc": "",
            "url": "",
        },
        "images/5e82.jpg",
        "dariers disease",
        {"fitzpatrick": "VI"},
    ),
    "snu_134": (
        "snu-134-zero-shot-test.csv",
        {"image_path": "/home/them/images/otanevus_7.jpg", "label": "2", "diag": "ota nevus"},
        "images/otanevus_7.jpg",
        "ota nevus",
        {},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_columns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, row, image, label, attributes = PUBLISHED[name]
    write_table(tmp_path / table, [row])
    write_image(tmp_path / image)
    data = open_data(ready(name, tmp_path, monkeypatch))
    (found,) = data.rows
    assert (found.label, dict(found.attributes or {})) == (label, attributes)
    assert (found.patient is None) == (name in ("fitzpatrick17k", "snu_134"))
    if name == "fitzpatrick17k":
        assert found.diagnosis_path == ("non-neoplastic", "genodermatoses", "dariers disease")


@pytest.mark.parametrize(
    ("name", "folder", "label"),
    [
        ("daffodil", "SJS-TEN", "SJS/TEN"),
        ("daffodil", "Nail_psoriasis", "nail psoriasis"),
        ("sd_128", "Actinic_solar_Damage(Actinic_Keratosis)", "actinic solar damage(actinic keratosis)"),
        ("sd_128", "Beau's_Lines", "beau's lines"),
        ("dermnet", "test/Acne and Rosacea Photos", "acne and rosacea photos"),
    ],
)
def test_published_folders(name: str, folder: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / folder / "1.jpg")
    assert [row.label for row in open_data(ready(name, tmp_path, monkeypatch)).rows] == [label]


def test_ph2_by_the_command_in_its_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "|| Name   ||   Histological Diagnosis || Clinical Diagnosis || Asymmetry | Dots ||  Colors   ||",
        "|| IMD003 ||                          ||                  0 || 0 |  AT |  A || 3          ||",
        "|| IMD002 ||                          ||                  1 || 0 |   T |  P || 3  5       ||",
        "|| IMD058 ||               Melanoma   ||                  2 || 2 |  AT |  A || 1  5  6    ||",
        "Legends:",
    ]
    (tmp_path / "PH2_dataset.txt").write_text("\n".join(lines))
    (command,) = re.findall(r"^#   (\(echo .*)$", (READY / "ph2.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    for name in ("IMD003", "IMD002", "IMD058"):
        write_image(tmp_path / "PH2 Dataset images" / name / f"{name}_Dermoscopic_Image" / f"{name}.bmp")
        write_image(tmp_path / "PH2 Dataset images" / name / f"{name}_lesion" / f"{name}_lesion.bmp")
    data = open_data(ready("ph2", tmp_path, monkeypatch))
    assert [row.label for row in data.rows] == ["benign", "benign", "malignant"]


@pytest.mark.parametrize("name", ["daffodil", "ham10000", "isic2020", "pad_ufes_20", "ph2", "sd_128"])
def test_peers_overrides_of_each_description_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comment at its head says one gives for the peers' table."""
    path = ready(name, tmp_path, monkeypatch)
    text = " ".join(line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    given = re.search(r'(source(?:\.table_path)?="?\S.*? labels_are=positions)', text)
    assert given is not None
    table = re.search(r"[\w-]+-test\.csv", given[1])
    assert table is not None
    write_table(tmp_path / table[0], [{"image_path": "/home/them/x.jpg", "label": "1", "diag": "?"}])
    write_image(tmp_path / "y" / "x.jpg")
    arguments = re.findall(r'(\w[\w.]*=(?:"[^"]*"|\S+))', given[1])
    overrides = [
        argument.replace('"', "").replace(table[0], str(tmp_path / table[0])).replace("...", str(tmp_path))
        for argument in arguments
    ]
    data = open_data(path, overrides)
    assert data.rows[0].label == load_config(path, [], EvalDataConfig).classnames[1]


def test_the_documented_description_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (READY.parents[2] / "docs" / "evaluation_data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "clinic.yaml").write_text(example, encoding="utf-8")
    row = {"file": "a.jpg", "dx": "MEL", "caption": "A.", "second_caption": "", "patient_id": "1", "skin_type": "IV"}
    row |= {"sex": "m", "age": "50", "site": "torso", "hospital": "h", "scale": "1", "crust": "", "group": "g"}
    row |= {"disease": "d", "part": "test", "licence": "", "q": "?", "a": "x", "b": "y", "c": "z", "d": "w"}
    write_table(tmp_path / "cases.csv", [row | {"right": "C", "topic": "t"}])
    write_image(tmp_path / "a.jpg")
    monkeypatch.setenv("CLINIC", str(tmp_path))
    (found,) = open_data(tmp_path / "clinic.yaml").rows
    assert (found.label, found.licence) == ("melanoma", "CC-BY-4.0")
    assert found.question is not None
    assert found.question.answer == 2
    assert (found.attributes or {})["body_site"] == "trunk"


def test_descriptions_have_what_prompts_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(NAMES) == 11
    templates = load_templates(TEMPLATES_PATH, "peers")
    assert len(templates) == 8
    for name in NAMES:
        config = load_config(ready(name, tmp_path, monkeypatch), [], EvalDataConfig)
        assert config.name == name
        if config.classnames:
            build_classifier(lambda texts: np.ones((len(texts), 1)), config.classnames, templates)


# ---------------------------------------------------------------------------------------------- real data


PEERS = {
    "ham10000": "DermFM-Zero/HAM_CLASSNAMES",
    "pad_ufes_20": "Derm1M/PAD_CLASSNAMES",
    "isic2020": "DermFM-Zero/ISIC20_CLASSNAMES",
    "ph2": "DermFM-Zero/PH2_CLASSNAMES",
    "daffodil": "Derm1M/DAFFODIL_5_CLASSNAMES",
    "sd_128": "MAKE/SD_128_CLASSNAMES",
    "snu_134": "MAKE/SNU_134_CLASSNAMES",
    "fitzpatrick17k": "MAKE/F17K_DISEASE_113_CLASSES",
    "dermnet": "DermFM-Zero/DERMNET_CLASSNAMES",
}


def test_class_names_and_templates_are_the_peers_own(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, which their tables' labels count in."""
    path = data_dir / "text" / "peer_zero_shot_classnames_and_templates.json"
    peers = json.loads(path.read_text(encoding="utf-8"))
    for name, key in PEERS.items():
        config = load_config(ready(name, tmp_path, monkeypatch), [], EvalDataConfig)
        assert list(config.classnames) == peers[key], name
    theirs = [template.replace("{c}", "{}") for template in peers["MAKE/OPENAI_SKIN_TEMPLATES"]]
    assert load_templates(TEMPLATES_PATH, "peers") == theirs


def test_derm_images(data_dir: Path) -> None:
    with (data_dir / "derm-images" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    data = open_data(READY / "derm_images.yaml")
    assert data.rejected == ()
    assert [row.label for row in data.rows] == [record["label"] for record in table]
    assert [row.is_train for row in data.rows] == [record["split_hint"] == "train" for record in table]
    assert Counter(row.patient for row in data.rows).most_common(1)[0][1] == max(
        Counter(record["group_id"] for record in table).values()
    )
    types = Counter((row.attributes or {}).get("fitzpatrick") for row in data.rows)
    assert types == {None: 3336, "I": 72, "II": 341, "III": 99, "IV": 21, "V": 1}
    assert data.read_image(5) == (data_dir / "derm-images" / table[5]["filename"]).read_bytes()
    told = {word for row in data.rows for word in (row.key, row.patient, *(row.attributes or {}).values())}
    for column in ("group_id", "orig_id", "filename"):
        assert not told & {record[column] for record in table}


def test_ham_and_pad_with_their_real_images(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their published tables, rebuilt from the columns that the project's data kept of them."""
    with (data_dir / "derm-images" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    (tmp_path / "images").symlink_to(data_dir / "derm-images" / "images")
    rows: dict[str, list[dict[str, Any]]] = {"ham10000": [], "pad_ufes_20": []}
    for record in table:
        image = Path(record["filename"]).name
        if record["source"] == "HAM10000":
            shared = {"lesion_id": record["group_id"], "image_id": Path(image).stem, "dx": record["label_raw"]}
            rows["ham10000"].append(
                shared | {"age": record["age"], "sex": record["sex"], "localization": record["site"]}
            )
        else:
            shared = {"patient_id": record["group_id"], "img_id": image, "diagnostic": record["label_raw"]}
            person = {"age": record["age"], "gender": record["sex"], "fitspatrick": record["fitzpatrick"]}
            rows["pad_ufes_20"].append(shared | person | {"region": record["site"]})
    for name, table_name in (("ham10000", "HAM10000_metadata.csv"), ("pad_ufes_20", "metadata.csv")):
        write_table(tmp_path / table_name, rows[name])
        path = ready(name, tmp_path, monkeypatch)
        data = open_data(path, [f"source.image_dir={data_dir / 'derm-images'}"])
        assert len(data.rows) == len(rows[name]), data.notes
        assert data.rejected == ()
        real = [record["label"] for record in table if (record["source"] == "HAM10000") == (name == "ham10000")]
        assert [row.label for row in data.rows] == [label.replace("vascular lesion", "vascular") for label in real]


def test_derm1m_captions_with_stand_in_images(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = data_dir / "derm1m-sample" / "Derm1M_v2_validation.csv"
    (tmp_path / table.name).symlink_to(table)
    with table.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    stand_in = write_image(tmp_path / "stand_in.png")
    for record in records[1:]:  # the first one's image is missing
        image = tmp_path / record["filename"]
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(stand_in)
    data = open_data(ready("derm1m", tmp_path, monkeypatch))
    joined = sum(int(note.rsplit(" ", 1)[1]) for note in data.notes if "joined" in note)
    assert len(data.rows) + len(data.rejected) + joined == len(records)
    assert data.rejected[0] == {
        "table": table.name,
        "row": "1",
        "field": "filename",
        "reason": "no such image file",
    }
    assert all(row.texts for row in data.rows)
    assert any(row.patient for row in data.rows)
    assert any(row.diagnosis_path for row in data.rows)
    assert not any("," in name for name in data.classnames)
