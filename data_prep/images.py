"""From any image file to a small JPEG that holds nothing but pixels: decode, orient, convert, reduce, encode, hash.

What cannot be trusted is refused with a reason that quotes nothing from the file: file names and metadata can hold
names and record numbers, and the reason goes into a ledger that is shared.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from data_prep.config import ImageOptions

#: Pillow knows some fifty formats; a few of them start programs (EPS runs Ghostscript). Multi-picture phone files
#: (MPO) are opened as JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000")
_MAX_JPEG_SIDE_PX = 65_500  # the format's own limit


class ImageRejected(Exception):  # noqa: N818 - says what became of the image, as Rejection does
    """This image does not become a sample; the message is the reason, free of the file's name and metadata."""


@dataclass(frozen=True)
class EncodedImage:
    jpeg: bytes  # baseline RGB JPEG without metadata
    width: int  # px
    height: int  # px
    sha256: str  # of `jpeg`, hexadecimal


def load_image(source: Path | str | bytes, options: ImageOptions) -> EncodedImage:
    """Decode a file or its bytes fully and encode it anew; of an animation the first frame is taken.

    Raises ImageRejected for a missing or empty file, one that is no image, is truncated or corrupt, or has too many
    pixels (read from the header, before anything is decoded; beyond about 179 million Pillow's own guard refuses).
    """
    data = source if isinstance(source, bytes) else _read(Path(source))
    if not data:
        raise ImageRejected("empty file")
    # Decoders meet hostile bytes here and raise OSError, ValueError, SyntaxError, struct.error, zlib.error, ...:
    # whichever it is, the row is rejected and the run goes on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns below the limit that is checked here, and of odd metadata
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError:
            raise _too_many_pixels(options) from None
        except Exception:
            raise ImageRejected("not an image in a supported format (" + ", ".join(_FORMATS) + ")") from None
        _check_size(image, options)
        try:
            image.load()
        except Exception:
            raise ImageRejected("truncated or corrupt image data") from None
        return encode_image(image, options)


def encode_image(image: Image.Image, options: ImageOptions) -> EncodedImage:
    """Orient by EXIF, convert to RGB (sRGB where a colour profile is embedded), reduce the short side to
    `short_side_px` with LANCZOS (never enlarge), drop all metadata and encode as JPEG.

    Raises ImageRejected for an image outside the size limits or in a pixel format that has no RGB meaning.
    """
    _check_size(image, options)
    try:
        rgb = _reduce(_to_rgb(_oriented(image)), options.short_side_px)
    except ImageRejected:
        raise
    except Exception:  # malformed palettes, transparency tables: again any exception
        raise ImageRejected("pixels that cannot be converted to RGB") from None
    if max(rgb.size) > _MAX_JPEG_SIDE_PX:
        raise ImageRejected(f"longer than {_MAX_JPEG_SIDE_PX} px after reduction")
    # JPEG's writer takes comments and the like from `info`; an image made from the pixels alone has none
    clean = Image.frombytes("RGB", rgb.size, rgb.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, format="JPEG", quality=options.jpeg_quality, optimize=True)
    jpeg = buffer.getvalue()
    return EncodedImage(jpeg, clean.width, clean.height, hashlib.sha256(jpeg).hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageRejected("no such image file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise ImageRejected(f"the image file cannot be read ({type(error).__name__})") from None


def _check_size(image: Image.Image, options: ImageOptions) -> None:
    if image.width * image.height > options.max_pixels:
        raise _too_many_pixels(options)
    if min(image.size) < options.min_side_px:
        raise ImageRejected(f"{image.width} x {image.height} px: shorter side below {options.min_side_px} px")


def _too_many_pixels(options: ImageOptions) -> ImageRejected:
    return ImageRejected(f"more than {options.max_pixels} pixels")


def _oriented(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing of the orientation, and nothing against the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _from_16_bit(image)
    elif image.mode == "F":
        raise ImageRejected("floating-point pixels, whose range is unknown")
    profile = image.info.get("icc_profile")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    return _to_srgb(image, profile) if profile else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise ImageRejected("grey values outside 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))  # 65535 / 255 = 257


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Phones write Display P3: its numbers read as sRGB are too dull, and colour is diagnostic."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):  # broken, or for another kind of pixel: no profile
        converted = None
    return converted if converted is not None else image.convert("RGB")


def _reduce(image: Image.Image, short_side_px: int) -> Image.Image:
    short = min(image.size)
    if short <= short_side_px:
        return image
    # max(): rounding must not take the short side below its target
    size = tuple(max(short_side_px, round(side * short_side_px / short)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3.0)
