"""Which pictures a page shows: neighbours and captions against brute force, and nothing in a file but its pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.images.convert import ImageRejected
from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.interfaces import Encoder, Row, TaskInput
from pretrain.evaluation.reports import extras as extras_module
from pretrain.evaluation.reports.extras import (
    MAX_THUMBNAIL_BYTES,
    THUMBNAIL_PX,
    ReportExtras,
    report_extras,
    thumbnail,
)

WIDTH = 16


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def image_file(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


@dataclass
class Data:
    """Image `i` is of one colour, 10 x i red: its thumbnail says which it is."""

    rows: Sequence[Row]
    name: str = "set"
    classnames: tuple[str, ...] = ()
    digest: str = "0"
    rejected: tuple[dict[str, str], ...] = ()
    read: list[int] = field(default_factory=list)

    def read_image(self, position: int) -> bytes:
        self.read.append(position)
        return image_file((position * 10 % 250, 0, 0))


class Texts:
    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.encoded += texts
        return unit(np.stack([np.random.default_rng(list(text.encode())).normal(size=WIDTH) for text in texts]))


def given(rows: Sequence[Row]) -> tuple[TaskInput, NDArray[np.float32], Data, Texts]:
    image_ND = unit(np.random.default_rng(0).normal(size=(len(rows), WIDTH)))
    data, texts = Data(rows), Texts()
    made = TaskInput(
        encoder=cast(Encoder, texts),
        data=data,
        features=lambda layer: {"joint": image_ND}[layer],
        overlap_N=None,
        settings=EvaluationSettings(),
        out_dir=Path("unused"),
    )
    return made, image_ND, data, texts


def position_of(jpeg: bytes) -> int:
    red = np.asarray(Image.open(io.BytesIO(jpeg)))[..., 0].mean()
    return round(float(red) / 10)


# ---------------------------------------------------------------------------------------------- thumbnails


def test_a_thumbnail_holds_nothing_but_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe, born 1970"
    secrets = {"exif": exif, "comment": b"record 12345", "icc_profile": b"profile of Jane Doe"}
    data = image_file((200, 10, 10), (400, 300), format="JPEG", **secrets)
    assert all(secret in data for secret in (b"Jane Doe", b"record 12345", b"profile of"))
    small = thumbnail(data)
    assert not any(secret in small for secret in (b"Jane", b"record", b"profile of", b"Exif"))
    image = Image.open(io.BytesIO(small))
    assert image.size == (THUMBNAIL_PX, 120) and image.format == "JPEG"
    assert not image.getexif() and not {"comment", "exif", "icc_profile"} & set(image.info)
    assert np.abs(np.asarray(image, int).mean((0, 1)) - (200, 10, 10)).max() < 4


@pytest.mark.parametrize("size", [(3, 2), (2000, 40), (40, 2000), (161, 159)])
def test_thumbnails_of_any_shape(size: tuple[int, int]) -> None:
    image = Image.open(io.BytesIO(thumbnail(image_file((0, 200, 0), size))))
    assert max(image.size) == min(THUMBNAIL_PX, max(size))
    assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.3)


def test_a_thumbnail_is_turned_as_its_exif_says_and_noise_stays_small() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert Image.open(io.BytesIO(thumbnail(image_file((9, 9, 9), (80, 40), format="JPEG", exif=exif)))).size == (40, 80)
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert len(thumbnail(buffer.getvalue())) <= MAX_THUMBNAIL_BYTES
    with pytest.raises(ImageRejected, match="not an image"):
        thumbnail(b"%!PS-Adobe-3.0 EPSF-3.0")


# ---------------------------------------------------------------------------------------------- neighbours


def test_neighbours_are_those_of_brute_force_without_the_patients_own() -> None:
    rows = [Row(key=str(i), label="ab"[i % 2], patient=f"p{i // 3}") for i in range(24)]
    task, image_ND, _, _ = given(rows)
    shown = report_extras(task, num_queries=6)
    assert [position_of(found.picture.jpeg) for found in shown.neighbours] == [0, 1, 2, 3, 4, 5]
    for query, found in enumerate(shown.neighbours):
        cosines = [
            (float(image_ND[query].astype(float) @ image_ND[other].astype(float)), other)
            for other in range(24)
            if rows[other].patient != rows[query].patient
        ]
        best = sorted(cosines, reverse=True)[:5]
        assert [position_of(image.picture.jpeg) for image in found.nearest] == [other for _, other in best]
        assert [image.similarity for image in found.nearest] == pytest.approx([cosine for cosine, _ in best])
        assert [image.is_right for image in found.nearest] == [rows[i].label == rows[query].label for _, i in best]


def test_queries_are_the_first_of_each_label_and_never_of_the_training_part() -> None:
    labels = ["a", "a", "a", "b", "b", None, "c"]
    rows = [Row(key=str(i), label=label, is_train=i == 0) for i, label in enumerate(labels)]
    task, _, data, _ = given(rows)
    shown = report_extras(task, num_queries=5)
    assert [position_of(found.picture.jpeg) for found in shown.neighbours] == [1, 3, 5, 6, 2]
    assert 0 not in data.read
    assert len(data.read) == len(set(data.read)) == 6  # each picture once
    unlabelled = shown.neighbours[2]
    assert unlabelled.picture.label is None and not any(image.is_right for image in unlabelled.nearest)


# ---------------------------------------------------------------------------------------------- captions


def test_captions_and_images_find_each_other_as_brute_force_does() -> None:
    rows = [Row(key=str(i), label=str(i % 4), texts=(f"text {i // 2}", f"own {i}")) for i in range(20)]
    task, image_ND, _, texts = given(rows)
    shown = report_extras(task, num_queries=4)
    every = sorted(set(texts.encoded))
    assert len(every) == len(texts.encoded) == 30
    assert shown.candidates == "Sought among 30 captions and 20 images."
    encoded = dict(zip(every, Texts().encode_texts(every).astype(float), strict=True))
    for query, found in enumerate(shown.captions_of_images):
        cosine = {text: float(image_ND[query].astype(float) @ vector) for text, vector in encoded.items()}
        ranking = sorted(every, key=lambda text: -cosine[text])
        expected = ranking[:3]
        own = next(text for text in ranking if text in rows[query].texts)
        expected += [own] if own not in expected else []
        assert [(text.text, text.rank) for text in found.captions] == [(t, ranking.index(t) + 1) for t in expected]
        assert [text.is_right for text in found.captions] == [text in rows[query].texts for text in expected]
    assert [found.text for found in shown.images_of_captions] == ["text 0", "text 1"]  # rows 0 and 1 share one
    for found in shown.images_of_captions:
        ranking = np.argsort(-(image_ND.astype(float) @ encoded[found.text])).tolist()
        own = next(i for i in ranking if found.text in rows[i].texts)
        expected = ranking[:5] + ([own] if own not in ranking[:5] else [])
        assert [position_of(image.picture.jpeg) for image in found.images] == expected
        assert [image.rank for image in found.images] == [ranking.index(i) + 1 for i in expected]


def test_among_equals_the_wrong_ones_come_first() -> None:
    ranking = extras_module._rank(np.array([0.5, 0.5, 0.5, 0.1]), [True, False, False, False], 2)
    assert ranking == [(1, 0.5, 1, False), (2, 0.5, 2, False), (0, 0.5, 3, True)]


def test_a_large_set_is_searched_in_part_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras_module, "MAX_CANDIDATES", 10)
    rows = [Row(key=str(i), texts=(f"text {i}",)) for i in range(100)]
    task, _, _, texts = given(rows)
    shown = report_extras(task, num_queries=3)
    assert len(texts.encoded) == 10 and {"text 0", "text 1", "text 2"} <= set(texts.encoded)
    assert shown.candidates == "Sought among 10 captions and 10 images (a part of the 100 images with captions)."


def test_a_set_with_nothing_to_show() -> None:
    task, _, _, texts = given([Row(key="0", is_train=True, texts=("a",))])
    assert report_extras(task) == ReportExtras(how_chosen=report_extras(task).how_chosen)
    assert texts.encoded == []
    assert report_extras(given([Row(key="0")])[0]).neighbours == ()
