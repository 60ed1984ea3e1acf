"""Images of an evaluation set that the training data holds too: equal pixels, or near copies in the sense of data_prep.

The training split has its hashes with it (image_hashes.npy); the evaluation images are hashed here as `dermvlp prepare`
hashes: read fully, turned upright, reduced to the shards' size. People are not compared: their hashes are salted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep import pool
from data_prep.config import DuplicateOptions, ImageOptions
from data_prep.errors import InputError, PassingError
from data_prep.files import atomic
from data_prep.images.duplicates import near_pairs
from data_prep.images.fingerprints import FINGERPRINT_DTYPE, numbered_fingerprints
from data_prep.images.scan import SCAN_VERSION
from data_prep.progress import Progress
from data_prep.schema import HASH_DTYPE, ShardManifest
from data_prep.shards.manifest import read_hashes, read_manifest
from pretrain.evaluation.datasets import EvalSet
from pretrain.evaluation.interfaces import EvalData
from pretrain.evaluation.results import Leakage

MAX_DISTANCE = DuplicateOptions().max_distance  # bits of 256: what `dermvlp prepare` calls a near copy
_CHUNK = 64  # images that a worker gets at once


def overlap(
    data: EvalData,
    training_dirs: Path | Sequence[Path],
    cache_dir: Path | None = None,
    *,
    num_workers: int = 2,
    max_distance: int = MAX_DISTANCE,
    left_out: Collection[int] = (),
) -> tuple[NDArray[np.bool_], Leakage]:
    """((n,) whether the training data holds the row's image, the counts of the rows that are tested on), both of the
    rows that are not `left_out`. Hashes are kept for all of them.

    training_dirs: split folders (manifest.json, image_hashes.npy). cache_dir: where the evaluation images' hashes are
    kept for the next time. num_workers: processes; 0: none. Rows of one image count each.

    Raises InputError for a folder that is no split, or that was prepared without hashes.
    """
    folders = [training_dirs] if isinstance(training_dirs, Path) else list(training_dirs)
    if not folders:
        raise InputError("leakage: no training data given; name the split folders that the model was trained on")
    num = len(data.rows)
    same_N, near_N, unknown_N = np.zeros(num, bool), np.zeros(num, bool), np.zeros(num, bool)
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        train_M = read_hashes(folder)
        eval_N = hash_images(data, manifest.image_short_side, cache_dir, num_workers)
        known = np.flatnonzero(eval_N["is_known"])
        same_N[known] |= _in(eval_N["pixels"][known], train_M["pixels"])
        words_N4, words_M4 = (np.ascontiguousarray(hashes["perceptual"]) for hashes in (eval_N[known], train_M))
        if len(known) and len(train_M):
            near_N[known[near_pairs(words_N4, max_distance, words_M4)[0]]] = True
        unknown_N |= ~eval_N["is_known"]
    kept_N = ~np.isin(np.arange(num), list(left_out))
    tested_N = np.array([not row.is_train for row in data.rows]) & kept_N
    return (same_N | near_N)[kept_N], Leakage(
        training_data=", ".join(_name(manifest) for manifest in manifests),
        num_compared=int(tested_N.sum()),
        num_same_pixels=int((same_N & tested_N).sum()),
        num_near=int((near_N & ~same_N & tested_N).sum()),
        num_without_hash=int((unknown_N & tested_N).sum()),
    )


def _name(manifest: ShardManifest) -> str:
    return f"{manifest.dataset}/{manifest.split}"


def _in(hashes_N32: NDArray[np.uint8], others_M32: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each SHA-256 is among the others."""
    whole = np.dtype((np.void, 32))
    mine, others = (np.ascontiguousarray(hashes).view(whole).ravel() for hashes in (hashes_N32, others_M32))
    found: NDArray[np.bool_] = np.isin(mine, others)
    return found


# ---------------------------------------------------------------------------------------------- hashes


def hash_images(
    data: EvalData, short_side_px: int, cache_dir: Path | None = None, num_workers: int = 2
) -> NDArray[np.void]:
    """(N,) FINGERPRINT_DTYPE of the images as they would stand in shards of this size."""
    if isinstance(data, EvalSet) and data.shards_dir is not None:
        return _of_shards(data, data.shards_dir)
    path = None if cache_dir is None else cache_dir / f"image_hashes-{data.digest}-{short_side_px}px-{SCAN_VERSION}.npy"
    if path is not None and (kept := _read(path, len(data.rows))) is not None:
        return kept
    # the smallest images are not fit for training, and can well be copies
    options = ImageOptions(short_side_px=short_side_px, min_side_px=1)
    hashes = np.zeros(len(data.rows), FINGERPRINT_DTYPE)
    work = partial(numbered_fingerprints, options)
    is_small = num_workers == 0 or len(hashes) <= _CHUNK  # processes take longer to start than this takes
    done = map(work, _chunks(data)) if is_small else pool.run(work, _chunks(data), num_workers)
    with Progress("comparing with the training data", unit="images", total=len(hashes)) as progress:
        for start, part in done:
            hashes[start : start + len(part)] = part
            progress.advance(len(part))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            np.save(file, hashes, allow_pickle=False)
    return hashes


def _of_shards(data: EvalSet, shards_dir: Path) -> NDArray[np.void]:
    """Prepared shards have theirs. Of another size than the training data's, equal pictures are near copies."""
    found = read_hashes(shards_dir)[list(data.positions)]
    hashes = np.zeros(len(found), FINGERPRINT_DTYPE)
    for field in HASH_DTYPE.names or ():
        hashes[field] = found[field]
    hashes["is_known"] = True
    return hashes


def _chunks(data: EvalData) -> Iterator[tuple[int, list[bytes | None]]]:
    """Bytes, read here: workers need not know what kind of data set it is."""
    for start in range(0, len(data.rows), _CHUNK):
        chunk: list[bytes | None] = []
        for position in range(start, min(start + _CHUNK, len(data.rows))):
            try:
                chunk.append(data.read_image(position))
            except PassingError:
                raise
            except InputError:  # is counted; whoever encodes the image says which it is
                chunk.append(None)
        yield start, chunk


def _read(path: Path, num: int) -> NDArray[np.void] | None:
    try:
        hashes: NDArray[np.void] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # not there, or torn: made again
    return hashes if hashes.dtype == FINGERPRINT_DTYPE and len(hashes) == num else None
