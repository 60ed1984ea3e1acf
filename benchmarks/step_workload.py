"""The captions of `benchmarks.step`, as shards, and batches of them through the real reader.

The 900 Derm1M rows of `DERMVLP_DATA`, prepared as configs/data/derm1m.yaml says: sub-captions by rules, the diagnosis
in the published ontology, visual concepts. Their images are not to be had; noise stands for them. Without
`DERMVLP_DATA` the rows come from templates.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.decompose import make_captions
from data_prep.config import Derm1MSource, PrepareConfig
from data_prep.prepare import prepare
from data_prep.schema import HASH_DTYPE, MAX_CAPTIONS, SUBCAPTION_ASPECTS, Caption, Sample
from data_prep.shards.manifest import write_manifest
from data_prep.shards.shard import write_shard
from pretrain.data.manifest import ShardedDataset

_IMAGE_PX = 64
_NUM_ROWS = 900
_COLUMNS = ("filename", "caption", "source", "disease_label", "hierarchical_disease_label", "skin_concept")
_OTHER_COLUMNS = ("body_location", "age", "gender")
_DISEASES = ("psoriasis", "melanoma", "basal cell carcinoma", "eczema", "urticaria", "no definitive diagnosis")
_CONCEPTS = ("plaque, scale", "nodule", "papule, erythema", "No visual concepts", "No visual concepts")


@dataclass(frozen=True)
class Workload:
    """Two folders of shards over the same rows."""

    is_real: bool
    as_prepared: Path
    dense: Path  # 8 of the 11 slots valid


def make_workload(folder: Path, num_rows: int = _NUM_ROWS) -> Workload:
    """Below `folder`; with fewer rows, the first ones."""
    is_real = "DERMVLP_DATA" in os.environ
    table_dir = folder / "table"
    table_dir.mkdir(parents=True)
    rows = _derm1m_rows(Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample") if is_real else _template_rows()
    _write_table(table_dir, rows[:num_rows])
    ontology = Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample" / "ontology.json" if is_real else None
    config = PrepareConfig(
        name="step",
        source=Derm1MSource(train_csv_path=table_dir / "rows.csv", image_dir=table_dir),
        ontology_path=ontology,
        val_fraction=0.0,
        num_workers=1,
        out_dir=folder / "prepared",
    )
    prepare(config)
    train_dir = folder / "prepared" / "train"
    data = ShardedDataset(train_dir)
    samples = [data.read_sample(position) for position in range(len(data))]
    jpegs = [data.read_image(position) for position in range(len(data))]
    _write_samples(folder / "dense", fill_slots(samples, num_valid=8), jpegs)
    return Workload(is_real, train_dir, folder / "dense")


def _derm1m_rows(directory: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for path in sorted(directory.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    return rows


def _template_rows() -> list[dict[str, str]]:
    captions = make_captions(_NUM_ROWS, seed=0)
    draw = np.random.default_rng(0)
    labels, concepts = draw.integers(len(_DISEASES), size=_NUM_ROWS), draw.integers(len(_CONCEPTS), size=_NUM_ROWS)
    return [
        {"caption": caption, "disease_label": _DISEASES[label], "skin_concept": _CONCEPTS[concept]}
        for caption, label, concept in zip(captions, labels, concepts, strict=True)
    ]


def _write_table(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """rows.csv in Derm1M's layout, each row with an image of its own."""
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, (*_COLUMNS, *_OTHER_COLUMNS), extrasaction="ignore", restval="")
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({**row, "filename": f"{number:04d}.jpg"})
            pixels = np.random.default_rng(number).integers(0, 255, (_IMAGE_PX, _IMAGE_PX, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=80)


def fill_slots(samples: Sequence[Sample], num_valid: int) -> list[Sample]:
    """Every sample with at least `num_valid` captions, by sub-captions that no other image has.

    Each added string is the first half of a sub-caption of one other row and the second half of one of another row,
    so lengths stay those of real sub-captions; a string that already exists is drawn again.
    """
    subcaptions = [caption.text.split() for sample in samples for caption in sample.subcaptions]
    seen = {caption.text for sample in samples for caption in sample.captions}
    draw = np.random.default_rng(0)
    filled = []
    for sample in samples:
        captions = list(sample.captions)
        while len(captions) < min(num_valid, MAX_CAPTIONS):
            first, second = (subcaptions[int(draw.integers(len(subcaptions)))] for _ in range(2))
            text = " ".join(first[: (len(first) + 1) // 2] + second[(len(second) + 1) // 2 :])
            if text in seen:
                continue
            seen.add(text)
            aspect = SUBCAPTION_ASPECTS[len(captions) % len(SUBCAPTION_ASPECTS)]
            captions.append(Caption(aspect=aspect, text=text, origin="spliced"))
        filled.append(sample.model_copy(update={"captions": tuple(captions)}))
    return filled


def _write_samples(directory: Path, samples: Sequence[Sample], jpegs: Sequence[bytes]) -> None:
    directory.mkdir()
    no_hash = np.zeros(1, dtype=HASH_DTYPE)[0]
    members = [(sample, jpeg, no_hash) for sample, jpeg in zip(samples, jpegs, strict=True)]
    record = write_shard(directory / "shard-000000.tar", members, inputs_digest="")
    write_manifest(
        directory,
        [record],
        dataset="step",
        split="train",
        image_short_side=_IMAGE_PX,
        decomposer="rules",
        config_digest="",
        num_rejected=0,
    )
