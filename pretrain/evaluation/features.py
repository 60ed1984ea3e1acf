"""Features of a data set's images: encoded in chunks that survive a kill, then one file that is memory-mapped.

    FOLDER/MODEL-DATA-LAYER.npy             (N, L) float32, when all rows are there
    FOLDER/MODEL-DATA-LAYER.chunks/000003.npz   rows 768 ... 1023, until then

A batch holds the same rows whether a run was interrupted or not, so the features are equal bit by bit.

Shapes: N images, B of a batch, D joint width, L width of a layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.config import ImageOptions
from data_prep.errors import InputError
from data_prep.files import disk_errors, lock, remove_stale_partials
from data_prep.images.convert import ImageRejected, decode_image
from data_prep.progress import Progress
from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import from_workers
from pretrain.data.transforms import decode
from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.feature_chunks import CHUNK_ROWS, Chunk, chunk_paths, write_chunk, write_npy
from pretrain.evaluation.interfaces import JOINT, Encoder, EvalData

_PREFETCH_BATCHES = 2  # by each worker
_BATCH_SIZE = 64  # where no settings say
_DECODING = ImageOptions(min_side_px=1)


@dataclass(frozen=True)
class DecodedBatch:
    """Images ready for the encoder, and why others are not."""

    rows: tuple[int, ...]  # of the images, in order
    image_BCHW: Tensor | None  # None where no image of the batch could be decoded
    rejected: dict[int, str]  # row -> reason

    def pin_memory(self) -> DecodedBatch:
        pinned = None if self.image_BCHW is None else self.image_BCHW.pin_memory()
        return DecodedBatch(self.rows, pinned, self.rejected)


def features(
    encoder: Encoder, data: EvalData, layer: str, folder: Path, settings: EvaluationSettings
) -> NDArray[np.float32]:
    """(N, L) of all rows of `data`, in their order; memory-mapped from `folder`, where they are computed once.

    The name of the file is made of the model's digest, the data set's and the layer: other weights, other rows and
    another layer never meet. Raises InputError for an image that cannot be decoded, naming its key, and where another
    process is computing in `folder`.
    """
    stem = f"{encoder.info.digest}-{data.digest}-{layer}"
    path, chunks_dir = folder / f"{stem}.npy", folder / f"{stem}.chunks"
    if not path.is_file():
        with lock(folder / ".lock", "another computation of features"), disk_errors(folder):
            remove_stale_partials(folder)
            write_npy(path, encode_missing_chunks(encoder, data, layer, chunks_dir, settings, refuse_undecodable=True))
            shutil.rmtree(chunks_dir)
    return _mapped(path, len(data.rows))


def _mapped(path: Path, num_rows: int) -> NDArray[np.float32]:
    try:
        mapped: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, and it is computed anew") from None
    if mapped.dtype != np.float32 or mapped.ndim != 2 or len(mapped) != num_rows:
        raise InputError(f"{path}: not the features of {num_rows} images; remove it, and it is computed anew")
    return mapped


def embed_images(
    encoder: Encoder, images: Iterable[str | Path | Image.Image], layer: str = JOINT, batch_size: int = _BATCH_SIZE
) -> NDArray[np.float32]:
    """(N, D) unit vectors of image files or pictures of Pillow, in their order; (N, L) for another layer.

    A file is decoded as `dermvlp embed` does (upright, sRGB); a picture is taken as it stands. For many files use
    `dermvlp embed`: it decodes in worker processes and can be interrupted. Raises InputError, naming the file, for one
    that cannot be decoded, and for no image.
    """
    parts: list[Tensor] = []
    pixels: list[Tensor] = []
    for image in images:
        pixels.append(encoder.transform(image if isinstance(image, Image.Image) else _read_picture(Path(image))))
        if len(pixels) == batch_size:
            parts.append(encoder.encode_pixels(torch.stack(pixels), layer))
            pixels = []
    if pixels:
        parts.append(encoder.encode_pixels(torch.stack(pixels), layer))
    if not parts:
        raise InputError("no image to encode")
    return torch.cat(parts).numpy()


def _read_picture(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes(), _DECODING)
    except (OSError, ImageRejected) as error:
        raise InputError(f"{path}: {error}") from None


def shard_features(encoder: Encoder, data: ShardedDataset) -> NDArray[np.float32]:
    """(N, D) unit vectors of all samples of a split of shards, in the order of its index; in this process."""
    parts = []
    with Progress("encoding images", unit="images", total=len(data)) as progress:
        for start in range(0, len(data), _BATCH_SIZE):
            positions = range(start, min(start + _BATCH_SIZE, len(data)))
            images = torch.stack([encoder.transform(decode(data.read_image(position))) for position in positions])
            parts.append(encoder.encode_pixels(images))
            progress.advance(len(positions))
    return torch.cat(parts).numpy()


# -------------------------------------------------------------------------------------------------- decoded by workers


class _DecodedBatches(Dataset[DecodedBatch]):
    """Batch `number` of a data set: decoded in whichever process asks for it."""

    def __init__(self, data: EvalData, transform: Callable[[Image.Image], Tensor], batches: Sequence[range]) -> None:
        self.data, self.transform, self.batches = data, transform, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> DecodedBatch:
        pixels, rejected = {}, {}
        for row in self.batches[number]:
            try:
                pixels[row] = self.transform(decode_image(self.data.read_image(row), _DECODING))
            except (
                OSError
            ):  # the file is gone, or its disk is ill; what it says names the file, which could be a patient's
                rejected[row] = "the image file cannot be read"
            except (ImageRejected, InputError) as error:
                rejected[row] = str(error).removeprefix(f"{self.data.name}: {self.data.rows[row].key}: ")
        return DecodedBatch(tuple(pixels), torch.stack(list(pixels.values())) if pixels else None, rejected)


def batches_of(chunks: Iterable[int], num_rows: int, batch_size: int) -> list[range]:
    """The rows of each batch; a batch never reaches into another chunk."""
    batches = []
    for chunk in chunks:
        end = min((chunk + 1) * CHUNK_ROWS, num_rows)
        batches += [range(start, min(start + batch_size, end)) for start in range(chunk * CHUNK_ROWS, end, batch_size)]
    return batches


# ---------------------------------------------------------------------------------------------------------- in chunks


def encode_missing_chunks(
    encoder: Encoder,
    data: EvalData,
    layer: str,
    chunks_dir: Path,
    settings: EvaluationSettings,
    *,
    refuse_undecodable: bool,
) -> list[Path]:
    """The chunk files of all rows, those computed that were not there.

    Raises InputError for a layer that the encoder has not, and, if `refuse_undecodable`, for the first image that
    cannot be decoded, naming its key.
    """
    if layer not in encoder.layers:
        raise InputError(f"layer {layer!r}: {encoder.info.name} has {', '.join(encoder.layers)}")
    num_rows = len(data.rows)
    if not num_rows:
        raise InputError(f"{data.name}: no image to encode")
    chunks_dir.mkdir(parents=True, exist_ok=True)
    paths = chunk_paths(chunks_dir, num_rows)
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    dataset = _DecodedBatches(data, encoder.transform, batches_of(missing, num_rows, settings.batch_size))
    order = range(len(dataset))
    pin = encoder.device.type == "cuda"
    with Progress(f"encoding images, {layer}", unit="images", total=num_rows) as progress:
        progress.advance(num_rows - sum(len(batch) for batch in dataset.batches))
        batches = _each(from_workers(dataset, order, settings.num_workers, _PREFETCH_BATCHES, pin), progress)
        if refuse_undecodable:
            batches = _refusing(batches, data)
        for number, chunk in encode_chunks(encoder, batches, layer, num_rows):
            write_chunk(paths[number], chunk)
    return paths


def _each(batches: Iterable[DecodedBatch], progress: Progress) -> Iterator[DecodedBatch]:
    for batch in batches:
        yield batch
        progress.advance(len(batch.rows) + len(batch.rejected))


def _refusing(batches: Iterable[DecodedBatch], data: EvalData) -> Iterator[DecodedBatch]:
    for batch in batches:
        for row, reason in batch.rejected.items():
            raise InputError(
                f"{data.name}: image {data.rows[row].key}: {reason}; repair or remove it "
                "(`dermvlp embed` lists all that cannot be used)"
            )
        yield batch


def encode_chunks(
    encoder: Encoder, batches: Iterable[DecodedBatch], layer: str, num_rows: int
) -> Iterator[tuple[int, Chunk]]:
    """(number, chunk) of each chunk whose last row has come. Batches come in the order of their rows."""
    rows: list[int] = []
    parts: list[Tensor] = []
    rejected: dict[int, str] = {}
    for batch in batches:
        if batch.image_BCHW is not None:
            parts.append(encoder.encode_pixels(batch.image_BCHW, layer))
        rows += batch.rows
        rejected |= batch.rejected
        last = max((*batch.rows, *batch.rejected))
        if (last + 1) % CHUNK_ROWS == 0 or last + 1 == num_rows:
            whole = torch.cat(parts).numpy() if parts else np.zeros((0, 0), np.float32)
            yield last // CHUNK_ROWS, Chunk(np.array(rows, dtype=np.int64), whole, rejected)
            rows, parts, rejected = [], [], {}
