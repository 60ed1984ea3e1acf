"""Features as a file for other programs: Parquet (key, features), or npy with the keys beside it.

FILE.parquet            columns key (string) and features (fixed-size list of L float32); what made it in the metadata
FILE.npy                (n, L) float32
FILE.npy.keys.jsonl     {"row": 0, "key": ...}, a line a row of the array
FILE.npy.json           what made it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from data_prep.errors import InputError
from data_prep.files import atomic, write_atomically
from data_prep.schema import Frozen
from pretrain.evaluation.encoding.feature_chunks import read_features, read_rows, write_npy

SUFFIXES = (".parquet", ".npy")
_METADATA_KEY = b"dermvlp"


class TableInfo(Frozen):
    """What made a table of features. Two that differ in a digest or in the layer hold other features."""

    model: str
    model_digest: str
    layer: str
    data: str
    data_digest: str
    num_images: int
    num_rejected: int
    width: int

    def is_of(self, other: TableInfo) -> bool:
        """The same model, data and layer, whatever they were called."""
        fields = ("model_digest", "layer", "data_digest")
        return all(getattr(self, field) == getattr(other, field) for field in fields)


def write_features(path: Path, chunks: Sequence[Path], keys: Sequence[str], info: TableInfo) -> None:
    """`keys`: of all rows of the data set; those of rejected rows are left out. The table has its name when it, and
    what stands beside it, is whole; a chunk is in memory at a time."""
    if path.suffix == ".parquet":
        _write_parquet(path, chunks, keys, info)
        return
    sources = np.concatenate([read_rows(chunk).rows for chunk in chunks]).tolist()
    lines = [json.dumps({"row": row, "key": keys[source]}, ensure_ascii=False) for row, source in enumerate(sources)]
    write_atomically(_beside(path, "keys.jsonl"), "".join(f"{line}\n" for line in lines).encode())
    write_atomically(_beside(path, "json"), info.model_dump_json(indent=1).encode())
    write_npy(path, chunks)


def _write_parquet(path: Path, chunks: Sequence[Path], keys: Sequence[str], info: TableInfo) -> None:
    schema = pa.schema(
        [pa.field("key", pa.string(), nullable=False), pa.field("features", pa.list_(pa.float32(), info.width))],
        metadata={_METADATA_KEY: info.model_dump_json().encode()},
    )
    with atomic(path) as file, pq.ParquetWriter(file, schema) as writer:
        for chunk in chunks:
            rows = read_rows(chunk).rows.tolist()
            values = pa.array(read_features(chunk).reshape(-1), type=pa.float32())
            columns = [
                pa.array([keys[row] for row in rows], type=pa.string()),
                pa.FixedSizeListArray.from_arrays(values, info.width),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def read_info(path: Path) -> TableInfo:
    """Of a table written by `write_features`. Raises InputError for any other file."""
    try:
        if path.suffix == ".parquet":
            raw = (pq.read_schema(path).metadata or {})[_METADATA_KEY]
        else:
            raw = _beside(path, "json").read_bytes()
        return TableInfo.model_validate_json(raw)
    except (OSError, KeyError, ValidationError, pa.ArrowInvalid):
        raise InputError(f"{path}: exists, and was not written by `dermvlp embed`; choose another --out") from None


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")
