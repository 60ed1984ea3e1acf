"""Reads what `dermvlp prepare` wrote: the manifest, the memory-mapped index, and one sample's bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from data_prep.errors import InputError
from data_prep.schema import INDEX_DTYPE, SCHEMA_VERSION, Sample, ShardManifest

_MAX_OPEN_SHARDS = 64  # by process; the usual limit of a process is 1,024 files, a large set has more shards


class DamagedSample(InputError):  # noqa: N818 (says what it is)
    """One sample's bytes are not what was prepared; the others can be read."""


class ShardedDataset:
    """Random access to the samples of one split. Cheap to send to another process; opens shards when first read."""

    def __init__(self, directory: str | Path, with_tars: bool = True) -> None:
        """`with_tars=False`: manifest.json and index.npy alone, nothing to be read by offsets (the streaming mode)."""
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.index = self._map_index()
        for shard in self.manifest.shards if with_tars else ():
            path = self.directory / shard.name
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                raise InputError(f"{path}: missing or not of the size in manifest.json; run `dermvlp prepare` again")
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self) -> dict[str, object]:
        # a pickled memory map would be a copy of the whole index
        return {"directory": self.directory, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.index = self._map_index()
        self._files = OrderedDict()

    def _map_index(self) -> NDArray[np.void]:
        path = self.directory / "index.npy"
        try:
            # as a plain array: numpy's class for maps takes longer to give a row than reading the image does
            index: NDArray[np.void] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read ({error}); run `dermvlp prepare` again") from None
        if index.dtype != INDEX_DTYPE or len(index) != self.manifest.num_samples:
            raise InputError(f"{path}: does not fit its manifest.json; run `dermvlp prepare` again")
        return index

    @property
    def digest(self) -> str:
        """Names the samples and their order: equal digests mean equal batches."""
        return hashlib.sha256(f"{SCHEMA_VERSION}:{self.manifest.index_sha256}".encode()).hexdigest()[:16]

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.array([shard.num_samples for shard in self.manifest.shards], dtype=np.int64)

    def first_of_shard(self, shard: int) -> int:
        """Position in the index of a shard's first sample."""
        return sum(info.num_samples for info in self.manifest.shards[:shard])

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
            what = " ".join(str(error).split())
            raise DamagedSample(
                f"{self.shard_of(position)}: sample {position} is damaged; run `dermvlp verify`: {what}"
            ) from None

    def sound_sample(self, position: int) -> Sample | None:
        """As `read_sample`; None for a damaged one, where others do as well."""
        try:
            return self.read_sample(position)
        except DamagedSample:
            return None

    def shard_of(self, position: int) -> Path:
        """The tar that holds the sample."""
        return self.directory / self.manifest.shards[int(self.index[position]["shard"])].name

    def read_key(self, position: int) -> str | None:
        """The sample's key, from the tar's header, which can be whole where the sample is not; None where it is not."""
        row = self.index[position]
        try:
            header = self._read(int(row["shard"]), int(row["image_offset"]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            return Path(tarfile.TarInfo.frombuf(header, "utf-8", "replace").name).stem
        except (DamagedSample, tarfile.HeaderError):
            return None

    def _read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        path = self.directory / self.manifest.shards[shard].name
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(shard)
        content = os.pread(self._files[shard], num_bytes, offset)
        if len(content) != num_bytes:
            raise DamagedSample(f"{path}: ends before byte {offset + num_bytes}; run `dermvlp prepare` again")
        return content


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


def diagnoses(*datasets: ShardedDataset) -> tuple[str, ...]:
    """The class names of some splits, sorted."""
    return tuple(sorted({name for data in datasets for name in data.manifest.samples_by_diagnosis} - {"unknown"}))
