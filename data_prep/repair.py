"""Shards whose bytes are not what their manifest says, made again; nothing else is."""

from __future__ import annotations

from pathlib import Path

from data_prep.config import PrepareConfig, load_config
from data_prep.errors import InputError
from data_prep.images import scan
from data_prep.job import Job
from data_prep.planning.plan import SPLITS
from data_prep.prepare import prepare
from data_prep.shards.manifest import damaged_shards, read_manifest
from data_prep.shards.stage import config_of


def repair(out_dir: Path) -> list[Path]:
    """Returns the shards that were made again, byte for byte as they were.

    Raises InputError where the source changed since, or where a shard came out different (another version of the
    program or of Pillow): then the manifest says what the folder holds now.
    """
    config = load_config(config_of(out_dir), [], PrepareConfig).model_copy(update={"out_dir": out_dir})
    splits = [out_dir / name for name in SPLITS.values() if (out_dir / name / "manifest.json").is_file()]
    before = {directory: read_manifest(directory) for directory in splits}
    damaged = [path for directory in splits for path in damaged_shards(directory)]
    scan.remove_damaged(Job(config).scan_dir)
    after = prepare(config)
    for directory, manifest in before.items():
        if after[manifest.split].shards != manifest.shards:
            raise InputError(f"{directory}: shards were made again with other bytes than before; see its manifest.json")
    return damaged
