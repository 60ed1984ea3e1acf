"""A run small enough for tests, with real parts: synthetic shards, a tiny ViT, all four objectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.prepare import prepare

TINY_MODEL = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 48, "patch_size": 12, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
}


@pytest.fixture(scope="session")
def run_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/ (96 samples in 6 shards) and val/ (24)."""
    out_dir = tmp_path_factory.mktemp("run_data")
    source = SyntheticSource(num_train=96, num_val=24, image_px=48)
    prepare(PrepareConfig(name="tiny", source=source, samples_per_shard=16, num_workers=1, out_dir=out_dir))
    return out_dir


@pytest.fixture(scope="session")
def run_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    return path


@pytest.fixture
def run_config(run_data: Path, run_model: Path, tmp_path: Path) -> dict[str, Any]:
    """The YAML of a run, as a dictionary to change."""
    return {
        "run_dir": str(tmp_path / "run"),
        "data": {"train_dir": str(run_data / "train"), "val_dir": str(run_data / "val"), "num_workers": 0},
        "model": {"name": str(run_model)},
        "objectives": [
            {"kind": "clip"},
            {"kind": "multi_aspect"},
            {"kind": "local_alignment", "sigma": 0.0},
            {
                "kind": "masked_latent",
                "teacher": {"kind": "ema", "momentum_start": 0.9},
                "mask": {"kind": "block", "min_num_patches": 2},
                "predictor_depth": 1,
                "predictor_width": 16,
                "predictor_heads": 2,
            },
        ],
        "global_batch_size": 8,
        "num_steps": 8,
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "engine": {"kind": "torch"},
        "log_every": 1,
        "checkpoint_every": 3,
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path
