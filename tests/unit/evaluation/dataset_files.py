"""Small images and tables for tests of evaluation data."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pretrain.evaluation.datasets import EvalSet


def picture(seed: int, side_px: int = 48) -> Image.Image:
    """A picture of its own: noise at four scales, the coarser the stronger, as photographs have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side_px, side_px, 3))
    for size, weight in ((6, 8), (12, 4), (24, 2), (48, 1)):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += weight * np.asarray(noise.resize((side_px, side_px), Image.Resampling.BICUBIC), float)
    return Image.fromarray((total / 15).astype(np.uint8))


def write_image(path: Path, seed: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path.read_bytes()


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def describe(path: Path, description: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(description), allow_unicode=True), encoding="utf-8")
    return path


def reasons(data: EvalSet) -> list[tuple[str, str, str]]:
    """The ledger: row, field, reason."""
    return [(each["row"], each["field"], each["reason"]) for each in data.rejected]
