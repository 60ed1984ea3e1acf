"""Images: everything hostile is refused with a neutral reason, all else becomes upright, small, clean sRGB."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data_prep.config import ImageOptions
from data_prep.images.convert import ImageRejected, PreparedImage, prepare_drawn, prepare_image, read_image
from data_prep.sources.base import ImageReference
from pretrain.data.transforms import decode

OPTIONS = ImageOptions(short_side_px=64, min_side_px=32)
SECRETS = [b"Anna Muster", b"GPSSECRET", b"XMPSECRET", b"COMMENTSECRET", b"THUMBSECRET", b"IPTCSECRET", b"TAILSECRET"]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(width: int = 80, height: int = 60) -> Image.Image:
    """Smooth enough to survive JPEG: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def photo(width: int, height: int) -> Image.Image:
    """Detail at every scale, finer detail fainter, and colour fainter than brightness, as in photographs."""
    rng = np.random.default_rng(0)
    sum_HW3 = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        noise = rng.integers(0, 200, (cells, cells, 1)) + rng.integers(0, 56, (cells, cells, 3))
        smooth = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        sum_HW3 += np.asarray(smooth, float) / cells
    return Image.fromarray((255 * sum_HW3 / sum_HW3.max()).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def pixels(prepared: PreparedImage) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(prepared.jpeg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (prepared.width, prepared.height))
    return np.asarray(image).astype(int)


def psnr(first: Image.Image, second: Image.Image) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(first, float) - np.asarray(second, float)) ** 2)))


def distance(first: PreparedImage, second: PreparedImage) -> int:
    return int(np.bitwise_count(first.perceptual_hash ^ second.perceptual_hash).sum())


def pixel_sha256(rgb: Image.Image) -> bytes:
    return hashlib.sha256(struct.pack(">II", *rgb.size) + rgb.tobytes()).digest()


def linear_profile() -> bytes:
    """sRGB's primaries in linear light: grey 55 of 255 is about 128 in sRGB."""
    profile = bytearray(SRGB)
    while (at := profile.find(b"para", 128)) > 0:  # the tone curves: 'curv' without entries is linear
        profile[at : at + 12] = b"curv" + b"\0" * 8
    return bytes(profile)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def markers(jpeg: bytes) -> set[int]:
    found, position = set(), 2
    while jpeg[position + 1] != 0xDA:
        found.add(jpeg[position + 1])
        position += 2 + struct.unpack(">H", jpeg[position + 2 : position + 4])[0]
    return found


# ---------------------------------------------------------------------------------------------- reduced


def test_short_side_is_reduced_and_ratio_kept() -> None:
    prepared = prepare_image(saved(picture(300, 150), "PNG"), OPTIONS)
    assert (prepared.width, prepared.height, prepared.reencoded) == (128, 64, True)
    assert prepared.sha256 == hashlib.sha256(prepared.jpeg).hexdigest()
    expected = np.asarray(picture(128, 64)).astype(int)
    assert np.abs(pixels(prepared) - expected).mean() < 3


def test_never_enlarged_and_deterministic() -> None:
    data = saved(picture(50, 40), "PNG")
    first, second = prepare_image(data, OPTIONS), prepare_image(data, OPTIONS)
    assert (first.width, first.height) == (50, 40)
    assert (first.jpeg, first.pixel_sha256) == (second.jpeg, second.pixel_sha256)
    np.testing.assert_array_equal(first.perceptual_hash, second.perceptual_hash)


@pytest.mark.parametrize("short", [68, 100, 130, 191, 260, 385, 520])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_quality_is_that_of_lanczos_from_the_whole_picture(short: int, kind: str) -> None:
    data = saved(photo(short * 4 // 3, short), kind)
    prepared = prepare_image(data, OPTIONS)
    whole = Image.open(io.BytesIO(data))
    reference = whole.resize((prepared.width, prepared.height), Image.Resampling.LANCZOS)
    encoded = Image.open(io.BytesIO(saved(reference, "JPEG", quality=OPTIONS.jpeg_quality)))
    assert psnr(Image.open(io.BytesIO(prepared.jpeg)), reference) > psnr(encoded, reference) - 0.5


def test_a_large_jpeg_is_decoded_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, *a, **k: sizes.append(image.size) or resize(image, *a, **k)
    )
    prepare_image(saved(picture(1600, 1200), "JPEG"), OPTIONS)
    assert sizes[0] == (200, 150)


# ---------------------------------------------------------------------------------------------- kept


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_rows": 1}])
def test_a_fit_jpeg_keeps_its_compressed_data(options: dict[str, Any]) -> None:
    data = saved(picture(100, 60), "JPEG", quality=70, **options)
    prepared = prepare_image(data, OPTIONS)
    assert not prepared.reencoded
    assert prepared.jpeg == data
    before = Image.open(io.BytesIO(data))
    assert prepared.pixel_sha256 == pixel_sha256(before)
    encoded = prepare_image(data, OPTIONS.model_copy(update={"keep_jpegs": False}))
    assert encoded.reencoded
    assert encoded.pixel_sha256 == prepared.pixel_sha256  # both of what the file decodes to
    assert prepare_image(saved(before, "PNG"), OPTIONS).pixel_sha256 == prepared.pixel_sha256


def test_a_grey_jpeg_is_kept_and_training_reads_it() -> None:
    data = saved(picture(100, 60).convert("L"), "JPEG")
    prepared = prepare_image(data, OPTIONS)
    assert prepared.jpeg == data
    assert decode(prepared.jpeg).mode == "RGB"
    assert prepared.pixel_sha256 == pixel_sha256(Image.open(io.BytesIO(data)).convert("RGB"))


def test_profiles() -> None:
    """Those of sRGB, whoever wrote them, change nothing; others are applied, which changes the pixels."""
    other_srgb = bytearray(SRGB)
    other_srgb[24:36] = struct.pack(">6H", 1999, 1, 2, 3, 4, 5)  # another date
    kept = prepare_image(saved(picture(), "JPEG", icc_profile=bytes(other_srgb)), OPTIONS)
    assert not kept.reencoded and b"ICC_PROFILE" not in kept.jpeg
    assert prepare_image(saved(picture(), "JPEG", icc_profile=linear_profile()), OPTIONS).reencoded
    assert not prepare_image(saved(picture().convert("L"), "JPEG", icc_profile=SRGB), OPTIONS).reencoded


@pytest.mark.parametrize("kind", ["CMYK", "rotated", "large", "stray bytes", "PNG"])
def test_what_is_encoded_anew(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = saved(picture(), "JPEG")
    data = {
        "CMYK": saved(picture().convert("CMYK"), "JPEG"),
        "rotated": saved(picture(), "JPEG", exif=exif),
        "large": saved(picture(90, 65), "JPEG"),
        "stray bytes": plain[:20] + b"stray" + plain[20:],
        "PNG": saved(picture(), "PNG"),
    }[kind]
    prepared = prepare_image(data, OPTIONS)
    assert prepared.reencoded
    assert min(prepared.width, prepared.height) <= 64
    assert np.abs(pixels(prepared).mean((0, 1)) - np.asarray(picture()).mean((0, 1))).max() < 6


# ---------------------------------------------------------------------------------------------- metadata


def telling_jpeg(image: Image.Image) -> bytes:
    """With everything in it that phones, cameras and picture archives write."""
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = SECRETS[0].decode()
    exif[0x0112] = 1
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 0.0), 29: SECRETS[1].decode()})
    data = saved(
        image,
        "JPEG",
        exif=exif.tobytes() + b"\xff\xd8" + SECRETS[4] + b"\xff\xd9",
        xmp=b"<x:xmpmeta>" + SECRETS[2] + b"</x:xmpmeta>",
        comment=SECRETS[3],
        icc_profile=SRGB,
        dpi=(301, 301),
    )
    iptc = segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\x00\x0a" + SECRETS[5])
    mpf = segment(0xE2, b"MPF\x00MM\x00*" + SECRETS[5])
    return data[:2] + iptc + mpf + data[2:] + saved(image, "JPEG", comment=SECRETS[6]) + SECRETS[6]


@pytest.mark.parametrize(("width", "height", "kept"), [(80, 60, True), (300, 200, False)])
def test_all_metadata_is_gone(width: int, height: int, kept: bool) -> None:
    data = telling_jpeg(picture(width, height))
    assert all(secret in data for secret in SECRETS)  # the search below can fail
    prepared = prepare_image(data, OPTIONS)
    assert prepared.reencoded is not kept
    for name in [*SECRETS, b"Exif", b"xmpmeta", b"ICC_PROFILE", b"http", b"Photoshop", b"MPF"]:
        assert name not in prepared.jpeg
    assert prepared.jpeg.count(b"\xff\xd9") == 1 and prepared.jpeg.endswith(b"\xff\xd9")
    # JFIF header, tables and frame only: no APP1-15 and no comment segment
    assert markers(prepared.jpeg) <= {0xE0, 0xDB, 0xC0, 0xC4}
    assert b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" in prepared.jpeg  # no density, no thumbnail
    clean = prepare_image(saved(picture(width, height), "JPEG"), OPTIONS)
    assert (prepared.jpeg, prepared.pixel_sha256) == (clean.jpeg, clean.pixel_sha256)


def test_the_second_picture_of_a_phone_is_gone() -> None:
    second = Image.new("RGB", (80, 60), "blue")
    data = saved(picture(), "MPO", save_all=True, append_images=[second], exif=b"Exif\0\0" + SECRETS[0])
    assert data.count(b"\xff\xd9") >= 2 and Image.open(io.BytesIO(data)).format == "MPO"
    prepared = prepare_image(data, OPTIONS)
    assert not prepared.reencoded
    assert prepared.jpeg.count(b"\xff\xd9") == 1 and SECRETS[0] not in prepared.jpeg and b"MPF" not in prepared.jpeg
    assert np.abs(pixels(prepared) - np.asarray(picture())).mean() < 3


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
    assert b"SECRETNAME" not in prepare_image(data, OPTIONS).jpeg


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise
    prepared = prepare_image(saved(picture(80, 60), "JPEG", exif=exif), OPTIONS)
    assert (prepared.width, prepared.height) == (60, 80)
    values = pixels(prepared)
    assert values[0, 0, 1] > 200  # bottom left of the file, where green is strong, is now top left
    assert values[-1, -1, 0] > 200


def test_broken_exif_costs_nothing_but_the_orientation() -> None:
    data = saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x99" * 40)
    assert prepare_image(data, OPTIONS).width == 80


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "I;16"])
def test_pixel_formats_become_rgb(mode: str) -> None:
    grey = Image.new("L", (40, 40), 200)
    if mode == "I;16":
        data = saved(Image.fromarray(np.full((40, 40), 200 * 257, np.uint16)), "PNG")
        assert Image.open(io.BytesIO(data)).mode == "I;16"
    else:
        data = saved(grey.convert(mode, dither=Image.Dither.NONE), "TIFF")
    expected = 255 if mode == "1" else 200
    assert np.abs(pixels(prepare_image(data, OPTIONS)) - expected).max() <= 3


def test_transparent_pixels_are_white() -> None:
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (32, 0, 64, 64))
    for data in (saved(half, "PNG"), saved(half.quantize(4), "PNG")):
        values = pixels(prepare_image(data, OPTIONS))
        assert values[32, 8].min() > 245
        assert values[32, 56, 2] > 245 and values[32, 56, 0] < 12


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(prepare_image(data, OPTIONS))[20, 20] - (255, 0, 0)).max() <= 4


def test_colour_profile_is_applied() -> None:
    data = saved(Image.new("RGB", (40, 40), (55, 55, 55)), "PNG", icc_profile=linear_profile())
    assert np.abs(pixels(prepare_image(data, OPTIONS)) - 128).max() <= 4
    data = saved(Image.new("RGB", (40, 40), (55, 55, 55)), "PNG", icc_profile=b"no profile at all")
    assert np.abs(pixels(prepare_image(data, OPTIONS)) - 55).max() <= 3


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
        prepare_image(data, OPTIONS)


def test_size_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    data = saved(picture(200, 200), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(ImageRejected, match="more than 39999 pixels"):
        prepare_image(data, ImageOptions(max_pixels=39_999))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("side", [60, 1000])  # kept; decoded at a fraction of its size
@pytest.mark.parametrize("lost", [3, 50, 0.3, 0.7])
def test_a_truncated_jpeg_is_noticed(options: dict[str, Any], side: int, lost: float) -> None:
    whole = saved(photo(side, side), "JPEG", **options)
    assert prepare_image(whole, OPTIONS).reencoded is (side == 1000)
    num_lost = int(lost if lost >= 1 else lost * len(whole))
    with pytest.raises(ImageRejected, match=r"truncated|not an image"):  # the second where even the header is cut
        prepare_image(whole[:-num_lost], OPTIONS)


def test_every_prefix_of_other_formats_is_refused_or_whole() -> None:
    for kind in ("PNG", "WEBP", "BMP", "GIF", "TIFF"):
        whole = saved(picture(), kind)
        expected = prepare_image(whole, OPTIONS).pixel_sha256
        num_refused = 0
        for length in np.linspace(0, len(whole) - 1, 60).astype(int):
            try:
                assert prepare_image(whole[:length], OPTIONS).pixel_sha256 == expected, (kind, length, len(whole))
            except ImageRejected:
                num_refused += 1
        assert num_refused > 30


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "archive.tar"
    path.write_bytes(b"0123456789")
    assert read_image(ImageReference("a", path)) == b"0123456789"
    assert read_image(ImageReference("a", path, offset=2, num_bytes=3)) == b"234"
    os.mkfifo(pipe := tmp_path / "Anna_Muster_1970.jpg")
    for reference, reason in [
        (ImageReference("a", tmp_path / "Muster.jpg"), "no such image file"),
        (ImageReference("a", path, offset=8, num_bytes=3), "the file ends within the image"),
        (ImageReference("a", path, offset=8, num_bytes=2**40), "a file of more than 1073741824 bytes"),
        (ImageReference("a", tmp_path), "not a regular file"),
        (ImageReference("a", pipe), "not a regular file"),
        (ImageReference("a", path / "Muster"), "cannot be read"),
        (ImageReference("a", tmp_path / "Muster\0.jpg"), "cannot be read"),
    ]:
        with pytest.raises(ImageRejected, match=reason) as caught:
            read_image(reference)
        assert "Muster" not in str(caught.value) and "archive" not in str(caught.value)


def test_random_damage_is_refused_or_decoded_never_raised() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        whole = saved(picture(), kind)
        for _ in range(40):
            damaged = bytearray(whole)
            for at in rng.integers(0, len(whole), 8):
                damaged[at] = rng.integers(256)
            try:
                prepared = prepare_image(bytes(damaged), OPTIONS)
            except ImageRejected as error:
                assert str(error)
            else:
                assert decode(prepared.jpeg).size == (prepared.width, prepared.height)


def test_a_drawn_image_takes_nothing_along() -> None:
    image = picture()
    image.info["comment"] = b"SECRETNAME"
    prepared = prepare_drawn(image, OPTIONS)
    assert prepared.reencoded and b"SECRETNAME" not in prepared.jpeg
    assert np.abs(pixels(prepared) - np.asarray(image)).mean() < 3


# ---------------------------------------------------------------------------------------------- perceptual hash


def test_perceptual_hash_is_that_of_imagehash() -> None:
    prepared = prepare_image(saved(photo(120, 60), "PNG"), OPTIONS)
    bits = np.unpackbits(prepared.perceptual_hash.view(np.uint8)).astype(bool)
    assert prepared.perceptual_hash.shape == (4,) and prepared.perceptual_hash.dtype == np.dtype("<u8")
    np.testing.assert_array_equal(bits.reshape(16, 16), imagehash.phash(photo(120, 60), hash_size=16).hash)


def test_perceptual_hash_survives_what_happens_to_copies() -> None:
    original = photo(128, 96)
    options = ImageOptions(short_side_px=96)
    prepared = prepare_image(saved(original, "PNG"), options)
    copies = {
        "encoded at quality 60": saved(original, "JPEG", quality=60),
        "twice the size": saved(original.resize((256, 192), Image.Resampling.BICUBIC), "JPEG"),
        "brighter": saved(original.point(lambda value: min(255, round(1.1 * value))), "PNG"),
    }
    for name, copy in copies.items():
        assert distance(prepared, prepare_image(copy, options)) <= 16, name
    another = prepare_image(saved(original.transpose(Image.Transpose.ROTATE_90), "PNG"), options)
    assert distance(prepared, another) > 60
