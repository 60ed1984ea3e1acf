"""A run small enough for tests, with all four objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def run_config(prepared_dir: Path, tiny_model_path: Path, tmp_path: Path) -> dict[str, Any]:
    """The YAML of a run, as a dictionary to change."""
    return {
        "run_dir": str(tmp_path / "run"),
        "data": {"train_dir": str(prepared_dir / "train"), "num_workers": 0},
        "model": {"name": str(tiny_model_path)},
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
        "checkpoint": {"every": 3},
        "trackers": [],
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def val_dir(config: dict[str, Any]) -> str:
    """The validation split beside the run's training split."""
    return str(Path(config["data"]["train_dir"]).parent / "val")
