"""What stands in a split's folder besides its shards: index, image hashes, manifest, ledgers; and reading them back."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.files import file_sha256, write_atomically
from data_prep.schema import ASPECT_CODE, HASH_DTYPE, INDEX_DTYPE, Sample, ShardManifest, text_hash
from data_prep.shards.shard import ShardRecord


def write_manifest(
    directory: Path,
    records: Sequence[ShardRecord],
    *,
    dataset: str,
    split: str,
    image_short_side: int,
    decomposer: str,
    config_digest: str,
    num_rejected: int,
) -> ShardManifest:
    """`index.npy` and `image_hashes.npy`, then `manifest.json`: each whole or absent. Empty shards are left out.

    `num_rejected` is of the whole preparation: a rejected row need not have a split.
    """
    kept = [record for record in records if record.info.num_samples]
    index = np.concatenate([np.zeros(0, dtype=INDEX_DTYPE), *(record.index_array() for record in kept)])
    index["shard"] = np.repeat(np.arange(len(kept)), [record.info.num_samples for record in kept])
    hashes = np.concatenate([np.zeros(0, dtype=HASH_DTYPE), *(record.hash_array() for record in kept)])
    codes, counts = np.unique(index["text_aspect"], return_counts=True)
    by_code = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    manifest = ShardManifest(
        dataset=dataset,
        split=split,
        num_samples=len(index),
        shards=tuple(record.info for record in kept),
        index_sha256=_write_array(directory / "index.npy", index),
        hashes_sha256=_write_array(directory / "image_hashes.npy", hashes),
        image_short_side=image_short_side,
        captions_by_aspect={a: by_code[c] for a, c in ASPECT_CODE.items() if by_code.get(c)},
        samples_by_diagnosis=total(record.counts["diagnosis"] for record in kept),
        samples_by_licence=total(record.counts["licence"] for record in kept),
        samples_by_source=total(record.counts["source"] for record in kept),
        num_rejected=num_rejected,
        notes=total(record.notes for record in kept),
        decomposer=decomposer,
        config_digest=config_digest,
    )
    write_atomically(directory / "manifest.json", manifest.model_dump_json(indent=1).encode())
    return manifest


def _write_array(path: Path, array: NDArray[np.void]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of counts, the commonest first."""
    result: Counter[str] = Counter()
    for count in counts:
        result.update(count)
    return dict(result.most_common())


# ---------------------------------------------------------------------------------------------- reading back


def read_manifest(directory: Path) -> ShardManifest:
    """Raises InputError where there is none, or none of this version."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: no manifest here; make the shards with `dermvlp prepare CONFIG`")
    try:
        return ShardManifest.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not a manifest ({error}); run `dermvlp prepare` again") from None


def read_hashes(directory: Path) -> NDArray[np.void]:
    """(num_samples,) HASH_DTYPE of a split. Raises InputError where it does not fit its manifest."""
    path, manifest = directory / "image_hashes.npy", read_manifest(directory)
    try:
        hashes: NDArray[np.void] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run `dermvlp prepare` again") from None
    if hashes.dtype != HASH_DTYPE or len(hashes) != manifest.num_samples:
        raise InputError(f"{path}: does not fit its manifest.json; run `dermvlp prepare` again")
    return hashes


def read_sample(directory: Path, manifest: ShardManifest, row: np.void) -> Sample:
    """The sample of one row of the index."""
    with (directory / manifest.shards[int(row["shard"])].name).open("rb") as file:
        file.seek(int(row["json_offset"]))
        return Sample.model_validate_json(file.read(int(row["json_num_bytes"])))


def read_image(directory: Path, manifest: ShardManifest, row: np.void) -> bytes:
    """The JPEG of one row of the index."""
    with (directory / manifest.shards[int(row["shard"])].name).open("rb") as file:
        file.seek(int(row["image_offset"]))
        return file.read(int(row["image_num_bytes"]))


def verify(directory: Path) -> ShardManifest:
    """Reads everything back: each file against its SHA-256, then each sample against its row of the index.

    Raises InputError for the first file or sample that differs.
    """
    manifest = read_manifest(directory)
    expected = {"index.npy": manifest.index_sha256, "image_hashes.npy": manifest.hashes_sha256}
    for name, sha256 in expected.items():
        _check_file(directory / name, sha256)
    index = np.load(directory / "index.npy", allow_pickle=False)
    keys: set[str] = set()
    for number, shard in enumerate(manifest.shards):
        _check_file(directory / shard.name, shard.sha256)
        rows = index[index["shard"] == number]
        if len(rows) != shard.num_samples:
            raise InputError(f"{directory / shard.name}: the index has another number of its samples; prepare again")
        with (directory / shard.name).open("rb") as file:
            for row in rows:
                key = _check_sample(file, row, directory / shard.name)
                if key in keys:
                    raise InputError(f"{directory / shard.name}: {key} stands in this split twice; prepare again")
                keys.add(key)
    return manifest


def damaged_shards(directory: Path) -> list[Path]:
    """Shards of the manifest that are missing or whose bytes differ. Raises InputError without a manifest."""
    paths = [(directory / shard.name, shard.sha256) for shard in read_manifest(directory).shards]
    return [path for path, sha256 in paths if not path.is_file() or file_sha256(path) != sha256]


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file() or file_sha256(path) != sha256:
        raise InputError(
            f"{path}: missing, or its SHA-256 is not the manifest's; run `dermvlp repair` on the preparation's folder"
        )


def _check_sample(file: io.BufferedReader, row: np.void, path: Path) -> str:
    """The sample's key."""
    file.seek(int(row["image_offset"]))
    jpeg = file.read(int(row["image_num_bytes"]))
    file.seek(int(row["json_offset"]))
    try:
        sample = Sample.model_validate_json(file.read(int(row["json_num_bytes"])))
    except ValueError as error:
        raise InputError(f"{path}: byte {int(row['json_offset'])}: not a sample ({error}); prepare again") from None
    texts = row["text_hash"][: len(sample.captions)].tolist()
    if sample.image_sha256 != hashlib.sha256(jpeg).hexdigest() or texts != [text_hash(c.text) for c in sample.captions]:
        raise InputError(f"{path}: {sample.key}: image or captions are not those of the index; prepare again")
    return sample.key
