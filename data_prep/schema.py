"""The one contract between data preparation and training: samples, captions and the shard manifest.

No I/O here. Everything that crosses a file is a pydantic model (JSON) or a numpy structured array
(`INDEX_DTYPE`), both versioned by `SCHEMA_VERSION`.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

SCHEMA_VERSION = 2

MAX_SUBCAPTIONS = 8
#: whole caption + diagnosis + visual concepts + sub-captions: the slots K of an image
MAX_CAPTIONS = 3 + MAX_SUBCAPTIONS


class Aspect(StrEnum):
    """What a caption speaks of. The first three are made once an image; the rest are sub-captions."""

    CAPTION = "caption"  # the whole caption, as written
    DIAGNOSIS = "diagnosis"  # the disease's path in the ontology, as a sentence
    VISUAL_CONCEPTS = "visual_concepts"  # the annotated clinical concepts, as a sentence
    IMPRESSION = "impression"  # what the author thinks it is: diagnosis, differential
    MORPHOLOGY = "morphology"  # colour, shape, border, surface, primary lesion
    BODY_SITE = "body_site"
    SYMPTOMS = "symptoms"
    HISTORY = "history"  # onset, course, causes, triggers, previous diseases
    DEMOGRAPHICS = "demographics"
    INVESTIGATION = "investigation"  # histology, laboratory, dermoscopic and other tests
    MANAGEMENT = "management"  # treatment, prevention, outcome
    OTHER = "other"


#: Position is the code stored in shards' indices: append only.
ASPECTS: tuple[Aspect, ...] = tuple(Aspect)
ASPECT_CODE: dict[Aspect, int] = {aspect: code for code, aspect in enumerate(ASPECTS)}
SUBCAPTION_ASPECTS: tuple[Aspect, ...] = ASPECTS[3:]
NO_ASPECT_CODE = 255


def text_hash(text: str) -> int:
    """64-bit blake2b of the UTF-8 bytes: the name of a string across images and ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Caption(Frozen):
    """One text of an image. Valid by construction: it has words.

    `origin` says where it came from: `column:NAME` of the source's table, `template` (made from the row's columns),
    `ontology`, `concepts`, `rules-N`, or `llm:MODEL:PROMPT:DATE` (first 12 hex digits of the prompt's hash; the day
    of the answer).
    """

    aspect: Aspect
    text: str
    origin: str = ""

    @field_validator("text")
    @classmethod
    def _has_words(cls, text: str) -> str:
        text = " ".join(text.split())
        if not any(character.isalnum() for character in text):
            raise ValueError("a caption must contain words")
        return text


class Demographics(Frozen):
    """What is known of the person, coarse by intent; None where unknown."""

    age_years: float | None = Field(default=None, ge=0, le=90)  # 90 stands for 90 and more
    age_band: str | None = Field(default=None, pattern=r"^(\d{1,2}-\d{1,2}|90\+)$")  # decade, or the source's own band
    sex: str | None = None
    fitzpatrick: int | None = Field(default=None, ge=1, le=6)


class Sample(Frozen):
    """One image-text pair, from the CSV row to the loss.

    `key` is `<dataset>-<row>`: it finds the row of the source table and says nothing about the person.
    File names of the source never enter a Sample (they can hold names and record numbers).
    """

    key: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    captions: tuple[Caption, ...] = Field(min_length=1, max_length=MAX_CAPTIONS)
    diagnosis: str | None = None  # the label as the source names it, normalised
    diagnosis_path: tuple[str, ...] = ()  # ontology nodes, from general to specific
    concepts: tuple[str, ...] = ()
    body_site: str | None = None
    demographics: Demographics = Demographics()
    modality: str | None = None
    group: str | None = None  # salted hash of the patient / lesion id
    dataset: str
    source: str | None = None  # where within the data set: "youtube", "pubmed", "HAM10000"
    licence: str | None = None
    image_sha256: str | None = None  # of the bytes in the shard

    @property
    def caption(self) -> str:
        """The whole caption."""
        return next(c.text for c in self.captions if c.aspect is Aspect.CAPTION)

    @property
    def subcaptions(self) -> tuple[Caption, ...]:
        return tuple(c for c in self.captions if c.aspect in SUBCAPTION_ASPECTS)


#: One row per sample in `index.npy`, in the order of the shards: where its bytes are, and which texts it owns.
#: With the text hashes here, every rank can work out who owns what in a global batch without reading others' files.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("image_offset", "<u8"),
        ("image_num_bytes", "<u4"),
        ("json_offset", "<u8"),
        ("json_num_bytes", "<u4"),
        ("text_hash", "<u8", (MAX_CAPTIONS,)),
        ("text_aspect", "u1", (MAX_CAPTIONS,)),  # NO_ASPECT_CODE in unused slots
    ]
)


#: One row per sample in `image_hashes.npy`, in the order of `index.npy`: what finds copies of an image elsewhere.
HASH_DTYPE = np.dtype(
    [
        ("pixels", "u1", (32,)),  # SHA-256 of size and oriented RGB pixels
        ("perceptual", "<u8", (4,)),  # 256-bit perceptual hash, compared by Hamming distance
    ]
)


class ShardInfo(Frozen):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+\.tar$")  # inside the manifest's own folder, never a path
    num_samples: int = Field(ge=0)
    num_bytes: int
    sha256: str
    licences: dict[str, int] = {}  # samples by licence


class ShardManifest(Frozen):
    """`manifest.json` of one split: written last, so a folder with a manifest is whole."""

    schema_version: int = SCHEMA_VERSION
    dataset: str
    split: str
    num_samples: int
    shards: tuple[ShardInfo, ...]
    index_sha256: str
    hashes_sha256: str = ""  # of image_hashes.npy
    image_short_side: int
    captions_by_aspect: dict[Aspect, int]
    samples_by_diagnosis: dict[str, int]
    samples_by_licence: dict[str, int]
    samples_by_source: dict[str, int] = {}
    num_rejected: int
    notes: dict[str, int] = {}  # what was dropped or not found on the way, by reason; no row was lost by it
    decomposer: str  # name and version of what made the sub-captions
    config_digest: str
