"""A task's input made of real parts: a tiny open_clip model with random weights, images of noise, labels and patients.

What stands in for an encoder and a data set holds no more than the task asks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray

from pretrain.evaluation.config import EvaluationSettings
from pretrain.evaluation.interfaces import JOINT, Row, TaskInput
from pretrain.evaluation.results import DatasetInfo, EvaluationResult, ModelInfo, TaskResult, write_result

CLASSNAMES = ("melanoma", "nevus", "basal cell carcinoma", "psoriasis", "tinea corporis")


@cache
def tiny_model(seed: int = 0) -> open_clip.CLIP:
    torch.manual_seed(seed)
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()


@dataclass(frozen=True)
class OpenClipEncoder:
    model: open_clip.CLIP
    info: ModelInfo
    tokenizer: Any = field(default_factory=open_clip.SimpleTokenizer)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.model.encode_text(self.tokenizer(list(texts)), normalize=True).numpy()


@dataclass(frozen=True)
class RowSet:
    rows: Sequence[Row]
    classnames: tuple[str, ...]
    name: str = "noise"
    digest: str = "0123456789abcdef"
    rejected: tuple[()] = ()
    templates: str | None = None
    split: str | None = None


@cache
def image_features(num_images: int, model_seed: int = 0) -> NDArray[np.float32]:
    """Of noise, less their mean: else a model with random weights takes all images for one class. (N, 24) unit."""
    images = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        image_ND = tiny_model(model_seed).encode_image(images, normalize=True)
    return torch.nn.functional.normalize(image_ND - image_ND.mean(0), dim=1).numpy()


def make_rows(num_images: int, classnames: Sequence[str] = CLASSNAMES, seed: int = 3) -> list[Row]:
    """Two images a patient, of any classes."""
    rng = np.random.default_rng(seed)
    tones, sexes = rng.choice(["I", "II", "V", ""], num_images), rng.choice(["female", "male"], num_images)
    return [
        Row(
            key=f"{i:04d}",
            label=str(rng.choice(list(classnames))),
            patient=f"patient {i // 2}",
            attributes={"fitzpatrick": str(tones[i]), "sex": str(sexes[i])},
        )
        for i in range(num_images)
    ]


def make_input(
    out_dir: Path,
    rows: Sequence[Row],
    classnames: tuple[str, ...] = CLASSNAMES,
    overlap_N: NDArray[np.bool_] | None = None,
    model_seed: int = 0,
    settings: EvaluationSettings | None = None,
) -> TaskInput:
    model = tiny_model(model_seed)
    info = ModelInfo(
        name=f"tiny {model_seed}",
        kind="open_clip",
        digest=f"{model_seed:016x}",
        num_parameters=1,
        image_px=32,
        embed_dim=24,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    return TaskInput(
        encoder=OpenClipEncoder(model, info),
        data=RowSet(rows, classnames),
        features={JOINT: image_features(len(rows), model_seed)}.__getitem__,
        overlap_N=overlap_N,
        settings=settings or EvaluationSettings(num_resamples=50, min_group_size=5),
        out_dir=out_dir,
    )


def renamed(given: TaskInput, name: str, digest: str) -> TaskInput:
    return replace(given, data=replace(given.data, name=name, digest=digest))


def write_evaluation(given: TaskInput, *tasks: TaskResult) -> Path:
    """evaluation.json beside the tables that the tasks wrote; returns the folder."""
    write_result(
        given.out_dir,
        EvaluationResult(
            model=given.encoder.info,
            dataset=DatasetInfo(name=given.data.name, num_images=len(given.data.rows), digest=given.data.digest),
            tasks=tasks,
            seconds=1.0,
            created="2026-11-22T00:00:00Z",
            versions={},
        ),
    )
    return given.out_dir
