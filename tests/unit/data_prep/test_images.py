"""Images: everything hostile is refused with a neutral reason, everything else becomes clean, oriented, small RGB."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data_prep.config import ImageOptions
from data_prep.images import EncodedImage, ImageRejected, encode_image, load_image

OPTIONS = ImageOptions(short_side_px=64, min_side_px=32)


def picture(width: int = 80, height: int = 60) -> Image.Image:
    """Smooth enough to survive JPEG: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def pixels(encoded: EncodedImage) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(encoded.jpeg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (encoded.width, encoded.height))
    return np.asarray(image).astype(int)


def test_short_side_is_reduced_and_ratio_kept() -> None:
    encoded = load_image(saved(picture(300, 150), "PNG"), OPTIONS)
    assert (encoded.width, encoded.height) == (128, 64)
    assert encoded.sha256 == hashlib.sha256(encoded.jpeg).hexdigest()
    expected = np.asarray(picture(128, 64)).astype(int)
    assert np.abs(pixels(encoded) - expected).mean() < 3


def test_never_enlarged_and_deterministic() -> None:
    data = saved(picture(50, 40), "PNG")
    first, second = load_image(data, OPTIONS), load_image(data, OPTIONS)
    assert (first.width, first.height) == (50, 40)
    assert first == second


def test_path_and_bytes_agree(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(picture(), "PNG"))
    assert load_image(path, OPTIONS) == load_image(path.read_bytes(), OPTIONS)


def test_all_metadata_is_gone() -> None:
    secrets = ["Anna Muster", "GPSSECRET", "XMPSECRET", "COMMENTSECRET", "THUMBSECRET", "PROFILESECRET"]
    image = picture()
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = secrets[0]
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 0.0), 29: secrets[1]})
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile += secrets[5].encode()
    thumbnail = b"\xff\xd8" + secrets[4].encode()
    data = saved(
        image,
        "JPEG",
        exif=exif.tobytes() + thumbnail,
        xmp=b"<x:xmpmeta>" + secrets[2].encode() + b"</x:xmpmeta>",
        comment=secrets[3],
        icc_profile=bytes(profile),
        dpi=(301, 301),
    )
    assert all(secret.encode() in data for secret in secrets)  # the search below can fail
    encoded = load_image(data, OPTIONS)
    for name in [*secrets, "Exif", "xmpmeta", "ICC_PROFILE", "http"]:
        assert name.encode() not in encoded.jpeg
    # JFIF header, tables, frame and scan only: no APP1-15 and no comment segment
    markers, position = [], 2
    while encoded.jpeg[position + 1] != 0xDA:
        markers.append(encoded.jpeg[position + 1])
        position += 2 + struct.unpack(">H", encoded.jpeg[position + 2 : position + 4])[0]
    assert set(markers) <= {0xE0, 0xDB, 0xC0, 0xC4}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_metadata_of_other_formats_is_gone(kind: str) -> None:
    text = PngInfo()
    text.add_text("Patient", "SECRETNAME")
    options: dict[str, Any] = {
        "PNG": {"pnginfo": text},
        "WEBP": {"xmp": b"SECRETNAME"},
        "GIF": {"comment": "SECRETNAME"},
    }
    data = saved(picture(), kind, **options[kind])
    assert b"SECRETNAME" in data
    assert b"SECRETNAME" not in load_image(data, OPTIONS).jpeg


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise
    encoded = load_image(saved(picture(80, 60), "JPEG", exif=exif), OPTIONS)
    assert (encoded.width, encoded.height) == (60, 80)
    values = pixels(encoded)
    assert values[0, 0, 1] > 200  # bottom left of the file, where green is strong, is now top left
    assert values[-1, -1, 0] > 200


def test_broken_exif_costs_nothing_but_the_orientation() -> None:
    data = saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x99" * 40)
    assert load_image(data, OPTIONS).width == 80


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "I;16"])
def test_pixel_formats_become_rgb(mode: str) -> None:
    grey = Image.new("L", (40, 40), 200)
    if mode == "I;16":
        data = saved(Image.fromarray(np.full((40, 40), 200 * 257, np.uint16)), "PNG")
        assert Image.open(io.BytesIO(data)).mode == "I;16"
    else:
        data = saved(grey.convert(mode, dither=Image.Dither.NONE), "TIFF")
    expected = 255 if mode == "1" else 200
    assert np.abs(pixels(load_image(data, OPTIONS)) - expected).max() <= 3


def test_transparent_pixels_are_white() -> None:
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (32, 0, 64, 64))
    for data in (saved(half, "PNG"), saved(half.quantize(4), "PNG")):
        values = pixels(load_image(data, OPTIONS))
        assert values[32, 8].min() > 245
        assert values[32, 56, 2] > 245 and values[32, 56, 0] < 12


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(load_image(data, OPTIONS))[20, 20] - (255, 0, 0)).max() <= 4


def test_colour_profile_is_applied() -> None:
    # a linear-light profile: grey 55 of 255 is about 128 in sRGB
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert b"para" in profile[128:]
    while (at := profile.find(b"para", 128)) > 0:  # the tone curves: 'curv' without entries is linear
        profile[at : at + 12] = b"curv" + b"\0" * 8
    data = saved(Image.new("RGB", (40, 40), (55, 55, 55)), "PNG", icc_profile=bytes(profile))
    assert np.abs(pixels(load_image(data, OPTIONS)) - 128).max() <= 4
    data = saved(Image.new("RGB", (40, 40), (55, 55, 55)), "PNG", icc_profile=b"no profile at all")
    assert np.abs(pixels(load_image(data, OPTIONS)) - 55).max() <= 3


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"filename,caption\n" * 50, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not an image"),  # Ghostscript is never started
        (b"\xff\xd8\xff", "not an image"),
        (saved(picture(600, 600), "JPEG")[:-2000], "truncated"),
        (saved(picture(200, 200), "PNG")[:200], "truncated"),
        (saved(picture(31, 400), "PNG"), "31 x 400 px: shorter side below 32 px"),
        (bomb(11_000, 11_000), "more than 100000000 pixels"),
        (bomb(60_000, 60_000), "more than 100000000 pixels"),
        (saved(Image.new("F", (40, 40), 0.5), "TIFF"), "floating-point"),
    ],
)
def test_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageRejected, match=reason):
        load_image(data, OPTIONS)


def test_size_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    data = saved(picture(200, 200), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(ImageRejected, match="more than 39999 pixels"):
        load_image(data, ImageOptions(max_pixels=39_999))


def test_reasons_do_not_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "Anna_Muster_1970.jpg"
    for content in (None, b"", b"text"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ImageRejected) as caught:
            load_image(path, OPTIONS)
        assert "Muster" not in str(caught.value)


def test_random_damage_is_refused_or_decoded_never_raised() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        whole = saved(picture(), kind)
        for _ in range(40):
            damaged = bytearray(whole)
            for at in rng.integers(0, len(whole), 8):
                damaged[at] = rng.integers(256)
            try:
                load_image(bytes(damaged), OPTIONS)
            except ImageRejected as error:
                assert str(error)


def test_encode_image_takes_a_drawn_image() -> None:
    image = picture()
    image.info["comment"] = b"SECRETNAME"
    encoded = encode_image(image, OPTIONS)
    assert b"SECRETNAME" not in encoded.jpeg
    assert np.abs(pixels(encoded) - np.asarray(image)).mean() < 3
