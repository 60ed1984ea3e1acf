"""Features of a data set's images: encoded in chunks that survive a kill, then one file that is memory-mapped.

    FOLDER/MODEL-DATA-LAYER.npy             (n, L) float32, when all rows are there
    FOLDER/MODEL-DATA-LAYER.rejected.json   {row: reason} of the images that could not be decoded
    FOLDER/MODEL-DATA-LAYER.chunks/000003.npz   rows 768 ... 1023, until then

A batch holds the same rows whether a run was interrupted or not, so the features are equal bit by bit. Layers that are
asked for together come from one forward.

Shapes: N images, n that could be decoded, B of a batch, D joint width, L width of a layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.config import ImageOptions
from data_prep.errors import InputError, PassingError
from data_prep.files import disk_errors, lock, remove_stale_partials, write_atomically
from data_prep.images.convert import ImageRejected, decode_image
from data_prep.progress import Progress
from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import from_workers
from pretrain.data.transforms import decode
from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.encoding.feature_chunks import (
    CHUNK_ROWS,
    Chunk,
    chunk_paths,
    read_rows,
    write_chunk,
    write_npy,
)
from pretrain.evaluation.encoding.tower_layers import check_layers
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


@dataclass(frozen=True)
class ImageFeatures:
    """Of the images of a data set that could be decoded, in their order."""

    by_layer: dict[str, NDArray[np.float32]]  # layer -> (n, L), memory-mapped
    rejected: dict[int, str]  # row -> why its image could not be decoded


def image_features(
    encoder: Encoder, data: EvalData, layers: Sequence[str], folder: Path, settings: EvaluationSettings
) -> ImageFeatures:
    """Of all rows of `data`, computed once and kept in `folder`.

    The names of the files are made of the model's digest, the data set's and the layer: other weights, other rows and
    another layer never meet. Raises InputError for a layer that the encoder has not, where no image can be decoded, for
    a file that is damaged, and where another process is computing in `folder`.
    """
    stems = {layer: f"{encoder.info.digest}-{data.digest}-{layer}" for layer in layers}
    paths = {layer: folder / f"{stem}.npy" for layer, stem in stems.items()}
    ledgers = {layer: folder / f"{stem}.rejected.json" for layer, stem in stems.items()}
    missing = [layer for layer in layers if not (paths[layer].is_file() and ledgers[layer].is_file())]
    missing_dirs = {layer: folder / f"{stems[layer]}.chunks" for layer in missing}
    if missing_dirs:
        with lock(folder / ".lock", "another computation of features"), disk_errors(folder):
            remove_stale_partials(folder)
            for layer, chunks in encode_missing_chunks(encoder, data, missing_dirs, settings).items():
                rejected = {row: reason for chunk in chunks for row, reason in read_rows(chunk).rejected.items()}
                write_atomically(ledgers[layer], json.dumps(rejected).encode())
                write_npy(paths[layer], chunks)
                shutil.rmtree(missing_dirs[layer])
    found = [_read_rejected(path) for path in ledgers.values()]
    if any(other.keys() != found[0].keys() for other in found):
        raise InputError(f"{folder}: an image was repaired or damaged between layers; remove it, and all is done anew")
    num_rows = len(data.rows) - len(found[0])
    return ImageFeatures({layer: _mapped(path, num_rows) for layer, path in paths.items()}, found[0])


def _read_rejected(path: Path) -> dict[int, str]:
    try:
        return {int(row): str(reason) for row, reason in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); remove it and the .npy beside it, and both are made anew"
        ) from None


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
            except PassingError:
                raise  # to be tried again, not left out
            except (ImageRejected, InputError) as error:
                where = f"{self.data.name}: {self.data.rows[row].key}: "
                if isinstance(error, ImageRejected) and error.may_pass:
                    raise PassingError(f"{where}{error}") from None
                rejected[row] = str(error).removeprefix(where)
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
    encoder: Encoder, data: EvalData, chunks_dirs: Mapping[str, Path], settings: EvaluationSettings
) -> dict[str, list[Path]]:
    """The chunk files of all rows for each layer in its folder, those computed that were not there.

    Raises InputError for a layer that the encoder has not, and for no row.
    """
    check_layers(encoder, chunks_dirs)
    num_rows = len(data.rows)
    if not num_rows:
        raise InputError(f"{data.name}: no image to encode")
    for chunks_dir in chunks_dirs.values():
        chunks_dir.mkdir(parents=True, exist_ok=True)
    paths = {layer: chunk_paths(chunks_dir, num_rows) for layer, chunks_dir in chunks_dirs.items()}
    in_turn = enumerate(zip(*paths.values(), strict=True))
    missing = [number for number, of_layers in in_turn if not all(path.is_file() for path in of_layers)]
    dataset = _DecodedBatches(data, encoder.transform, batches_of(missing, num_rows, settings.batch_size))
    order = range(len(dataset))
    pin = encoder.device.type == "cuda"
    with Progress(f"encoding images, {' + '.join(paths)}", unit="images", total=num_rows) as progress:
        progress.advance(num_rows - sum(len(batch) for batch in dataset.batches))
        batches = _each(from_workers(dataset, order, settings.num_workers, _PREFETCH_BATCHES, pin), progress)
        for number, chunks in encode_chunks(encoder, batches, tuple(paths), num_rows):
            for layer, chunk in chunks.items():
                write_chunk(paths[layer][number], chunk)
    return paths


def _each(batches: Iterable[DecodedBatch], progress: Progress) -> Iterator[DecodedBatch]:
    for batch in batches:
        yield batch
        progress.advance(len(batch.rows) + len(batch.rejected))


def encode_chunks(
    encoder: Encoder, batches: Iterable[DecodedBatch], layers: Sequence[str], num_rows: int
) -> Iterator[tuple[int, dict[str, Chunk]]]:
    """(number, layer -> chunk) of each chunk whose last row has come. Batches come in the order of their rows."""
    rows: list[int] = []
    parts: list[dict[str, Tensor]] = []
    rejected: dict[int, str] = {}
    for batch in batches:
        if batch.image_BCHW is not None:
            parts.append(encoder.encode_layers(batch.image_BCHW, layers))
        rows += batch.rows
        rejected |= batch.rejected
        last = max((*batch.rows, *batch.rejected))
        if (last + 1) % CHUNK_ROWS == 0 or last + 1 == num_rows:
            yield (
                last // CHUNK_ROWS,
                {layer: _chunk(rows, [part[layer] for part in parts], rejected) for layer in layers},
            )
            rows, parts, rejected = [], [], {}


def _chunk(rows: Sequence[int], parts: Sequence[Tensor], rejected: dict[int, str]) -> Chunk:
    whole = torch.cat(list(parts)).numpy() if parts else np.zeros((0, 0), np.float32)
    return Chunk(np.array(rows, dtype=np.int64), whole, rejected)
