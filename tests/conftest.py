"""What many tests share: a small synthetic data set, prepared once a session, and a tiny open_clip model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.prepare import prepare

# before torch is imported: over tensors this small its threads only wait for each other, worst on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "patch_size": 12, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train (96 samples in 6 shards) and val (24 in 2), 48 px. To be read, never to be changed."""
    config = PrepareConfig(
        name="synthetic",
        source=SyntheticSource(num_train=96, num_val=24, image_px=48),
        samples_per_shard=16,
        num_workers=2,
        out_dir=tmp_path_factory.mktemp("prepared"),
    )
    prepare(config)
    return config.out_dir


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model config: ViT with a patch grid of 4 x 4, causal text tower of 64 tokens, 32 joint dimensions."""
    path = tmp_path_factory.mktemp("models") / "tiny.json"
    path.write_text(json.dumps({"model_cfg": TINY_MODEL}), encoding="utf-8")
    return path
