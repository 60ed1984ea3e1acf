"""Metadata out of a JPEG without touching its picture: segments on a short list stay, every other one goes.

Source: ITU-T T.81, annex B (segments and markers); JFIF 1.02; Adobe's APP14 as libjpeg reads it (jdmarker.c).
"""

from __future__ import annotations

import re

_SOI, _EOI, _SOS, _DHT, _DQT, _DRI = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD
_APP0, _APP14, _APP15, _COM = 0xE0, 0xEE, 0xEF, 0xFE
#: Baseline, extended sequential and progressive, all Huffman coded: what every decoder reads.
_FRAMES = {0xC0, 0xC1, 0xC2}
_TABLES = {_DHT, _DQT, _DRI}
#: Within coded data 0xFF is followed by a stuffed zero or a restart marker; anything else ends the scan.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
#: JFIF 1.01, no density, no thumbnail.
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


def strip_metadata(data: bytes) -> bytes | None:
    """The JPEG with tables, frame header and scans as they are, and nothing else; whatever decodes both gets the same
    pixels. None where that cannot be said safely: not an 8-bit Huffman-coded picture of one or three components,
    stray bytes between the segments, or no end marker.

    Gone are all APP segments (EXIF, XMP, IPTC, colour profiles, thumbnails, second pictures), comments, and what
    follows the end marker. Two APP segments tell the decoder which colour space it has before it. They are written
    anew: JFIF without density and thumbnail, Adobe's with its colour transform alone. The picture is not decoded here,
    so damage within a scan goes unnoticed, and so do bytes that someone hid between the coded data and the end marker.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    kept: list[bytes] = []
    jfif, adobe, seen = b"", b"", set[int]()
    position = 2
    while True:
        # any number of 0xFF may stand before a marker
        while data[position : position + 2] == b"\xff\xff":
            position += 1
        if position + 2 > len(data) or data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == _EOI:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end > len(data) or end < position + 4:
            return None
        if marker in _TABLES:
            kept.append(data[position:end])
        elif marker in _FRAMES:
            # one frame, 8 bits a sample, grey or three colours
            if seen & _FRAMES or end < position + 10 or data[position + 4] != 8 or data[position + 9] not in (1, 3):
                return None
            kept.append(data[position:end])
        elif marker == _SOS:
            if (found := _END_OF_SCAN.search(data, end)) is None:
                return None
            end = found.start()
            kept.append(data[position:end])
        elif marker == _APP0 and data.startswith(b"JFIF\x00", position + 4) and end - position >= 18:
            jfif = _JFIF
        elif marker == _APP14 and data.startswith(b"Adobe", position + 4) and end - position >= 16:
            adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + data[position + 15 : position + 16]
        elif not (_APP0 <= marker <= _APP15 or marker == _COM):
            return None  # arithmetic coding, lossless, hierarchical, a height that comes after the scan, reserved
        seen.add(marker)
        position = end
    if not {_DQT, _DHT, _SOS} <= seen or not seen & _FRAMES:
        return None
    return b"".join((b"\xff\xd8", jfif, adobe, *kept, b"\xff\xd9"))
