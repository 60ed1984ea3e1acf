"""JPEG bytes to a square uint8 tensor for training. Normalisation happens on the device, where it costs nothing.

Pillow decodes, and reduces a large picture on the way to what the crop needs; the colours change by one matrix; torch
resizes bytes, faster than Pillow by far. The result is the same for any number of threads. Evaluation uses open_clip's
own preprocessing (`pretrain.models.build.eval_transform`).
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pretrain.config import AugmentationConfig

_ASPECT_RATIO = (0.85, 1.18)  # width / height of a crop
_MAX_ATTEMPTS = 10  # at a crop that fits into the picture
_GREY = np.array([0.299, 0.587, 0.114])  # luma of R, G, B, as in JPEG
#: rows: luma, and two axes of colour at right angles to it (YIQ): a hue is an angle between the two
_TO_YIQ = np.array([_GREY, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


class UndecodableImage(ValueError):  # noqa: N818 (says what it is)
    """The bytes are not a whole JPEG."""


class ImageTransform(Protocol):
    """(JPEG bytes, seed) -> (3, image_px, image_px) uint8. Raises UndecodableImage."""

    image_px: int

    def __call__(self, jpeg: bytes, seed: int) -> Tensor: ...


def decode(jpeg: bytes) -> Image.Image:
    """The picture in RGB. Raises UndecodableImage."""
    return _load(_open(jpeg))


@contextmanager
def _pillows_errors() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise UndecodableImage("not a JPEG") from None  # Pillow names an address in memory
    # Pillow promises OSError, and raises much else for bytes that were damaged
    except (OSError, SyntaxError, ValueError, IndexError, TypeError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error) or type(error).__name__) from None


def _open(jpeg: bytes) -> Image.Image:
    """Its header alone is read."""
    with _pillows_errors():
        return Image.open(io.BytesIO(jpeg), formats=("JPEG",))  # shards hold nothing else


def _load(image: Image.Image, scale: float = 1.0) -> Image.Image:
    """Decoded, to no less than `scale` of its size: the decoder reduces by 2, 4 or 8 and is faster for it."""
    with _pillows_errors():
        if scale <= 0.5:
            image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


class TrainTransform:
    """Random crop, flips and colour jitter, all drawn from the seed given with the image."""

    def __init__(self, image_px: int, augmentation: AugmentationConfig) -> None:
        self.image_px, self.augmentation = image_px, augmentation

    def __call__(self, jpeg: bytes, seed: int) -> Tensor:
        # random() alone: of Python's generator, only its numbers are promised to be the same in every version
        draw, options = random.Random(seed).random, self.augmentation
        image = _open(jpeg)
        width, height = image.size
        left, top, right, bottom = draw_crop(width, height, options.crop_scale_min, draw)
        image = _load(image, max(self.image_px / (right - left), self.image_px / (bottom - top)))
        factor = round(width / image.width)  # the decoder reduced it by so much
        flips = (options.horizontal_flip and draw() < 0.5, options.vertical_flip and draw() < 0.5)
        if options.color_jitter > 0:
            image = image.convert("RGB", jitter_matrix(image, options.color_jitter, draw))
        image_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        crop_CHW = image_CHW[:, top // factor : -(-bottom // factor), left // factor : -(-right // factor)]
        size = (self.image_px, self.image_px)
        view_CHW: Tensor = nn.functional.interpolate(crop_CHW[None], size, mode="bicubic", antialias=True)[0]
        axes = [axis for axis, is_flipped in zip((2, 1), flips, strict=True) if is_flipped]
        return view_CHW.flip(axes) if axes else view_CHW


def draw_crop(width: int, height: int, scale_min: float, draw: Callable[[], float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in whole pixels: a share of the area in [scale_min, 1], the ratio of its sides
    log-uniform; where none of ten fits, the middle of the picture. `draw` gives numbers uniform in [0, 1).
    """
    low, high = math.log(_ASPECT_RATIO[0]), math.log(_ASPECT_RATIO[1])
    for _ in range(_MAX_ATTEMPTS):
        area = width * height * (scale_min + (1.0 - scale_min) * draw())
        ratio = math.exp(low + (high - low) * draw())
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int((width - crop_width + 1) * draw()), int((height - crop_height + 1) * draw())
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, round(height * _ASPECT_RATIO[1]))
    crop_height = min(height, max(1, round(width / _ASPECT_RATIO[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def jitter_matrix(image: Image.Image, amount: float, draw: Callable[[], float]) -> tuple[float, ...]:
    """The 3 x 4 matrix, row by row, that changes brightness, contrast, saturation (factors in 1 -+ amount) and hue
    (-+ amount / 10 of a turn) of an RGB image in this order.

    A hue turns about the axis of greys: near what torchvision does in HSV where angles are small (at 0.1 a channel's
    mean differs by up to 8 of 255 levels). Contrast is about the mean of the whole picture.
    """
    brightness, contrast, saturation = (1.0 + amount * (2.0 * draw() - 1.0) for _ in range(3))
    angle = 2.0 * math.pi * (amount / 10.0) * (2.0 * draw() - 1.0)
    counts = image.convert("L").histogram()
    mean_grey = brightness * float(np.dot(counts, np.arange(256))) / (image.width * image.height)
    cosine, sine = saturation * math.cos(angle), saturation * math.sin(angle)
    colour = _FROM_YIQ @ np.array([[1.0, 0.0, 0.0], [0.0, cosine, sine], [0.0, -sine, cosine]]) @ _TO_YIQ
    # greys stay grey under `colour`, so what contrast adds to each channel passes it unchanged
    offset = np.full((3, 1), (1.0 - contrast) * mean_grey)
    return tuple(np.hstack([brightness * contrast * colour, offset]).ravel().tolist())
