"""Features of a data set on disk while they are computed: a file for every CHUNK_ROWS rows, each whole or absent.

Shapes: n images of a chunk that could be decoded, L width of the layer.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.files import atomic

CHUNK_ROWS = 256  # lost at most by a kill


@dataclass(frozen=True)
class Chunk:
    """Features of CHUNK_ROWS rows of a data set, or of its last ones."""

    rows: NDArray[np.int64]  # (n,) of the images that could be decoded, ascending
    features: NDArray[np.float32]  # (n, L); (0, 0) where n is 0
    rejected: dict[int, str]  # row -> why its image could not be decoded


@dataclass(frozen=True)
class ChunkRows:
    """A chunk without its features."""

    rows: NDArray[np.int64]
    width: int  # L; 0 where no image could be decoded
    rejected: dict[int, str]


def chunk_paths(chunks_dir: Path, num_rows: int) -> list[Path]:
    """The files of a data set of so many rows, whether they are there or not."""
    return [chunks_dir / f"{number:06d}.npz" for number in range(-(-num_rows // CHUNK_ROWS))]


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Whole or not at all."""
    with atomic(path) as file:
        np.savez(
            file,
            rows=chunk.rows,
            features=chunk.features,
            width=np.int64(chunk.features.shape[1]),
            rejected=np.array(list(chunk.rejected), dtype=np.int64),
            reasons=np.array(list(chunk.rejected.values()), dtype=np.str_),
        )


def read_rows(path: Path) -> ChunkRows:
    """Raises InputError for a file that is damaged."""
    with _damage(path), np.load(path, allow_pickle=False) as file:
        rejected = dict(zip(file["rejected"].tolist(), file["reasons"].tolist(), strict=True))
        return ChunkRows(file["rows"], int(file["width"]), rejected)


def read_features(path: Path) -> NDArray[np.float32]:
    """(n, L). Raises InputError for a file that is damaged."""
    with _damage(path), np.load(path, allow_pickle=False) as file:
        features: NDArray[np.float32] = file["features"]
        return features


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, and it is computed anew") from None


def shape_of(chunks: Sequence[ChunkRows]) -> tuple[int, int]:
    """(number of images, L) over all chunks. Raises InputError where no image could be decoded."""
    num_images = sum(len(chunk.rows) for chunk in chunks)
    if not num_images:
        reason = next(iter(chunks[0].rejected.values()))
        raise InputError(f"no image could be decoded; the first: {reason}")
    return num_images, max(chunk.width for chunk in chunks)


def write_npy(path: Path, chunks: Sequence[Path]) -> None:
    """The features of all chunks as one array (images, L) float32, a chunk in memory at a time. Whole or not at all.

    Raises InputError where no image could be decoded.
    """
    shape = shape_of([read_rows(chunk) for chunk in chunks])
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    with atomic(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(read_features(chunk).tobytes())
