"""Shards whose bytes are not what their manifest says, made again; nothing else is touched, and no model is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.config import PrepareConfig
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.files import disk_errors, file_sha256, lock
from data_prep.images import scan
from data_prep.job import Job
from data_prep.planning.plan import SPLITS
from data_prep.planning.stage import Planned, load
from data_prep.shards.manifest import damaged_shards, read_manifest
from data_prep.shards.report import write_preparation_report
from data_prep.shards.stage import check_records, merge_stage, shard_stage
from data_prep.sources.base import Rejection

Place = tuple[str, int]  # split, number of the shard


def repair(out_dir: Path) -> list[Path]:
    """Returns the shards that were made again, byte for byte as they were.

    Raises InputError, before anything is written, where what they were made from is not at hand any more: another
    source, salt or configuration, images that changed or are gone.
    """
    job = Job(_config_of(out_dir).model_copy(update={"out_dir": out_dir}))
    with disk_errors(out_dir), lock(job.whole_lock_path, "a preparation"):
        splits = [path.parent for path in sorted(out_dir.glob("*/manifest.json"))]
        damaged = [path for directory in splits for path in damaged_shards(directory)]
        planned = load(job)
        for name in SPLITS.values():
            if len(planned.positions(name)) and out_dir / name not in splits:
                raise InputError(f"{out_dir / name}: no manifest; finish the preparation with `dermvlp prepare` first")
        if not damaged and not any(_arrays_differ(directory) for directory in splits):
            return []
        before = {directory: read_manifest(directory).shards for directory in splits}
        places = {_place(path) for path in damaged}
        check_records(job, planned, but=places)
        _mend_chunks(job, planned, places)
        shard_stage(job, planned, lambda num_rows: None, only=places)
        manifests, records = merge_stage(job, planned)
        write_preparation_report(job, planned, manifests, records)
    for directory, shards in before.items():
        if read_manifest(directory).shards != shards:
            raise InputError(
                f"{directory}: made again with other bytes, by another version of the program or other answers of a "
                "model; its manifest.json says what it holds now"
            )
    return damaged


def _config_of(out_dir: Path) -> PrepareConfig:
    path = out_dir / "work" / "prepare.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no preparation here: give the out_dir of `dermvlp prepare`, with its work folder")
    return load_config(path, [], PrepareConfig)


def _place(path: Path) -> Place:
    return path.parent.name, int(path.stem.removeprefix("shard-"))


def _mend_chunks(job: Job, planned: Planned, places: set[Place]) -> None:
    """Scans damaged chunks again that the damaged shards are made from."""
    chunks = {
        chunk
        for place in places
        for chunk in np.unique(planned.of_shard(*place, job.config.samples_per_shard)[1]["chunk"]).tolist()
    }
    damaged = {
        chunk for chunk in chunks if scan.is_damaged(job.scan_dir, chunk) or not _is_planned(job, planned, chunk)
    }
    if not damaged:
        return
    for chunk in damaged:
        scan.forget(job.scan_dir, chunk)
    rows = (row for row in job.source.rows() if not isinstance(row, Rejection))
    images = scan.distinct((row.image for row in rows), job.salt)
    scan.scan(images, job.scan_dir, job.config, job.salt, lambda number: number in damaged, lambda num_images: None)
    for chunk in damaged:
        if not np.array_equal(scan.read_facts(job.scan_dir, chunk), planned.facts[planned.facts["chunk"] == chunk]):
            raise InputError(
                f"{job.scan_dir}: the images of chunk {chunk} are not what they were (changed, gone, or their folder "
                "is away); bring them back and run `dermvlp repair` again"
            )


def _is_planned(job: Job, planned: Planned, chunk: int) -> bool:
    try:
        return np.array_equal(scan.read_facts(job.scan_dir, chunk), planned.facts[planned.facts["chunk"] == chunk])
    except (FileNotFoundError, ValueError):
        return False


def _arrays_differ(directory: Path) -> bool:
    manifest = read_manifest(directory)
    expected = {"index.npy": manifest.index_sha256, "image_hashes.npy": manifest.hashes_sha256}
    return any(
        not (directory / name).is_file() or file_sha256(directory / name) != sha256 for name, sha256 in expected.items()
    )
