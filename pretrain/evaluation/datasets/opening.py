"""From a path to a data set: a description, or what a folder, a table or some tars say of themselves."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.config_file import load_config, make_config
from data_prep.errors import InputError
from data_prep.shards.manifest import read_manifest
from data_prep.sources.base import Rejection
from data_prep.sources.folder import walk_images
from data_prep.sources.readers import check_table, parse_json, read_records
from data_prep.sources.values import present
from pretrain.evaluation.datasets.data import EvalSet, read_data
from pretrain.evaluation.datasets.description import EvalDataConfig

_TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
#: Columns of the tables that DermLIP, MAKE, DermFM-Zero, PanDerm and open_clip read, the first that is there.
_IMAGE_COLUMNS = ("image_path", "filename", "image", "filepath", "img_path", "image_name", "img_id", "image_id")
_TEXT_COLUMNS = ("caption", "truncated_caption", "title", "text")
_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})


def open_data(path: Path | str, overrides: Sequence[str] = ()) -> EvalSet:
    """The data set at `path`:

    a .yaml               its description (`description.EvalDataConfig`)
    a folder with manifest.json   a split that `dermvlp prepare` wrote
    a folder or a pattern of tars
    a folder of images    subfolders are classes (below train/, test/ too); images beside them: nothing is labelled
    .csv .tsv .parquet .jsonl     columns as the peers name them: image_path or filename, diag or label, caption, split

    `overrides` are "key.path=value" of the description. Raises InputError, with the file and the remedy.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_data(load_config(path, list(overrides), EvalDataConfig))
    return read_data(make_config(_described(path), list(overrides), EvalDataConfig, path))


def _described(path: Path) -> dict[str, Any]:
    """The description of what is no description itself."""
    name = _name(path.stem if path.is_file() else path.resolve().name)
    if "*" in path.name or path.suffix.lower() == ".tar":
        return {"name": name, "source": {"kind": "webdataset", "tar_dir": str(path.parent), "pattern": path.name}}
    if (path / "manifest.json").is_file():
        manifest = read_manifest(path)  # "val" alone would say nothing beside other data sets
        return {"name": _name(f"{manifest.dataset}-{manifest.split}"), "source": _folder(path)}
    if path.is_dir():
        return {"name": name, "source": _folder(path)}
    if path.suffix.lower() in _TABLES:
        return {"name": name, **_table(path)}
    if not path.exists():
        ready = f"configs/eval/datasets/{path.name}.yaml"
        hint = f"did you mean {ready}?" if Path(ready).is_file() else "ready descriptions are in configs/eval/datasets/"
        raise InputError(f"{path}: no such file or folder; {hint}")
    raise InputError(
        f"{path}: no data set; give a description (.yaml), a folder of images or shards, tars, or a table "
        f"({', '.join(_TABLES)})"
    )


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "data"


def _folder(path: Path) -> dict[str, Any]:
    if (path / "manifest.json").is_file():
        return {"kind": "shards", "path": str(path)}
    if next(path.glob("*.tar"), None) is not None:
        return {"kind": "webdataset", "tar_dir": str(path)}
    depths: set[int] = set()
    outermost: set[str] = set()
    for parts, reason in walk_images(path, Counter()):
        if reason is None:
            depths.add(len(parts))
            outermost.add(parts[0].lower())
    if not depths:
        splits = sorted(each.parent.name for each in path.glob("*/manifest.json"))
        hint = f"; its splits are {', '.join(splits)}: name one of them" if splits else ""
        raise InputError(f"{path}: no image, no tar and no manifest.json here{hint}")
    if 1 in depths:
        levels: list[str] = []
    elif outermost <= _SPLITS:
        levels = ["split", "label"] if min(depths) > 2 else ["split"]
    else:
        levels = ["label"]
    return {"kind": "folder", "image_dir": str(path), "levels": levels}


def _table(path: Path) -> dict[str, Any]:
    check_table(path, {}, "the table")
    present_columns = _columns(path)
    columns: dict[str, Any] = {}
    if (image := _first(_IMAGE_COLUMNS, present_columns)) is None:
        raise InputError(
            f"{path}: no column {' or '.join(_IMAGE_COLUMNS[:4])}; write a description (docs/evaluation_data.md) that "
            f"names the image column. Columns: {', '.join(present_columns)}"
        )
    columns["image"] = image
    if (text := _first(_TEXT_COLUMNS, present_columns)) is not None:
        columns["texts"] = [text]
    if "split" in present_columns:
        columns["split"] = "split"
    described: dict[str, Any] = {
        "source": {"kind": "table", "table_path": str(path), "image_dir": str(path.parent), "columns": columns}
    }
    if "diag" in present_columns:
        columns["label"] = "diag"
        if "label" in present_columns:
            described["classnames"] = _classes_by_number(path)
    elif (label := _first(("label", "binary_label"), present_columns)) is not None:
        columns["label"] = label
    return described


def _columns(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet  # here: it takes a third of a second

        return list(parquet.read_schema(path).names)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if suffix == ".jsonl":
            value, _ = parse_json(next((line for line in file if line.strip()), ""))
            return list(value) if isinstance(value, dict) else []
        return next(csv.reader(file, delimiter="\t" if suffix == ".tsv" else ","), [])


def _first(names: Iterable[str], present_columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in present_columns), None)


def _classes_by_number(path: Path) -> list[str]:
    """The names of `diag` in the order of `label`. Raises InputError where a number has two names, or none."""
    names: dict[float, str] = {}
    for found in read_records(path, {"label": "label", "diag": "diag"}):
        if isinstance(found, Rejection) or (name := present(found[1]["diag"])) is None:
            continue
        try:
            number = float(found[1]["label"])
        except ValueError:
            return []  # no numbers: the order of the names will do
        if names.setdefault(number, name) != name:
            raise InputError(
                f"{path}: row {found[0]}: one label, two names in diag; correct the table, or write a description"
            )
    return [names[number] for number in sorted(names)]
