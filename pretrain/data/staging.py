"""A prepared folder, copied to the node's own disk before it is read.

    STAGE_DIR/<digest of manifest.json>/   shards, index.npy, and manifest.json, which is written last

So a staged folder is a prepared folder like any other: with a manifest it is whole, and whoever finds it may read it.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.errors import InputError
from data_prep.files import atomic, disk_errors, lock, remove_stale_partials, write_atomically
from pretrain.data.manifest import read_manifest

_NUM_COPIES = 4  # at a time: a parallel file system gives one reader a part of its speed
_BUFFER_BYTES = 1 << 24
_WITHOUT_END = -1.0  # seconds


def stage(directory: Path, stage_dir: Path) -> Path:
    """Copies what training reads of a prepared folder below `stage_dir`, and returns the copy.

    Every process of a node calls it. The first one copies, under a lock that a killed process lets go of; the others
    wait for the lock and find the copy, as do other jobs on the node and later runs. Files of the right size are not
    copied again. Nothing is ever removed here, but for what killed processes left unfinished.

    Raises InputError where the folder cannot be made, the disk has no room for it, with the numbers, or a shard is not
    of the manifest's size.
    """
    manifest = read_manifest(directory)
    content = (directory / "manifest.json").read_bytes()
    folder = stage_dir / hashlib.sha256(content).hexdigest()[:16]
    sizes = {shard.name: shard.num_bytes for shard in manifest.shards}
    sizes["index.npy"] = _size(directory / "index.npy") or 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"data.stage_dir: {stage_dir}: {error.strerror}; name a folder of the node's own disk that can be written, "
            "or leave it out and read from train_dir"
        ) from None
    with disk_errors(folder), lock(folder / ".lock", "staging", wait_s=_WITHOUT_END):
        missing = [name for name, size in sizes.items() if _size(folder / name) != size]
        if missing:
            remove_stale_partials(folder)
            (folder / "manifest.json").unlink(missing_ok=True)  # not whole until the end
            _check_room(folder, sum(sizes[name] for name in missing))
            _copy_all(directory, folder, missing, sizes)
        if not (folder / "manifest.json").is_file():
            write_atomically(folder / "manifest.json", content)
    return folder


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise InputError(
            f"data.stage_dir: {folder} needs {num_bytes / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB free; "
            "make room, choose another folder, or leave stage_dir out and read from train_dir"
        )


def _copy_all(directory: Path, folder: Path, names: Sequence[str], sizes: dict[str, int]) -> None:
    num_bytes = sum(sizes[name] for name in names)
    print(f"staging {len(names)} files, {num_bytes / 1e9:.2f} GB, in {folder}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(_NUM_COPIES) as pool:
        copies = [pool.submit(_copy, directory / name, folder / name, sizes[name]) for name in names]
        try:
            for copy in copies:
                copy.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a full disk is full for the others, too
            raise


def _copy(source: Path, target: Path, num_bytes: int) -> None:
    if _size(source) != num_bytes:
        raise InputError(f"{source}: missing or not of the size in manifest.json; run `dermvlp prepare` again")
    with source.open("rb") as reading, atomic(target) as writing:
        shutil.copyfileobj(reading, writing, _BUFFER_BYTES)
        if writing.tell() != num_bytes:
            raise InputError(f"{source}: {writing.tell()} bytes, and {num_bytes} a moment ago; is it being prepared?")
