"""Every distinct image of a source, read and decoded once: facts and the JPEG that goes into a shard.

    images in the order in which rows first name them -> chunks -> WORK/scan/chunk-N.{jpegs,npy,json}

A chunk is a pure function of its images and the image options. So chunks are made in parallel, by any number of jobs,
and a killed scan goes on where it was. The JSON is written last and says what the chunk was made from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from data_prep import pool
from data_prep.config import ImageOptions, PrepareConfig
from data_prep.errors import InputError
from data_prep.files import atomic, file_sha256, write_atomically
from data_prep.images.convert import MISSING, ImageRejected, PreparedImage, prepare_drawn, prepare_image, read_image
from data_prep.salt import hash_name
from data_prep.sources.base import ImageReference
from data_prep.sources.synthetic import draw

#: Part of every chunk's digest: another version of the image code scans again.
SCAN_VERSION = 1

#: What is known of an image; `offset` is in its chunk's file of JPEGs. All zero but `name` where it was rejected.
FACT_DTYPE = np.dtype(
    [
        ("name", "<u8"),  # salted hash of ImageReference.name
        ("chunk", "<u4"),
        ("offset", "<u8"),
        ("num_bytes", "<u4"),
        ("sha256", "u1", (32,)),  # of the JPEG
        ("pixels", "u1", (32,)),
        ("perceptual", "<u8", (4,)),
        ("reencoded", "?"),
        ("rejected", "?"),
    ]
)


class ChunkRecord(BaseModel):
    inputs_digest: str  # of the images' names, sizes and times, and the options
    options_digest: str = ""  # of the options alone: what a plan can check
    num_images: int
    num_bytes: int
    sha256: str  # of the file of JPEGs
    reasons: dict[int, str]  # position in the chunk -> why it was rejected
    is_final: bool = True  # False: an image could not be read just then, and is tried again by the next scan


# ---------------------------------------------------------------------------------------------- chunks


def scan(
    images: Iterable[ImageReference],
    directory: Path,
    config: PrepareConfig,
    salt: str,
    wanted: Callable[[int], bool],
    advance: Callable[[int], None],
    accept_changes: bool = False,
) -> None:
    """Make the chunks of these images whose numbers are wanted; `advance` is told how many images are done.

    Raises InputError where images that were read before cannot be found or read now, unless `accept_changes`: a disk
    that is away must not empty a preparation.
    """
    directory.mkdir(parents=True, exist_ok=True)
    chunks = (chunk for chunk in _chunks(images, config.images_per_chunk) if wanted(chunk[0]))
    for num_images in pool.run(
        partial(_scan_chunk, directory, config.images, salt, accept_changes), chunks, config.num_workers
    ):
        advance(num_images)


def _chunks(images: Iterable[ImageReference], size: int) -> Iterator[tuple[int, list[ImageReference]]]:
    stream, number = iter(images), 0
    while chunk := list(islice(stream, size)):
        yield number, chunk
        number += 1


def distinct(images: Iterable[ImageReference], salt: str) -> Iterator[ImageReference]:
    """Each image once, where it first appears: an image with five captions is read once."""
    seen: set[int] = set()
    for image in images:
        if (name := hash_name(image.name, salt)) not in seen:
            seen.add(name)
            yield image


def _scan_chunk(
    directory: Path, options: ImageOptions, salt: str, accept_changes: bool, chunk: tuple[int, list[ImageReference]]
) -> int:
    """In a worker process. Nothing to do where the chunk was made from the same images before."""
    number, images = chunk
    path = directory / f"chunk-{number:06d}"
    digest = _inputs_digest(images, options)
    if _is_whole(path, digest):
        return len(images)
    facts, reasons = np.zeros(len(images), dtype=FACT_DTYPE), {}
    facts["name"], facts["chunk"] = [hash_name(image.name, salt) for image in images], number
    lost: list[int] = []
    found = facts[["offset", "num_bytes", "sha256", "pixels", "perceptual", "reencoded"]]  # a view
    num_bytes, sha256 = 0, hashlib.sha256()
    with atomic(path.with_suffix(".jpegs")) as file:
        for position, image in enumerate(images):
            try:
                prepared = _prepare(image, options)
            except ImageRejected as problem:
                facts["rejected"][position], reasons[position] = True, str(problem)
                if problem.may_pass or problem.is_missing:
                    lost.append(position)
                continue
            hashes = (bytes.fromhex(prepared.sha256), prepared.pixel_sha256)
            found[position] = (
                *(num_bytes, len(prepared.jpeg), *(np.frombuffer(each, dtype=np.uint8) for each in hashes)),
                *(prepared.perceptual_hash, prepared.reencoded),
            )
            file.write(prepared.jpeg)
            sha256.update(prepared.jpeg)
            num_bytes += len(prepared.jpeg)
        if not accept_changes:
            _refuse_losses(path, facts, lost)
        path.with_suffix(".json").unlink(missing_ok=True)  # from here on the old record describes nothing
    with atomic(path.with_suffix(".npy")) as file:
        np.save(file, facts, allow_pickle=False)
    record = ChunkRecord(
        is_final=not any(reasons[position] != MISSING for position in lost),
        options_digest=options_digest(options),
        inputs_digest=digest,
        num_images=len(images),
        num_bytes=num_bytes,
        sha256=sha256.hexdigest(),
        reasons=reasons,
    )
    write_atomically(path.with_suffix(".json"), record.model_dump_json().encode())
    return len(images)


def _refuse_losses(path: Path, facts: NDArray[np.void], lost: list[int]) -> None:
    try:
        before: NDArray[np.void] = np.load(path.with_suffix(".npy"), allow_pickle=False)
    except (FileNotFoundError, ValueError):
        return
    if before.dtype != FACT_DTYPE:
        return
    read = set(before["name"][~before["rejected"]].tolist())
    if gone := [position for position in lost if int(facts["name"][position]) in read]:
        raise InputError(
            f"{path}: {len(gone)} images that were read before cannot be read now; is their folder away? Bring them "
            "back, or run with --accept-changes to leave their rows out"
        )


def _prepare(image: ImageReference, options: ImageOptions) -> PreparedImage:
    if image.synthetic_seed is not None and image.synthetic_px is not None:
        return prepare_drawn(draw(image.synthetic_seed, image.synthetic_px), options)
    return prepare_image(read_image(image), options)


def options_digest(options: ImageOptions) -> str:
    """Names the image options and the version of this code: chunks of another digest are of no use to a plan."""
    return hashlib.sha256(f"{SCAN_VERSION} {options.model_dump_json()}".encode()).hexdigest()[:16]


def _inputs_digest(images: list[ImageReference], options: ImageOptions) -> str:
    digest = hashlib.sha256(options_digest(options).encode())
    status: dict[Path, str] = {}  # of tars that hold many of them
    for image in images:
        if image.path is not None and image.path not in status:
            try:
                found = image.path.stat()
                status[image.path] = f"{found.st_size} {found.st_mtime_ns}"
            except (OSError, ValueError):  # missing now; another digest when it is there
                status[image.path] = "missing"
        where = (image.name, image.offset, image.num_bytes, image.synthetic_seed, image.synthetic_px)
        digest.update(f"{where} {status.get(image.path) if image.path else ''}\n".encode())
    return digest.hexdigest()


def _read_record(path: Path) -> ChunkRecord | None:
    try:
        return ChunkRecord.model_validate_json(path.with_suffix(".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _is_whole(path: Path, inputs_digest: str) -> bool:
    """Files appear whole or not at all, so sizes are enough here; `damaged` reads the bytes."""
    record = _read_record(path)
    jpegs = path.with_suffix(".jpegs")
    return (
        record is not None
        and record.is_final
        and record.inputs_digest == inputs_digest
        and path.with_suffix(".npy").is_file()
        and jpegs.is_file()
        and jpegs.stat().st_size == record.num_bytes
    )


# ---------------------------------------------------------------------------------------------- reading back


def load(directory: Path, names: NDArray[np.uint64], config: PrepareConfig) -> tuple[NDArray[np.void], dict[int, str]]:
    """((N,) FACT_DTYPE, position -> reason of a rejection) of all images, named in order by `names` (N,).

    Raises InputError where a chunk is missing or was made from other images or under other image options.
    """
    parts, reasons, start, images_per_chunk = [], dict[int, str](), 0, config.images_per_chunk
    num_chunks = -(-len(names) // images_per_chunk)
    for number in range(num_chunks):
        path = directory / f"chunk-{number:06d}"
        record = _read_record(path)
        if record is None or not path.with_suffix(".npy").is_file():
            raise InputError(
                f"{path}: chunk {number} of {num_chunks} is not scanned; run the stage scan (all its parts) first"
            )
        facts: NDArray[np.void] = np.load(path.with_suffix(".npy"), allow_pickle=False)
        if facts.dtype != FACT_DTYPE or not np.array_equal(facts["name"], names[start : start + images_per_chunk]):
            raise InputError(f"{path}: scanned from other images; run the stage scan (all its parts) again")
        if record.options_digest != options_digest(config.images):
            raise InputError(f"{path}: scanned under other options of images; run the stage scan (all its parts) again")
        parts.append(facts)
        reasons |= {start + position: reason for position, reason in record.reasons.items()}
        start += len(facts)
    return (np.concatenate(parts) if parts else np.zeros(0, dtype=FACT_DTYPE)), reasons


class JpegReader:
    """Reads the JPEGs that go into shards. Neighbours are mostly in one chunk, which stays open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._chunk, self._file = -1, -1

    def read(self, fact: np.void) -> bytes:
        """Raises InputError where the bytes are missing or not what they were."""
        chunk = int(fact["chunk"])
        path = self._directory / f"chunk-{chunk:06d}.jpegs"
        if chunk != self._chunk:
            self.close()
            try:
                self._file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise InputError(f"{path}: missing; run the stage scan again") from None
            self._chunk = chunk
        jpeg = os.pread(self._file, int(fact["num_bytes"]), int(fact["offset"]))
        if hashlib.sha256(jpeg).digest() != fact["sha256"].tobytes():
            raise InputError(
                f"{path}: not what was planned from: scanned again since (run the stage plan), or damaged (run "
                "`dermvlp repair` on the folder of the preparation, or remove this file and prepare again)"
            )
        return jpeg

    def close(self) -> None:
        if self._chunk >= 0:
            os.close(self._file)
        self._chunk = -1

    def __enter__(self) -> JpegReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_jpeg(directory: Path, fact: np.void) -> bytes:
    """One image alone; see `JpegReader`."""
    with JpegReader(directory) as reader:
        return reader.read(fact)


def is_damaged(directory: Path, number: int) -> bool:
    """Whether a chunk is missing or its bytes differ from what its record says."""
    path = directory / f"chunk-{number:06d}.jpegs"
    record = _read_record(path)
    return record is None or not path.is_file() or file_sha256(path) != record.sha256


def read_facts(directory: Path, number: int) -> NDArray[np.void]:
    facts: NDArray[np.void] = np.load(directory / f"chunk-{number:06d}.npy", allow_pickle=False)
    return facts


def forget(directory: Path, number: int) -> None:
    """The chunk is made again by the next scan that wants it."""
    (directory / f"chunk-{number:06d}.json").unlink(missing_ok=True)
