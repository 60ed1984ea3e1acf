"""One shard: a WebDataset tar with a sidecar that says what went into it.

In the tar each sample is `KEY.jpg`, `KEY.json` (the whole Sample) and `KEY.txt` (the plain caption), so that
open_clip's loader and any WebDataset reader can train on the same shards.

A shard gets its name when it is whole, then its sidecar `NAME.json`; the manifest (manifest.py) comes last. So a killed
preparation leaves no torn shard, and the next one makes those that are missing.
"""

from __future__ import annotations

import base64
import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from data_prep.files import atomic, file_sha256, write_atomically
from data_prep.schema import (
    ASPECT_CODE,
    HASH_DTYPE,
    INDEX_DTYPE,
    MAX_CAPTIONS,
    NO_ASPECT_CODE,
    Sample,
    ShardInfo,
    text_hash,
)
from data_prep.sources.base import Rejection


class RejectionRecord(BaseModel):
    table: str
    row: int
    field: str
    reason: str


class ShardRecord(BaseModel):
    """The sidecar of one shard: all that the manifest needs of it, without opening the tar."""

    inputs_digest: str  # of the rows, their images and the configuration; another one means: write the shard again
    rows_digest: str  # of the rows and their images alone: what a merge can check
    info: ShardInfo
    index: str  # INDEX_DTYPE array, base64; `shard` is set by the manifest
    hashes: str  # HASH_DTYPE array, base64
    counts: dict[
        str, dict[str, int]
    ]  # samples by diagnosis, level (of the diagnosis path), licence, source; captions by origin
    rejected: list[RejectionRecord]
    failures: list[RejectionRecord] = []  # captions that the model could not split; their rows are samples all the same
    notes: dict[str, int] = {}  # what was dropped or not found on the way, by reason

    def index_array(self) -> NDArray[np.void]:
        return np.frombuffer(base64.b64decode(self.index), dtype=INDEX_DTYPE)

    def hash_array(self) -> NDArray[np.void]:
        return np.frombuffer(base64.b64decode(self.hashes), dtype=HASH_DTYPE)


def write_shard(
    path: Path,
    samples: Iterable[tuple[Sample, bytes, np.void]],
    *,
    rejected: Sequence[Rejection] = (),
    failures: Sequence[Rejection] = (),
    notes: dict[str, int] | None = None,
    inputs_digest: str,
    rows_digest: str = "",
) -> ShardRecord:
    """Samples with their JPEG bytes and HASH_DTYPE-like record to one tar and its sidecar; the sidecar alone where
    there is no sample. `rejected`, `failures` and `notes` may grow while the samples are taken.
    """
    rows: list[tuple[object, ...]] = []
    hashes: list[tuple[object, object]] = []
    counts: dict[str, Counter[str]] = {
        name: Counter() for name in ("diagnosis", "level", "licence", "source", "origin")
    }
    with atomic(path) as file:
        for sample, jpeg, image_hashes in samples:
            rows.append(_add(file, sample, jpeg))
            hashes.append((image_hashes["pixels"], image_hashes["perceptual"]))
            _count(counts, sample)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
        num_bytes = file.tell()
        # from here on neither the old sidecar nor the old manifest describes what stands in the folder
        path.with_suffix(".json").unlink(missing_ok=True)
        path.with_name("manifest.json").unlink(missing_ok=True)
    if not rows:
        path.unlink()
    info = ShardInfo(
        name=path.name,
        num_samples=len(rows),
        num_bytes=num_bytes if rows else 0,
        sha256=file_sha256(path) if rows else "",
        licences=dict(counts["licence"]),
    )
    record = ShardRecord(
        inputs_digest=inputs_digest,
        rows_digest=rows_digest,
        info=info,
        index=_base64(np.array(rows, dtype=INDEX_DTYPE)),
        hashes=_base64(np.array(hashes, dtype=HASH_DTYPE)),
        counts={name: dict(count) for name, count in counts.items()},
        rejected=[RejectionRecord(**asdict(rejection)) for rejection in rejected],
        failures=[RejectionRecord(**asdict(failure)) for failure in failures],
        notes=dict(+Counter(notes or {})),
    )
    write_atomically(path.with_suffix(".json"), record.model_dump_json().encode())
    return record


def _add(file: io.BufferedRandom, sample: Sample, jpeg: bytes) -> tuple[object, ...]:
    """The sample's three members of the tar; returns its row of the index."""
    offsets = {}
    parts = {"jpg": jpeg, "json": sample.model_dump_json().encode(), "txt": sample.caption.encode()}
    for extension, content in parts.items():
        file.write(_header(f"{sample.key}.{extension}", len(content)))
        offsets[extension] = file.tell()
        file.write(content)
        file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    num_empty = MAX_CAPTIONS - len(sample.captions)
    text_hashes = [text_hash(caption.text) for caption in sample.captions] + [0] * num_empty
    codes = [ASPECT_CODE[caption.aspect] for caption in sample.captions] + [NO_ASPECT_CODE] * num_empty
    return 0, offsets["jpg"], len(parts["jpg"]), offsets["json"], len(parts["json"]), text_hashes, codes


#: Time, owner and mode stay constant: equal inputs, equal tar. Name, size and checksum are filled in.
_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
#: the sum of its bytes, with the checksum itself as eight spaces, without name and size
_CHECKSUM_OF_TEMPLATE = sum(_TEMPLATE) - sum(sum(_TEMPLATE[part]) for part in (_NAME, _SIZE, _CHECKSUM)) + 8 * ord(" ")


def _header(name: str, num_bytes: int) -> bytes:
    """What `TarInfo.tobuf` gives, in a fifth of the time: there are three of them a sample."""
    if len(name) > 99:  # USTAR would split it at a slash, and keys have none
        raise ValueError(f"{len(name)} characters are too many for a tar member's name")
    header = bytearray(_TEMPLATE)
    header[_NAME] = name.encode("ascii").ljust(100, b"\0")
    header[_SIZE] = b"%011o\0" % num_bytes
    header[_CHECKSUM] = b"%06o\0 " % (_CHECKSUM_OF_TEMPLATE + sum(header[_NAME]) + sum(header[_SIZE]))
    return bytes(header)


def _count(counts: dict[str, Counter[str]], sample: Sample) -> None:
    counts["diagnosis"][sample.diagnosis or "unknown"] += 1
    counts["level"][str(len(sample.diagnosis_path))] += 1
    counts["licence"][sample.licence or "unknown"] += 1
    counts["source"][sample.source or "unknown"] += 1
    counts["origin"].update(f"{caption.aspect} by {caption.origin or 'unknown'}" for caption in sample.captions)


def _base64(array: NDArray[np.void]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def read_sidecar(shard_path: Path) -> ShardRecord | None:
    """None where there is none, or one of an earlier version."""
    try:
        return ShardRecord.model_validate_json(shard_path.with_suffix(".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def read_record(shard_path: Path, inputs_digest: str) -> ShardRecord | None:
    """The sidecar of a shard that was made from the same inputs and is whole, else None.

    Reads the shard's bytes, so that preparing again mends what `verify` complains of.
    """
    record = read_sidecar(shard_path)
    if record is None or record.inputs_digest != inputs_digest:
        return None
    if record.info.num_samples == 0:
        return record
    return record if shard_path.is_file() and file_sha256(shard_path) == record.info.sha256 else None
