"""Pictures to prepare, as many as a benchmark wants: made from the real ones of `DERMVLP_DATA`, or from textures."""

from __future__ import annotations

import csv
import io
import os
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from data_prep import pool

PHOTO_SIZE = (1600, 1200)  # px
_SMALL_PX = 224
_GRAIN_PX = 2048
_GREY = 128


@lru_cache(1)
def _real_paths() -> list[Path]:
    if "DERMVLP_DATA" not in os.environ:
        return []
    return sorted((Path(os.environ["DERMVLP_DATA"]) / "derm-images" / "images").glob("*.jpg"))


def _texture(number: int) -> Image.Image:
    """Smooth blobs on several scales, in the colours of skin."""
    random = np.random.default_rng(number)
    layers = np.zeros((_SMALL_PX, _SMALL_PX, 3))
    for side, strength in ((4, 60), (16, 25), (64, 12)):
        layer = Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))
        layers += strength * (np.asarray(layer.resize((_SMALL_PX, _SMALL_PX), Image.Resampling.BICUBIC)) / 128 - 1)
    return Image.fromarray((np.array([200, 150, 130]) + layers).clip(0, 255).astype(np.uint8))


def _small_picture(number: int) -> Image.Image:
    """224 px. Where the real ones are used up, other crops of them."""
    paths = _real_paths()
    if not paths:
        return _texture(number)
    picture = Image.open(paths[number % len(paths)]).convert("RGB")
    if number < len(paths):
        return picture.resize((_SMALL_PX, _SMALL_PX), Image.Resampling.LANCZOS)  # a few are smaller
    random = np.random.default_rng(number)
    short = min(picture.size)
    side = int(random.integers(short // 2, short * 9 // 10))
    left, top = random.integers(0, short - side, 2).tolist()
    return picture.resize((_SMALL_PX, _SMALL_PX), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def small_jpeg(number: int) -> bytes:
    """A JPEG of 224 px, quality 85 as the real ones."""
    return _jpeg(_small_picture(number), 85)


@lru_cache(1)
def _grain() -> Image.Image:
    values = np.random.default_rng(0).normal(_GREY, 3.0, (_GRAIN_PX, _GRAIN_PX)).round().clip(0, 255).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(values)] * 3)


def photo_jpeg(number: int) -> bytes:
    """A JPEG of 1600 x 1200 px with a sensor's grain, as large as a phone's."""
    left, top = np.random.default_rng(number).integers(0, _GRAIN_PX - np.array(PHOTO_SIZE)).tolist()
    grain = _grain().crop((left, top, left + PHOTO_SIZE[0], top + PHOTO_SIZE[1]))
    enlarged = _small_picture(number).resize(PHOTO_SIZE, Image.Resampling.BICUBIC)
    return _jpeg(ImageChops.add(enlarged, grain, offset=-_GREY), 90)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _write(directory: Path, photos: bool, numbers: range) -> int:
    num_bytes = 0
    for number in numbers:
        jpeg = photo_jpeg(number) if photos else small_jpeg(number)
        (directory / f"{number:07d}.jpg").write_bytes(jpeg)
        num_bytes += len(jpeg)
    return num_bytes


def write_pictures(directory: Path, num_pictures: int, *, photos: bool) -> tuple[list[Path], float]:
    """Files in `directory` and `table.csv` (columns filename, url, caption, diagnosis) beside them. Returns the files
    and their mean size in kB."""
    directory.mkdir(parents=True)
    pieces = [range(start, min(start + 50, num_pictures)) for start in range(0, num_pictures, 50)]
    num_bytes = sum(pool.run(partial(_write, directory, photos), pieces, num_workers=2))
    paths = [directory / f"{number:07d}.jpg" for number in range(num_pictures)]
    with (directory / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "url", "caption", "diagnosis"])
        for number, path in enumerate(paths):
            caption = f"Picture {number}: a scaly red plaque on the forearm of an adult, itching for three weeks."
            writer.writerow([path.name, path.as_uri(), caption, f"disease {number % 97}"])
    return paths, num_bytes / num_pictures / 1000
