"""A stand-in of an encoder and of a data set, whose features are functions of the texts and pixels alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.interfaces import JOINT, Row, TaskInput
from pretrain.evaluation.results import ModelInfo

WIDTH = 24


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def text_feature(text: str) -> np.ndarray:
    """A random unit vector of its own for each text, always the same: (D,) float32."""
    return unit(np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH)).astype(np.float32)


class StandInEncoder:
    info = ModelInfo(name="stand-in", kind="export", digest="0" * 16, num_parameters=0, image_px=8, embed_dim=WIDTH)
    device = torch.device("cpu")
    logit_scale = 20.0
    layers = (JOINT,)

    def __init__(self) -> None:
        self.texts: list[str] = []  # all that were asked for

    def transform(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255

    def encode_pixels(self, image_BCHW: torch.Tensor, layer: str = JOINT) -> torch.Tensor:
        pixels = image_BCHW.flatten(1)[:, :WIDTH] - 0.5
        return torch.nn.functional.normalize(pixels, dim=1)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts.extend(texts)
        return np.stack([text_feature(text) for text in texts])


class StandInData:
    name = "stand-in"
    classnames: tuple[str, ...] = ()
    digest = "0" * 16
    rejected: Sequence[Mapping[str, str]] = ()
    notes: tuple[str, ...] = ()
    templates: str | None = None
    split: str | None = None

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def read_image(self, position: int) -> bytes:
        raise AssertionError("the task has the features, and needs no image")


def task_input(
    rows: Sequence[Row],
    image_ND: np.ndarray,
    out_dir: Path,
    overlap_N: np.ndarray | None = None,
    num_resamples: int = 50,
) -> TaskInput:
    return TaskInput(
        encoder=StandInEncoder(),
        data=StandInData(rows),
        features={JOINT: image_ND}.__getitem__,
        overlap_N=overlap_N,
        settings=EvaluationSettings(num_resamples=num_resamples, min_group_size=5),
        out_dir=out_dir,
    )
