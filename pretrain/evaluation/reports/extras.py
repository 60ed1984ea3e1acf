"""Pictures for the page of an evaluation: nearest neighbours, and captions and images that find each other.

Queries are chosen by their place in the data set, label after label, never by how well the model does on them.

Shapes: N images, Q queries, C candidates, D joint width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.config import ImageOptions
from data_prep.images.convert import decode_image
from pretrain.evaluation.interfaces import JOINT, Row, TaskInput

THUMBNAIL_PX = 160  # longer side
MAX_THUMBNAIL_BYTES = 16_000
MAX_CANDIDATES = 1000  # rows among which captions and images are sought: their texts are encoded for this alone
_NUM_NEAREST = 5
_NUM_CAPTIONS = 3


@dataclass(frozen=True)
class Picture:
    jpeg: bytes
    label: str | None


@dataclass(frozen=True)
class RankedImage:
    """`rank` from 1; `is_right`: the query's label, or one of the caption's own images."""

    picture: Picture
    similarity: float  # cosine
    rank: int
    is_right: bool


@dataclass(frozen=True)
class RankedText:
    text: str
    similarity: float
    rank: int
    is_right: bool


@dataclass(frozen=True)
class Neighbours:
    picture: Picture
    nearest: tuple[RankedImage, ...]


@dataclass(frozen=True)
class CaptionsOfImage:
    """The first captions, and the image's best own one behind them where it is not among them."""

    picture: Picture
    captions: tuple[RankedText, ...]


@dataclass(frozen=True)
class ImagesOfCaption:
    text: str
    images: tuple[RankedImage, ...]


@dataclass(frozen=True)
class ReportExtras:
    """What a page shows beside the numbers. Its pictures come from `thumbnail`."""

    neighbours: tuple[Neighbours, ...] = ()
    captions_of_images: tuple[CaptionsOfImage, ...] = ()
    images_of_captions: tuple[ImagesOfCaption, ...] = ()
    how_chosen: str = ""  # plain sentences for the page
    candidates: str = ""


def report_extras(given: TaskInput, num_queries: int = 8) -> ReportExtras:
    """Choose `num_queries` images, and as many captions, and find what the model puts next to them.

    Rows of the data set's training part take no part. Neighbours are of other patients, where these are known. At most
    num_queries x 13 pictures of MAX_THUMBNAIL_BYTES each. Raises data_prep's ImageRejected for an image that cannot be
    decoded, which had no features either.
    """
    rows = given.data.rows
    tested = [position for position, row in enumerate(rows) if not row.is_train]
    image_ND = given.features(JOINT).astype(np.float64)
    album = _Album(given)
    queries = _spread(tested, [rows[position].label for position in tested], num_queries)
    neighbours = tuple(_neighbours(query, tested, image_ND, rows, album) for query in queries)
    with_text = [position for position in tested if rows[position].texts]
    of_images, of_captions, candidates = _retrieved(given, with_text, image_ND, album, num_queries)
    return ReportExtras(
        neighbours=tuple(found for found in neighbours if found.nearest),
        captions_of_images=of_images,
        images_of_captions=of_captions,
        how_chosen="Examples are the first of each label in the data set, not chosen by their results.",
        candidates=candidates,
    )


def thumbnail(data: bytes) -> bytes:
    """Of any image file, a JPEG of at most THUMBNAIL_PX and MAX_THUMBNAIL_BYTES with nothing in it but pixels.

    Raises data_prep's ImageRejected for what cannot be decoded.
    """
    image = decode_image(data, ImageOptions(min_side_px=1))
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    image.info.clear()  # Pillow would write a comment that the file had
    for quality in (82, 60, 35):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        if buffer.tell() <= MAX_THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


class _Album:
    """Each picture is read and made small once."""

    def __init__(self, given: TaskInput) -> None:
        self._data = given.data
        self._pictures: dict[int, Picture] = {}

    def __getitem__(self, position: int) -> Picture:
        if position not in self._pictures:
            jpeg = thumbnail(self._data.read_image(position))
            self._pictures[position] = Picture(jpeg, self._data.rows[position].label)
        return self._pictures[position]


def _spread(positions: Sequence[int], labels: Sequence[str | None], num: int) -> list[int]:
    """The first position of each label, in their order; then the second of each, and so on."""
    turn_of: dict[str | None, int] = {}
    turns: list[tuple[int, int, int]] = []
    for position, label in zip(positions, labels, strict=True):
        turns.append((turn_of.get(label, 0), len(turns), position))
        turn_of[label] = turn_of.get(label, 0) + 1
    return [position for _, _, position in sorted(turns)[:num]]


def _neighbours(
    query: int, tested: Sequence[int], image_ND: NDArray[np.float64], rows: Sequence[Row], album: _Album
) -> Neighbours:
    patient = rows[query].patient
    others = [
        position for position in tested if position != query and (patient is None or rows[position].patient != patient)
    ]
    similarity = image_ND[others] @ image_ND[query]
    order = np.argsort(-similarity, kind="stable")[:_NUM_NEAREST]
    label = rows[query].label
    nearest = tuple(
        RankedImage(album[others[i]], float(similarity[i]), rank, label is not None and rows[others[i]].label == label)
        for rank, i in enumerate(order.tolist(), 1)
    )
    return Neighbours(album[query], nearest)


# ---------------------------------------------------------------------------------------------- captions


def _retrieved(
    given: TaskInput, with_text: Sequence[int], image_ND: NDArray[np.float64], album: _Album, num_queries: int
) -> tuple[tuple[CaptionsOfImage, ...], tuple[ImagesOfCaption, ...], str]:
    """Images with their captions, captions with their images, and a sentence on what they were sought among."""
    if not with_text:
        return (), (), ""
    rows = given.data.rows
    image_queries = _spread(with_text, [rows[position].label for position in with_text], num_queries)
    among = _candidates(with_text, image_queries)
    texts = list(dict.fromkeys(text for position in among for text in rows[position].texts))
    text_CD = given.encoder.encode_texts(texts).astype(np.float64)
    of_images = []
    for query in image_queries:
        ranking = _rank(text_CD @ image_ND[query], [text in rows[query].texts for text in texts], _NUM_CAPTIONS)
        captions = tuple(RankedText(texts[i], similarity, rank, right) for i, similarity, rank, right in ranking)
        of_images.append(CaptionsOfImage(album[query], captions))
    place = {text: i for i, text in enumerate(texts)}
    of_captions = []
    for text in list(dict.fromkeys(rows[query].texts[0] for query in image_queries)):
        ranking = _rank(image_ND[among] @ text_CD[place[text]], [text in rows[i].texts for i in among], _NUM_NEAREST)
        images = tuple(RankedImage(album[among[i]], similarity, rank, right) for i, similarity, rank, right in ranking)
        of_captions.append(ImagesOfCaption(text, images))
    part = "" if len(among) == len(with_text) else f" (a part of the {len(with_text):,} images with captions)"
    sentence = f"Sought among {len(texts):,} captions and {len(among):,} images{part}."
    return tuple(of_images), tuple(of_captions), sentence


def _candidates(with_text: Sequence[int], queries: Sequence[int]) -> list[int]:
    """All rows, or at most MAX_CANDIDATES: the queries, and others at equal distances."""
    if len(with_text) <= MAX_CANDIDATES:
        return list(with_text)
    chosen = set(queries)
    others = [position for position in with_text if position not in chosen]
    kept = np.linspace(0, len(others) - 1, MAX_CANDIDATES - len(chosen)).round().astype(int)
    return sorted(chosen | {others[i] for i in kept.tolist()})


def _rank(similarity_C: NDArray[np.float64], is_right: Sequence[bool], num: int) -> list[tuple[int, float, int, bool]]:
    """(candidate, similarity, rank, is_right) of the first `num`, and of the best right one where it is not in them.

    Among equals the wrong ones come first, as in the metrics.
    """
    right_C = np.array(is_right)
    order = np.lexsort((right_C, -similarity_C))
    chosen = list(order[:num])
    best = order[right_C[order]][:1]
    shown = chosen + [i for i in best if i not in chosen]
    rank_of = {int(i): rank for rank, i in enumerate(order.tolist(), 1)}
    return [(int(i), float(similarity_C[i]), rank_of[int(i)], bool(right_C[i])) for i in shown]
