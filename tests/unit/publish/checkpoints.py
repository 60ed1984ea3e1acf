"""A run's folder as the trainer leaves it, without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file

from data_prep.config_file import load_config
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.models.build import build_open_clip
from pretrain.train.retention import list_checksums, list_files
from tests.integration.conftest import write_config


def untrained_checkpoint(run_dir: Path, towers: dict[str, object], train_dir: Path) -> CustomTextCLIP:
    """A run's folder with one checkpoint, as the trainer leaves it, of a model that nobody trained."""
    path = run_dir.parent / f"{run_dir.name}.json"
    path.write_text(json.dumps(towers))
    values = {
        "run_dir": str(run_dir),
        "data": {"train_dir": str(train_dir)},
        "model": {"name": str(path)},
        "objectives": [{"kind": "clip"}],
        "global_batch_size": 8,
        "num_steps": 200,
    }
    config = load_config(write_config(run_dir.parent / f"{run_dir.name}.yaml", values), [], TrainConfig)
    torch.manual_seed(0)
    model = build_open_clip(config.model)
    folder = run_dir / "checkpoints" / "step-00000200"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    spec = {"model_cfg": model.spec.model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "model.json").write_text(json.dumps(spec))
    meta = {
        "step": 200,
        "record": {},
        "config": config.model_dump(mode="json"),
        "data_digest": ShardedDataset(train_dir).digest,
        "num_ranks": 1,
        "files": list_files(folder),
        "crc32": list_checksums(folder),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return model.eval()
