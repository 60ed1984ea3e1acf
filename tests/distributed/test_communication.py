"""What a step sends between ranks is what docs/communication.md says, and nothing else (two ranks, plain engine)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data_prep.schema import MAX_CAPTIONS as K
from pretrain.config import TrainConfig
from pretrain.train.step import training_step
from tests.conftest import TINY_MODEL
from tests.distributed.collectives import CountCollectives
from tests.distributed.run import run_on_ranks
from tests.distributed.steps import (
    CLIP,
    EVERYTHING,
    LOCAL_ALIGNMENT,
    MASKED_LATENT,
    MULTI_ASPECT,
    SIGLIP,
    build,
    run_config,
)

Calls = Counter[tuple[str, int, str]]
W, B, N, D = 2, 4, 8, TINY_MODEL["embed_dim"]


def count(configs: dict[str, TrainConfig]) -> dict[str, tuple[dict[tuple[str, int, str], int], int, int]]:
    """By name: (calls of one step, texts of the rank that has most, parameters that are trained)."""
    counted = {}
    for name, config in configs.items():
        trainer, reader = build(config, torch.float32)
        batch = reader[0]
        with CountCollectives() as collectives:
            training_step(trainer, batch, 0)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        counted[name] = dict(collectives.calls), batch.num_padded_texts, trained
    return counted


@dataclass
class Step:
    """The formulas of docs/communication.md."""

    num_texts: int  # U_max
    num_trained: int  # M
    dtype: str = "float32"  # of the towers

    @property
    def gradients(self) -> Calls:
        return Counter({("allreduce_", self.num_trained, "float32"): 1})

    @property
    def texts(self) -> Calls:
        return self._with_grad(self.num_texts * D, self.dtype)

    @property
    def images(self) -> Calls:
        return self._with_grad(B * D, self.dtype)

    @property
    def weights(self) -> Calls:
        return Counter({("allgather_", B * 2 * K, "float32"): 1})

    @property
    def num_aligned(self) -> Calls:
        return Counter({("allreduce_", 1, "int64"): 1})

    @property
    def regions(self) -> Calls:
        return self._with_grad(B * K * D, "float32") + Counter({("allgather_", B * K, "float32"): 1})

    @staticmethod
    def _with_grad(numel: int, dtype: str) -> Calls:
        return Counter({("allgather_", numel, dtype): 1, ("reduce_scatter_", W * numel, dtype): 1})


@pytest.fixture(scope="module")
def counted(prepared_dir: Path, tiny_model_path: Path) -> dict[str, tuple[Calls, Step]]:
    objectives = {
        "clip": [CLIP],
        "bf16": [CLIP],
        "siglip": [SIGLIP],
        "aspects and regions": [MULTI_ASPECT, LOCAL_ALIGNMENT | {"text_to_region": False}],
        "everything": EVERYTHING,
        "in parts": EVERYTHING,
        "masked latent": [MASKED_LATENT],
    }
    changes: dict[str, dict[str, object]] = {
        "bf16": {"engine": {"kind": "torch", "precision": "bf16"}},
        "in parts": {"micro_batch_size": 1},
    }
    configs = {
        name: run_config(prepared_dir, tiny_model_path, terms, **changes.get(name, {}))
        for name, terms in objectives.items()
    }
    first, second = run_on_ranks(count, W, configs)
    assert first == second
    return {
        name: (Counter(calls), Step(num_texts, num_trained, "bfloat16" if name == "bf16" else "float32"))
        for name, (calls, num_texts, num_trained) in first.items()
    }


def test_clip(counted: dict[str, tuple[Calls, Step]]) -> None:
    calls, step = counted["clip"]
    assert step.num_texts <= B  # captions of other aspects, which no term reads, are not encoded
    assert calls == step.texts + step.images + step.weights + step.gradients


def test_features_travel_in_the_precision_of_the_towers(counted: dict[str, tuple[Calls, Step]]) -> None:
    calls, step = counted["bf16"]
    assert calls == step.texts + step.images + step.weights + step.gradients


def test_siglip_sends_no_weights(counted: dict[str, tuple[Calls, Step]]) -> None:
    calls, step = counted["siglip"]
    unread = Counter({("reduce_scatter_", N * D, "float32"): 1})  # only other ranks' texts are contrasted
    assert calls == step.texts + step.images - unread + step.gradients


def test_regions_of_one_direction_stay_where_they_are(counted: dict[str, tuple[Calls, Step]]) -> None:
    calls, step = counted["aspects and regions"]
    assert calls == step.texts + step.images + step.weights + step.num_aligned + step.gradients


@pytest.mark.parametrize("name", ["everything", "in parts"])
def test_texts_and_images_are_gathered_once_for_all_terms(counted: dict[str, tuple[Calls, Step]], name: str) -> None:
    """Three softmax terms; a step in four parts sends what the whole one does."""
    calls, step = counted[name]
    weights = step.weights + step.weights + step.weights
    assert calls == step.texts + step.images + weights + step.num_aligned + step.regions + step.gradients


def test_masked_latent_sends_gradients_alone(counted: dict[str, tuple[Calls, Step]]) -> None:
    calls, step = counted["masked latent"]
    assert calls == step.gradients
