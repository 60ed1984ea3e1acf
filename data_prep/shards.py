"""WebDataset tars with an index beside them.

In the tar each sample is `KEY.jpg`, `KEY.json` (the whole Sample) and `KEY.txt` (the plain caption), so that
open_clip's loader and any WebDataset reader can train on the same shards.

A shard is written to `NAME.partial` and renamed, with a sidecar `NAME.json` that says what went into it; the
manifest comes last. So a killed preparation leaves no torn shard, and the next one makes those that are missing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from data_prep.errors import InputError
from data_prep.schema import (
    ASPECT_CODE,
    INDEX_DTYPE,
    NO_ASPECT_CODE,
    Sample,
    ShardInfo,
    ShardManifest,
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

    inputs_digest: str  # of the rows and the configuration; another one means: write the shard again
    info: ShardInfo
    index_rows: list[list[int]]  # image offset, image bytes, json offset, json bytes; then hashes; then aspect codes
    diagnoses: dict[str, int]
    licences: dict[str, int]
    rejected: list[RejectionRecord]
    notes: dict[str, int] = {}  # counts of what the decomposer dropped, by reason


def write_atomically(path: Path, content: bytes) -> None:
    """Either the old file or the whole new one, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_shard(
    path: Path,
    samples: Iterable[tuple[Sample, bytes]],
    rejected: Sequence[Rejection],
    inputs_digest: str,
    notes: dict[str, int] | None = None,
) -> ShardRecord:
    """Samples with their JPEG bytes to one tar and its sidecar; the sidecar alone where there is no sample."""
    rows: list[list[int]] = []
    diagnoses: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    # from here on neither the old sidecar nor the old manifest describes what stands in the folder
    path.with_suffix(".json").unlink(missing_ok=True)
    path.with_name("manifest.json").unlink(missing_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, jpeg in samples:
                offsets = {}
                parts = {"jpg": jpeg, "json": sample.model_dump_json().encode(), "txt": sample.caption.encode()}
                for extension, content in parts.items():
                    member = tarfile.TarInfo(f"{sample.key}.{extension}")
                    member.size = len(content)  # time, owner and mode stay constant: equal inputs, equal tar
                    tar.addfile(member, io.BytesIO(content))
                    offsets[extension] = tar.offset - _padded(len(content))
                rows.append(_index_row(sample, offsets, parts))
                diagnoses[sample.diagnosis or "unknown"] += 1
                licences[sample.licence or "unknown"] += 1
        file.flush()
        os.fsync(file.fileno())
    record = ShardRecord(
        inputs_digest=inputs_digest,
        info=ShardInfo(
            name=path.name, num_samples=len(rows), num_bytes=partial.stat().st_size, sha256=file_sha256(partial)
        ),
        index_rows=rows,
        diagnoses=dict(diagnoses),
        licences=dict(licences),
        rejected=[RejectionRecord(**asdict(rejection)) for rejection in rejected],
        notes=notes or {},
    )
    if rows:
        partial.replace(path)
    else:
        partial.unlink()
        path.unlink(missing_ok=True)
    write_atomically(path.with_suffix(".json"), record.model_dump_json().encode())
    return record


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _index_row(sample: Sample, offsets: dict[str, int], parts: dict[str, bytes]) -> list[int]:
    places = [offsets["jpg"], len(parts["jpg"]), offsets["json"], len(parts["json"])]
    num_empty = INDEX_DTYPE["text_hash"].shape[0] - len(sample.captions)
    hashes = [text_hash(caption.text) for caption in sample.captions] + [0] * num_empty
    codes = [ASPECT_CODE[caption.aspect] for caption in sample.captions] + [NO_ASPECT_CODE] * num_empty
    return [*places, *hashes, *codes]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(shard_path: Path, inputs_digest: str) -> ShardRecord | None:
    """The sidecar of a shard that was made from the same inputs and is whole, else None.

    Reads the shard's bytes, so that preparing again mends what `verify` complains of.
    """
    try:
        record = ShardRecord.model_validate_json(shard_path.with_suffix(".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if record.inputs_digest != inputs_digest:
        return None
    if record.info.num_samples == 0:
        return record
    return record if shard_path.is_file() and file_sha256(shard_path) == record.info.sha256 else None


def write_manifest(
    directory: Path,
    records: Sequence[ShardRecord],
    *,
    dataset: str,
    split: str,
    image_short_side: int,
    decomposer: str,
    config_digest: str,
) -> ShardManifest:
    """`index.npy`, then `manifest.json`: each whole or absent. Shards without a sample are left out."""
    kept = [record for record in records if record.info.num_samples]
    index = np.zeros(sum(record.info.num_samples for record in kept), dtype=INDEX_DTYPE)
    num_slots = INDEX_DTYPE["text_hash"].shape[0]
    start = 0
    for shard, record in enumerate(kept):
        part = index[start : start + record.info.num_samples]
        part["shard"] = shard
        for position, row in enumerate(record.index_rows):
            part["image_offset"][position], part["image_num_bytes"][position] = row[0], row[1]
            part["json_offset"][position], part["json_num_bytes"][position] = row[2], row[3]
            part["text_hash"][position] = row[4 : 4 + num_slots]
            part["text_aspect"][position] = row[4 + num_slots :]
        start += len(part)
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    aspects, counts = np.unique(index["text_aspect"], return_counts=True)
    by_code = dict(zip(aspects.tolist(), counts.tolist(), strict=True))
    manifest = ShardManifest(
        dataset=dataset,
        split=split,
        num_samples=len(index),
        shards=tuple(record.info for record in kept),
        index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        image_short_side=image_short_side,
        captions_by_aspect={a: by_code[c] for a, c in ASPECT_CODE.items() if by_code.get(c)},
        samples_by_diagnosis=_total(record.diagnoses for record in kept),
        samples_by_licence=_total(record.licences for record in kept),
        num_rejected=sum(len(record.rejected) for record in records),
        notes=_total(record.notes for record in kept),
        decomposer=decomposer,
        config_digest=config_digest,
    )
    write_atomically(directory / "index.npy", buffer.getvalue())
    write_atomically(directory / "manifest.json", manifest.model_dump_json(indent=1).encode())
    return manifest


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def write_ledger(directory: Path, records: Sequence[ShardRecord]) -> None:
    """`rejected.csv`: one line for each row of the source that did not become a sample."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["table", "row", "field", "reason"])
    writer.writerows([r.table, r.row, r.field, r.reason] for record in records for r in record.rejected)
    write_atomically(directory / "rejected.csv", text.getvalue().encode())


def verify(directory: Path) -> ShardManifest:
    """Every byte of a split against its SHA-256. Raises InputError for the first file that differs."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: no manifest here; make the shards with `dermvlp prepare CONFIG`")
    try:
        manifest = ShardManifest.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not a manifest ({error}); run `dermvlp prepare` again") from None
    expected = {shard.name: shard.sha256 for shard in manifest.shards} | {"index.npy": manifest.index_sha256}
    for name, sha256 in expected.items():
        if not (directory / name).is_file() or file_sha256(directory / name) != sha256:
            raise InputError(
                f"{directory / name}: missing, or its SHA-256 is not the manifest's; run `dermvlp prepare` again"
            )
    return manifest
