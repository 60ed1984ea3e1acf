"""Metadata out of JPEGs: not a pixel changes, nothing but the picture is left, what is unclear is left alone."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.images.jpeg import strip_metadata

SECRET = b"Anna Muster 1970"


def picture(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 255, 75), np.linspace(0, 255, 53))
    smooth = np.stack([x, y, np.full_like(x, 90)], axis=-1) + rng.normal(0, 8, (53, 75, 3))
    return Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).convert(mode)


def saved(mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, format="JPEG", **{"quality": 85} | options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(data))
    image.load()
    return np.asarray(image)


def markers(data: bytes) -> list[int]:
    """Of the segments before the first scan."""
    found, position = [], 2
    while data[position + 1] != 0xDA:
        found.append(data[position + 1])
        position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    return found


def with_metadata(clean: bytes) -> bytes:
    """Every place in a JPEG where something can be told of the patient, the camera or the practice."""
    assert clean[2:4] == b"\xff\xe0"
    thumbnail = bytes(range(3)) + SECRET[:9]  # 2 x 2 RGB
    jfif = segment(0xE0, b"JFIF\x00\x01\x02\x01\x01\x2d\x01\x2d\x02\x02" + thumbnail)
    jfxx = segment(0xE0, b"JFXX\x00\x10\xff\xd8" + SECRET + b"\xff\xd9")
    exif = segment(0xE1, b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00" + SECRET + b"\xff\xd8\xff\xd9")
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta>" + SECRET + b"</x:xmpmeta>")
    others = [segment(marker, b"anything" + SECRET) for marker in (*range(0xE2, 0xF0), 0xFE)]
    iptc = segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\x00\x10" + SECRET)
    head, scan = clean[20:].split(b"\xff\xda", 1)
    first = clean[:2] + jfif + jfxx + exif + xmp + iptc + b"".join(others)
    return first + head + segment(0xFE, SECRET) + b"\xff\xff\xff\xda" + scan + SECRET + clean + SECRET


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"progressive": True}),
        ("RGB", {"progressive": True, "restart_marker_blocks": 3}),
        ("RGB", {"restart_marker_rows": 1}),
        ("RGB", {"optimize": True, "quality": 30}),
        ("RGB", {"quality": 1}),  # libjpeg writes 16-bit tables
        ("L", {}),
        ("L", {"progressive": True}),
    ],
)
def test_only_metadata_goes(mode: str, options: dict[str, Any]) -> None:
    clean = saved(mode, **options)
    dirty = with_metadata(clean)
    assert dirty.count(SECRET) >= 20
    stripped = strip_metadata(dirty)
    assert stripped is not None
    assert SECRET[:9] not in stripped and b"Exif" not in stripped and b"xmpmeta" not in stripped
    np.testing.assert_array_equal(decoded(stripped), decoded(dirty))
    assert set(markers(stripped)) <= {0xE0, 0xDB, 0xC0, 0xC1, 0xC2, 0xC4, 0xDD}
    assert markers(stripped)[0] == 0xE0 and stripped[2:20] == clean[2:20]  # JFIF with neither density nor thumbnail
    assert len(stripped) <= len(clean) + 2  # a fill byte before a marker may stay
    assert strip_metadata(stripped) == stripped
    assert strip_metadata(clean) == clean


@pytest.mark.parametrize("transform", [0, 1])
def test_adobes_colour_transform_stays(transform: int) -> None:
    # without JFIF, Adobe's segment says whether the three components are RGB or YCbCr
    clean = saved(keep_rgb=transform == 0, subsampling=0)
    clean = clean[:2] + (clean[20:] if clean[2:4] == b"\xff\xe0" else clean[2:])
    position = clean.find(b"\xff\xee")
    if position >= 0:
        clean = clean[:position] + clean[position + 16 :]
    adobe = segment(0xEE, b"Adobe\x00\x65\x12\x34\x56\x78" + bytes([transform]) + SECRET)
    dirty = clean[:2] + segment(0xE1, SECRET) + adobe + clean[2:]
    stripped = strip_metadata(dirty)
    assert stripped is not None and SECRET not in stripped
    assert stripped[2:18] == segment(0xEE, b"Adobe\x00\x64\x00\x00\x00\x00" + bytes([transform]))
    np.testing.assert_array_equal(decoded(stripped), decoded(dirty))
    assert np.abs(decoded(stripped).astype(int) - np.asarray(picture())).mean() < 6
    with_jfif = strip_metadata(dirty[:2] + segment(0xE0, b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00") + dirty[2:])
    assert with_jfif is not None and markers(with_jfif)[:2] == [0xE0, 0xEE]


def test_rgb_by_component_names() -> None:
    # neither JFIF nor Adobe: the components' names R, G, B make it RGB
    data = saved(keep_rgb=True, subsampling=0)
    position = data.find(b"\xff\xee")
    bare = data[:position] + data[position + 16 :] if position >= 0 else data
    stripped = strip_metadata(bare)
    assert stripped is not None and not {0xE0, 0xEE} & set(markers(stripped))
    np.testing.assert_array_equal(decoded(stripped), decoded(bare))
    assert np.abs(decoded(stripped).astype(int) - np.asarray(picture())).mean() < 6


def test_what_is_not_understood_is_refused() -> None:
    clean = saved()
    frame = clean.find(b"\xff\xc0")
    scan = clean.find(b"\xff\xda")
    twelve_bits = bytearray(clean)
    twelve_bits[frame + 4] = 12
    refused = {
        "no JPEG": b"\x89PNG" + clean,
        "no end marker": clean[:-2],
        "half an end marker": clean[:-1],
        "ends within a segment": clean[:30],
        "bytes between segments": clean[:20] + b"abc" + clean[20:],
        "a second start": clean[:20] + b"\xff\xd8" + clean[20:],
        "a restart marker before the scan": clean[:20] + b"\xff\xd0" + clean[20:],
        "segment length of one": clean[:20] + b"\xff\xfe\x00\x01" + clean[20:],
        "arithmetic coding": clean[:frame] + b"\xff\xc9" + clean[frame + 2 :],
        "lossless": clean[:frame] + b"\xff\xc3" + clean[frame + 2 :],
        "twelve bits": bytes(twelve_bits),
        "two frames": clean[:frame] + clean[frame:scan] + clean[frame:],
        "height after the scan": clean[:-2] + segment(0xDC, b"\x00\x35") + clean[-2:],
        "no tables": clean[:20] + clean[frame:],
        "no scan": clean[:scan] + b"\xff\xd9",
        "four components": saved("CMYK"),
        "a frame without components": clean[:20] + b"\xff\xc0\x00\x03\x08",
    }
    for name, data in refused.items():
        assert strip_metadata(data) is None, name


def test_damage_never_raises() -> None:
    rng = np.random.default_rng(0)
    whole = with_metadata(saved(progressive=True))
    for _ in range(500):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for at in rng.integers(0, len(damaged), 4):
            damaged[at] = rng.integers(256)
        strip_metadata(bytes(damaged))
