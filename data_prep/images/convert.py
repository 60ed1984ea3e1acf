"""From any image file to a small JPEG that holds nothing but pixels, and to what finds its copies.

    bytes -> open, size limits -> a fit JPEG: metadata out, decode            -> hashes
                               -> others: decode, reduce, orient, sRGB, encode -> hashes

What cannot be trusted is refused with a reason that quotes nothing from the file: file names and metadata can hold
names and record numbers, and the reason goes into a ledger that is shared.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from data_prep.config import ImageOptions
from data_prep.images.jpeg import strip_metadata
from data_prep.sources.base import ImageReference

#: Pillow knows some fifty formats; a few of them start programs (EPS runs Ghostscript). Multi-picture phone files
#: (MPO) are opened as JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000")
_MAX_JPEG_SIDE_PX = 65_500  # the format's own limit
_MAX_FILE_BYTES = 2**30  # `max_pixels` of 16-bit RGBA, uncompressed, and more
_HASH_SIDE = 16
#: Cheap reduction (in the JPEG decoder, by box) stops at this multiple of the target, and LANCZOS does the rest.
#: Compared with LANCZOS from the whole picture, photographs of skin lose 0.1 dB on average and 0.5 dB at worst once
#: encoded; with 2 it is 0.01 and 0.1 dB, and preparation takes up to half as long again.
_OVERSAMPLING = 4 / 3
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


MISSING = "no such image file"
#: Of a JPEG whose metadata is taken out before it is opened: in a larger one that takes longer than opening it twice.
_SMALL_BYTES = 65_536
#: EXIF and XMP can say how the picture is to be turned, a profile what its colours are.
_SAYS_MORE = re.compile(rb"Exif\x00|http://ns\.adobe\.com/xap|ICC_PROFILE\x00")


class ImageRejected(Exception):  # noqa: N818 - says what became of the image, as Rejection does
    """This image does not become a sample; the message is the reason, free of the file's name and metadata.

    `may_pass`: a fault of the disk or the machine, not of the image; the next scan tries again.
    """

    def __init__(self, reason: str, *, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.may_pass = may_pass

    @property
    def is_missing(self) -> bool:
        return str(self) == MISSING


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A JPEG for the shard, upright, sRGB (or grey) and without metadata, and its fingerprints.

    `pixel_sha256` is the SHA-256 of width and height (px, unsigned 32-bit big-endian) followed by the RGB values of the
    stored picture, row by row: of a kept JPEG as it decodes, of an encoded one as they were before encoding. So the
    same pixels in a PNG and in a kept JPEG agree.

    `perceptual_hash` is the 256-bit DCT hash of the same pixels (`imagehash.phash(hash_size=16)`), row by row, the
    first bit the highest of its byte; near copies have a small Hamming distance.
    """

    jpeg: bytes
    width: int  # px, of `jpeg`
    height: int  # px, of `jpeg`
    sha256: str  # of `jpeg`, hexadecimal
    pixel_sha256: bytes  # 32 bytes
    perceptual_hash: NDArray[np.uint64]  # (4,)
    reencoded: bool  # False: the compressed data are those of the file


def read_image(reference: ImageReference) -> bytes:
    """The bytes of an image file, or of a tar's member. Raises ImageRejected."""
    assert reference.path is not None
    try:
        status = reference.path.stat()
        num_bytes = status.st_size if reference.num_bytes is None else reference.num_bytes
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ImageRejected("not a regular file")
        if num_bytes > _MAX_FILE_BYTES:
            raise ImageRejected(f"a file of more than {_MAX_FILE_BYTES} bytes")
        with reference.path.open("rb") as file:
            file.seek(reference.offset or 0)
            data = file.read(num_bytes)
    except FileNotFoundError:
        raise ImageRejected(MISSING) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise ImageRejected(f"the image file cannot be read ({type(error).__name__})", may_pass=True) from None
    if len(data) < num_bytes:
        raise ImageRejected("the file ends within the image")
    return data


def prepare_image(data: bytes, options: ImageOptions) -> PreparedImage:
    """Decode an image file's bytes fully and bring them to the shard's form; of an animation the first frame is taken.

    The short side is reduced to `short_side_px` (never enlarged). A JPEG that needs no change of its pixels keeps its
    compressed data (`keep_jpegs`); all else is encoded anew.

    Raises ImageRejected for bytes that are empty, no image, truncated or corrupt, outside the size limits (read from
    the header, before anything is decoded; beyond about 179 million pixels Pillow's own guard refuses), or in a pixel
    format that has no RGB meaning.
    """
    if not data:
        raise ImageRejected("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns below the limit that is checked here, and of odd metadata
        # of a small JPEG without EXIF, XMP and profile the stripped bytes say all: it need not be opened twice
        stripped = strip_metadata(data) if options.keep_jpegs and len(data) <= _SMALL_BYTES else None
        if stripped is not None and not _SAYS_MORE.search(data):
            data = stripped
        image = _open(data, options)
        kept = _keep(image, data, stripped, options) if options.keep_jpegs else None
        return kept if kept is not None else _encode(image, options)


def prepare_drawn(image: Image.Image, options: ImageOptions) -> PreparedImage:
    """The same for a picture that no file holds. Raises ImageRejected."""
    _check_size(image, options)
    return _encode(image, options)


def decode_image(data: bytes, options: ImageOptions) -> Image.Image:
    """The picture at its own size, as preparation sees it before it reduces: RGB, upright, sRGB, white where it is
    transparent; of an animation the first frame. Raises ImageRejected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `prepare_image`
        image = _open(data, options)
        _load(image)
        orientation, profile = _orientation(image), image.info.get("icc_profile")
        with _conversion_errors():
            return _upright_srgb(_eight_bits(image), orientation, profile)


def _open(data: bytes, options: ImageOptions) -> Image.Image:
    # Decoders meet hostile bytes here and in `_load` and raise OSError, ValueError, SyntaxError, struct.error,
    # zlib.error, ...: whichever it is, the row is rejected and the run goes on.
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels(options) from None
    except Exception:
        raise ImageRejected("not an image in a supported format (" + ", ".join(_FORMATS) + ")") from None
    _check_size(image, options)
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise ImageRejected("not enough memory to decode it", may_pass=True) from None
    except Exception:
        raise ImageRejected("truncated or corrupt image data") from None


def _check_size(image: Image.Image, options: ImageOptions) -> None:
    if image.width * image.height > options.max_pixels:
        raise _too_many_pixels(options)
    if min(image.size) < options.min_side_px:
        raise ImageRejected(f"{image.width} x {image.height} px: shorter side below {options.min_side_px} px")


def _too_many_pixels(options: ImageOptions) -> ImageRejected:
    return ImageRejected(f"more than {options.max_pixels} pixels")


# ---------------------------------------------------------------------------------------------- kept


def _keep(image: Image.Image, data: bytes, stripped: bytes | None, options: ImageOptions) -> PreparedImage | None:
    """None where the pixels must change, or the segments cannot be told apart for sure. `stripped`: without metadata,
    where that was tried before."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    if min(image.size) > options.short_side_px or _orientation(image) != 1:
        return None
    profile = image.info.get("icc_profile")
    if profile and not _is_srgb(profile, image.mode):
        return None
    if (jpeg := stripped or strip_metadata(data)) is None:
        return None
    # what goes into the shard is what is decoded, so that nothing is kept that does not decode
    decoded = image if jpeg is data else Image.open(io.BytesIO(jpeg), formats=("JPEG",))
    _load(decoded)
    rgb = decoded if decoded.mode == "RGB" else decoded.convert("RGB")
    return _prepared(jpeg, decoded, rgb.tobytes(), reencoded=False)


@lru_cache(256)
def _is_srgb(profile: bytes, mode: str) -> bool:
    """Whether the profile's colours are sRGB's to within two of 255 levels: the many profiles of that name are not
    equal byte for byte."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    patches = Image.fromarray(levels[None] if mode == "L" else rgb)
    converted = _to_srgb(patches, profile)
    return bool(np.abs(np.asarray(converted, int) - np.asarray(patches.convert("RGB"), int)).max() <= 2)


# ---------------------------------------------------------------------------------------------- encoded anew


def _encode(image: Image.Image, options: ImageOptions) -> PreparedImage:
    size = _target_size(image.size, options.short_side_px)
    # For a JPEG: its decoder reduces by 2, 4 or 8 at a fraction of the cost, to this size or more. The picture then
    # ends within the last pixel, at `box`: forgetting it would stretch the picture.
    drafted = image.draft(None, _target_size(image.size, math.ceil(_OVERSAMPLING * options.short_side_px)))
    box = (0, 0, *image.size) if drafted is None else drafted[1]
    _load(image)
    # some formats turn the picture while loading and then have no orientation any more
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    with _conversion_errors():
        image = _eight_bits(image)
        if min(image.size) > options.short_side_px:
            image = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=_OVERSAMPLING)
        image = _upright_srgb(image, orientation, profile)
        pixels = image.tobytes()
    if max(image.size) > _MAX_JPEG_SIDE_PX:
        raise ImageRejected(f"longer than {_MAX_JPEG_SIDE_PX} px after reduction")
    # JPEG's writer takes comments and the like from `info`; an image made from the pixels alone has none
    clean = Image.frombytes("RGB", image.size, pixels)
    buffer = io.BytesIO()
    clean.save(buffer, format="JPEG", quality=options.jpeg_quality)
    return _prepared(buffer.getvalue(), clean, pixels, reencoded=True)


@contextmanager
def _conversion_errors() -> Iterator[None]:
    try:
        yield
    except ImageRejected:
        raise
    except Exception:  # malformed palettes, transparency tables: again any exception
        raise ImageRejected("pixels that cannot be converted to RGB") from None


def _upright_srgb(image: Image.Image, orientation: int, profile: Any) -> Image.Image:
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    return _to_srgb(image, profile) if profile else image.convert("RGB")


def _target_size(size: tuple[int, int], short_side_px: int) -> tuple[int, int]:
    short = min(size)
    # max(): rounding must not take the short side below its target
    width, height = (max(short_side_px, round(side * short_side_px / short)) for side in size)
    return width, height


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF says nothing of the orientation, and nothing against the pixels
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Continuous opaque tones of 8 bits (RGB, grey, CMYK, YCbCr), which can be resized; transparency becomes white."""
    if image.mode == "F":
        raise ImageRejected("floating-point pixels, whose range is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:
            raise ImageRejected("grey values outside 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))  # 65535 / 255 = 257
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image.convert("RGB") if image.mode == "P" else image


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Phones write Display P3: its numbers read as sRGB are too dull, and colour is diagnostic."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):  # broken, or for another kind of pixel: no profile
        converted = None
    return converted if converted is not None else image.convert("RGB")


# ---------------------------------------------------------------------------------------------- fingerprints


def _prepared(jpeg: bytes, image: Image.Image, pixels: bytes, *, reencoded: bool) -> PreparedImage:
    """`pixels`: RGB values of `image`, row by row."""
    digest = hashlib.sha256(struct.pack(">II", *image.size))
    digest.update(pixels)
    bits = imagehash.phash(image, hash_size=_HASH_SIDE).hash
    return PreparedImage(
        jpeg=jpeg,
        width=image.width,
        height=image.height,
        sha256=hashlib.sha256(jpeg).hexdigest(),
        pixel_sha256=digest.digest(),
        perceptual_hash=np.packbits(bits).view(np.dtype("<u8")),
        reencoded=reencoded,
    )
