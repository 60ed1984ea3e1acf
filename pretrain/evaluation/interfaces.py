"""What the parts of an evaluation hand each other: an encoder, a data set, features, and a task's way to a result.

Shapes: N images, T texts, D joint width, L width of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.results import ModelInfo

JOINT = "joint"  # the layer whose features stand beside the texts': unit vectors
TOWER = "tower"  # the image tower's pooled output, before the projection into the joint space


class Encoder(Protocol):
    """Any dual encoder, from wherever it was loaded, in eval mode."""

    info: ModelInfo
    device: torch.device

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The model's own inference preprocessing: (3, H, W) float32."""
        ...

    @property
    def logit_scale(self) -> float:
        """exp of the parameter."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """`joint`, `tower`, and the names of further layers that can be encoded."""
        ...

    def encode_pixels(self, image_BCHW: Tensor, layer: str = JOINT) -> Tensor:
        """(B, D) unit vectors for `joint`, else (B, L); float32, on the CPU."""
        ...

    def encode_layers(self, image_BCHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """As `encode_pixels`, of several layers from one forward."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(T, D) unit vectors."""
        ...


@dataclass(frozen=True)
class Row:
    """One image of an evaluation set and what is known of it."""

    key: str  # of our own making; never a file name of the source
    label: str | None = None  # a class name as prompts write it
    texts: tuple[str, ...] = ()  # its own captions, for retrieval
    patient: str | None = None  # salted hash of the patient or lesion: rows that are not independent
    attributes: Mapping[str, str] | None = None  # "fitzpatrick": "III", "sex": "female", "age_band": "40-49", ...
    concepts: Mapping[str, bool] | None = None  # concept -> present; absent = not annotated
    diagnosis_path: tuple[str, ...] = ()  # ontology nodes, general to specific
    question: Question | None = None
    licence: str | None = None
    is_train: bool = False  # of the data set's own training part: used by the probe alone


@dataclass(frozen=True)
class Question:
    """Multiple choice: `answer` is the right option's position."""

    text: str
    options: tuple[str, ...]
    answer: int
    kind: str | None = None


class EvalData(Protocol):
    """A data set as its description says: rows in a fixed order, and their images."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> Sequence[Row]: ...

    @property
    def classnames(self) -> tuple[str, ...]:
        """In the description's order; () where nothing is labelled."""
        ...

    @property
    def templates(self) -> str | None:
        """The list in configs/eval/templates.json for its class names, where its description names one."""
        ...

    @property
    def split(self) -> str | None:
        """DATASET-SPLIT where the rows are those of a prepared split."""
        ...

    @property
    def digest(self) -> str: ...

    @property
    def rejected(self) -> Sequence[Mapping[str, str]]:
        """What cannot be used: table, row, field and reason; an image that cannot be decoded has its row's key in place
        of table and row."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know, plain sentences."""
        ...

    def read_image(self, position: int) -> bytes:
        """The bytes of one image file."""
        ...


@dataclass(frozen=True)
class TaskInput:
    """What every task gets."""

    encoder: Encoder
    data: EvalData
    features: Callable[[str], NDArray[np.float32]]  # layer -> (N, L) of all rows, in their order
    overlap_N: NDArray[np.bool_] | None  # rows that the training data holds too; None: not compared
    settings: EvaluationSettings
    out_dir: Path
