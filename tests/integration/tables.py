"""Tables of small images to prepare, and what a preparation left on disk."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.config import PrepareConfig
from pretrain.data.manifest import ShardedDataset


def write_image(path: Path, number: int, **save: Any) -> None:
    pixels = np.random.default_rng(number).integers(0, 255, (40, 44, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **save)


def write_table(folder: Path, rows: list[dict[str, str]]) -> Path:
    """t.csv and, for each row with an `n`, an image of its own below img/."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    columns = sorted({name for row in rows for name in row})
    with (folder / "t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    for number, row in enumerate(rows):
        if not (folder / "img" / row["file"]).exists():
            write_image(folder / "img" / row["file"], number)
    return folder / "t.csv"


def table_config(folder: Path, columns: dict[str, str] | None = None, **changes: Any) -> PrepareConfig:
    source = {
        "kind": "table",
        "table_path": folder / "t.csv",
        "image_dir": folder / "img",
        "columns": {"image": "file", "caption": "text", **(columns or {})},
    }
    values = {"name": "set", "source": source, "val_fraction": 0.0, "num_workers": 1, "out_dir": folder / "out"}
    return PrepareConfig.model_validate(values | changes)


def plain_rows(count: int, **columns: Callable[[int], str]) -> list[dict[str, str]]:
    return [
        {"file": f"scan{i:03d}.png", "text": f"Red plaque number {i} on the arm."}
        | {name: value(i) for name, value in columns.items()}
        for i in range(count)
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def published(out_dir: Path) -> dict[str, bytes]:
    """All but the working files, and the resolved configuration, which names the folder."""
    return {name: data for name, data in contents(out_dir).items() if not name.startswith(("work/", "prepare.yaml"))}


def shard_times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("shard-*.tar")}


def samples(directory: Path) -> list[Any]:
    dataset = ShardedDataset(directory)
    return [dataset.read_sample(position) for position in range(len(dataset))]
