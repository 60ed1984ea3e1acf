"""The data of the learning experiment: captions made from the columns of real images, and five folds of shards.

The images (HAM10000, PAD-UFES-20) have labels and no human caption. Every caption here is a TEMPLATE: sentences
filled from the row's columns, one an aspect, in one of three wordings chosen by a hash of the file's name. (One
wording a row, not one a sentence: else hardly two images had one caption, and retrieval would test the guessing of
wordings.) The whole caption is the sentences put together; `rules` cuts it into its sub-captions again, as it would
cut a human's.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sklearn.model_selection import StratifiedGroupKFold

from data_prep.config import DuplicateOptions, ImageOptions, PrepareConfig, TableColumns, TableSource
from data_prep.errors import InputError
from data_prep.files import write_atomically
from data_prep.prepare import prepare
from data_prep.schema import SUBCAPTION_ASPECTS, Aspect
from pretrain.data.manifest import ShardedDataset

_ONTOLOGY_PATH = Path(__file__).parents[1] / "configs" / "data" / "ontology_skin_tumours.json"
_SHORT_SIDE_PX = 144  # the towers see 128; smaller files are decoded faster

#: value of the column -> words; a value that is not listed says nothing
_MODALITY = {"dermoscopy": "dermoscopy", "clinical (background masked black)": "clinical photography"}
_CONFIRMATION = {
    "histo": "histopathology",
    "biopsy": "histopathology",
    "follow_up": "follow-up",
    "consensus": "expert consensus",
    "clinical consensus": "expert consensus",
    "confocal": "confocal microscopy",
}
_SITE = {"genital": "genital area", "unknown": ""}
_SEX = {"male": "male", "female": "female"}

WORDINGS: dict[str, tuple[str, str, str]] = {
    "label": ("The lesion was diagnosed as {}.", "Diagnosed as {}.", "Diagnosis of {}."),
    "site": ("Located on the {}.", "The lesion is on the {}.", "Body site is the {}."),
    "modality": ("Examined by {}.", "Image of the examination by {}.", "Seen by {} on examination."),
    "confirmation": ("Confirmed by {}.", "Examination confirmed by {}.", "This was confirmed by {}."),
}


# ---------------------------------------------------------------------------------------------- captions


def template_caption(row: Mapping[str, str]) -> str:
    """The sentences of a row of metadata.csv: diagnosis, body site, person, modality, how it was confirmed.

    A column that is empty or unknown leaves its sentence out.
    """
    values = {
        "label": row["label"],
        "site": _SITE.get(row["site"], row["site"]),
        "person": "",
        "modality": _MODALITY.get(row["modality"], ""),
        "confirmation": _CONFIRMATION.get(row["dx_confirm"], ""),
    }
    wording = hashlib.blake2b(row["filename"].encode(), digest_size=1).digest()[0] % 3
    sentences = []
    for name, value in values.items():
        if name == "person":
            sentences.append(_person(row, wording))
        elif value:
            sentences.append(WORDINGS[name][wording].format(value))
    return " ".join(sentence for sentence in sentences if sentence)


def _person(row: Mapping[str, str], wording: int) -> str:
    """Age (below 90), sex and Fitzpatrick type, those that are known, in one sentence; "" where none is."""
    age = f"{float(row['age']):g}" if row["age"] and float(row["age"]) < 90 else ""
    sex = _SEX.get(row["sex"], "")
    skin = f"{float(row['fitzpatrick']):g}" if row["fitzpatrick"] else ""
    if not (age or sex or skin):
        return ""
    if wording == 2:
        parts = (sex and f"{sex} patient", age and f"{age} years old", skin and f"Fitzpatrick skin type {skin}")
        listed = ", ".join(part for part in parts if part)
        return f"{listed[0].upper()}{listed[1:]}."
    who = f"{age}-year-old {sex or 'patient'}" if age else f"{sex} patient" if sex else "patient"
    article = "an" if age.startswith("8") or age in ("11", "18") else "a"
    whom = f"{article} {who}" + (f" with skin of Fitzpatrick type {skin}" if skin else "")
    if not (age or sex):
        return f"The skin is of Fitzpatrick type {skin}." if wording else f"Fitzpatrick skin type {skin}."
    return f"The patient is {whom}." if wording else f"{whom[0].upper()}{whom[1:]}."


# ---------------------------------------------------------------------------------------------- folds


def read_metadata(data_dir: Path, num_images: int | None = None) -> list[dict[str, str]]:
    """Rows of derm-images/metadata.csv; of a part of them, whole groups, every label alike.

    Raises InputError where the file is missing.
    """
    path = data_dir / "derm-images" / "metadata.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such table; set DERMVLP_DATA to the folder that holds derm-images/")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if num_images is None:
        return rows
    labels = sorted({row["label"] for row in rows})
    kept: set[str] = set()
    for label in labels:
        groups = dict.fromkeys(row["group_id"] for row in rows if row["label"] == label)
        kept |= set(list(groups)[: num_images // len(labels)])
    return [row for row in rows if row["group_id"] in kept]


def assign_folds(rows: Sequence[Mapping[str, str]], num_folds: int) -> list[int]:
    """The fold of each row: whole lesions or patients, stratified by label as far as they allow."""
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=0)
    labels, groups = [row["label"] for row in rows], [row["group_id"] for row in rows]
    folds = [-1] * len(rows)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        for position in held_out.tolist():
            folds[position] = fold
    return folds


def write_table(rows: Sequence[Mapping[str, str]], folds: Sequence[int], path: Path) -> None:
    """The columns that preparation reads, with a caption, and for each fold the side of every row."""
    kept = ("filename", "label", "group_id", "source", "licence")
    fold_names = [f"fold_{fold}" for fold in sorted(set(folds))]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*kept, "caption", *fold_names])
    for row, own in zip(rows, folds, strict=True):
        sides = ["val" if name == f"fold_{own}" else "train" for name in fold_names]
        writer.writerow([*(row[name] for name in kept), template_caption(row), *sides])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def prepare_fold(data_dir: Path, table_path: Path, fold: int, out_dir: Path) -> None:
    """Shards of the fold's two sides; training images that are near copies of held-out ones are dropped.

    Raises InputError where a lesion or patient came out on both sides.
    """
    manifests = prepare(
        PrepareConfig(
            name=f"learning_fold_{fold}",
            source=TableSource(
                table_path=table_path,
                image_dir=data_dir / "derm-images",
                columns=TableColumns(
                    image="filename",
                    caption="caption",
                    diagnosis="label",
                    group="group_id",
                    split=f"fold_{fold}",
                    source="source",
                    licence="licence",
                ),
            ),
            ontology_path=_ONTOLOGY_PATH,
            images=ImageOptions(short_side_px=_SHORT_SIDE_PX),
            duplicates=DuplicateOptions(leakage="drop"),
            samples_per_shard=200,
            out_dir=out_dir,
        )
    )
    sides = {name: ShardedDataset(out_dir / name) for name in ("train", "val")}
    groups = {name: {data.read_sample(i).group for i in range(len(data))} for name, data in sides.items()}
    if None in groups["train"] | groups["val"] or groups["train"] & groups["val"]:
        raise InputError(f"{out_dir}: a lesion or patient is on both sides, or has no name; remove the folder")
    summary = {name: manifest.num_samples for name, manifest in manifests.items()}
    write_atomically(out_dir / "learning.json", json.dumps(summary).encode())


def prepare_folds(out_dir: Path, folds: Sequence[int], num_folds: int, num_images: int | None) -> None:
    """The table and the shards of `folds` under OUT/data, those that are not there yet. Needs DERMVLP_DATA."""
    if "DERMVLP_DATA" not in os.environ:
        raise InputError("DERMVLP_DATA is not set: export the folder that holds derm-images/")
    data_dir = Path(os.environ["DERMVLP_DATA"])
    table_path = out_dir / "data" / "captions.csv"
    if not table_path.is_file():
        rows = read_metadata(data_dir, num_images)
        write_table(rows, assign_folds(rows, num_folds), table_path)
    for fold in folds:
        fold_dir = out_dir / "data" / f"fold-{fold}"
        if not (fold_dir / "learning.json").is_file():
            prepare_fold(data_dir, table_path, fold, fold_dir)


def captions_per_image(data: ShardedDataset) -> dict[Aspect, float]:
    """Mean number of sub-captions of each aspect."""
    counts = data.manifest.captions_by_aspect
    return {aspect: counts[aspect] / len(data) for aspect in SUBCAPTION_ASPECTS if counts.get(aspect)}
