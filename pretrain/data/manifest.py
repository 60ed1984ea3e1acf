"""Reads what `dermvlp prepare` wrote: the manifest, the memory-mapped index, and one sample's bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from data_prep.errors import InputError
from data_prep.schema import INDEX_DTYPE, SCHEMA_VERSION, Sample, ShardManifest


class ShardedDataset:
    """Random access to the samples of one split. Cheap to send to another process; opens shards when first read."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.index = np.load(self.directory / "index.npy", mmap_mode="r", allow_pickle=False)
        if self.index.dtype != INDEX_DTYPE or len(self.index) != self.manifest.num_samples:
            raise InputError(
                f"{self.directory / 'index.npy'}: does not fit its manifest.json; run `dermvlp prepare` again"
            )
        for shard in self.manifest.shards:
            path = self.directory / shard.name
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                raise InputError(f"{path}: missing or not of the size in manifest.json; run `dermvlp prepare` again")
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.array([shard.num_samples for shard in self.manifest.shards], dtype=np.int64)

    def read_image(self, position: int) -> bytes:
        """The JPEG of the sample at this position of the index."""
        row = self.index[position]
        return self._read(int(row["shard"]), int(row["image_offset"]), int(row["image_num_bytes"]))

    def read_sample(self, position: int) -> Sample:
        row = self.index[position]
        raw = self._read(int(row["shard"]), int(row["json_offset"]), int(row["json_num_bytes"]))
        try:
            return Sample.model_validate_json(raw)
        except ValidationError as error:
            shard = self.manifest.shards[int(row["shard"])].name
            raise InputError(
                f"{self.directory / shard}: sample {position} is damaged; run `dermvlp verify`: {error}"
            ) from None

    def _read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        if shard not in self._files:
            self._files[shard] = os.open(self.directory / self.manifest.shards[shard].name, os.O_RDONLY)
        return os.pread(self._files[shard], num_bytes, offset)


def read_manifest(directory: Path) -> ShardManifest:
    path = directory / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: no manifest here; make the shards with `dermvlp prepare CONFIG`")
    try:
        manifest = ShardManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: not a manifest of schema version {SCHEMA_VERSION}: {error}") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema version {manifest.schema_version}, expected {SCHEMA_VERSION}; prepare again")
    return manifest
