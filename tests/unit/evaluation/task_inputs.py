"""What a task is given, without a model and without images: rows, and features made for the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.interfaces import Encoder, Row, TaskInput


@dataclass
class Data:
    rows: Sequence[Row]
    classnames: tuple[str, ...] = ()
    name: str = "stand-in"
    digest: str = "0"
    rejected: Sequence[Mapping[str, str]] = ()

    def read_image(self, position: int) -> bytes:
        raise AssertionError("features are given: no image is read")


@dataclass
class TextEncoder:
    """Texts that it knows, to their features."""

    text_features: Mapping[str, NDArray[Any]]

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self.text_features[text] for text in texts]).astype(np.float32)


def task_input(
    data: Data,
    features: Mapping[str, NDArray[Any]],
    out_dir: Path,
    texts: Mapping[str, NDArray[Any]] | None = None,
    overlap_N: NDArray[np.bool_] | None = None,
    **settings: Any,
) -> TaskInput:
    """features: layer -> (N, L)."""
    return TaskInput(
        encoder=cast(Encoder, TextEncoder(texts or {})),
        data=data,
        features=lambda layer: np.asarray(features[layer], dtype=np.float32),
        overlap_N=overlap_N,
        settings=EvaluationSettings(**{"num_resamples": 50} | settings),
        out_dir=out_dir,
    )
