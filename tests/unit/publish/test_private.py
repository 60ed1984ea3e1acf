"""Nothing of the machine leaves with a publication."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.publish.private import check_private, without_paths


def test_paths_are_cut_and_names_stay() -> None:
    config = TrainConfig.model_validate(
        {
            "run_dir": "/home/ana/runs/secret-project/mine",
            "data": {
                "train_dir": "relative/ana/train",
                "stage_dir": "/scratch/ana",
                "stream": None,
            },
            "model": {
                "name": "configs/models/x.json",
                "pretrained": "/data/ana/weights.safetensors",
                "image": {"weights": {"source": "package:some_package/weights.pth"}},
                "text": {"weights": {"source": "hf-hub:org/name/file.safetensors"}},
            },
            "objectives": [{"kind": "clip"}],
            "validation": {"val_dir": "~/val"},
            "global_batch_size": 8,
            "num_steps": 200,
        }
    )
    clean = without_paths(config.model_dump(mode="json"))
    assert clean["run_dir"] == "mine" and clean["data"]["train_dir"] == "train"
    assert clean["data"]["stage_dir"] == "ana"
    assert clean["model"]["name"] == "configs/models/x.json"
    assert clean["model"]["pretrained"] == "weights.safetensors"
    assert clean["model"]["image"]["weights"]["source"] == "package:some_package/weights.pth"
    assert clean["model"]["text"]["weights"]["source"] == "hf-hub:org/name/file.safetensors"
    assert clean["validation"]["val_dir"] == "val"
    text = yaml.safe_dump(clean)
    assert "/home" not in text and "/data/" not in text and "secret-project" not in text
    TrainConfig.model_validate(clean)  # a run can still be read from it


def test_addresses_and_folders_of_models_are_cut() -> None:
    stream = {"url": "pipe:aws s3 cp s3://bucket/{} -"}
    clean = without_paths({"name": "local-dir:/home/ana/exported", "stream": stream})
    assert clean == {"name": "local-dir:exported", "stream": {"url": "removed"}}


def test_a_file_that_names_a_path_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "ana" / "run"
    file = tmp_path / "evaluation.json"
    file.write_text(f'{{\n"note": "of {run_dir}/x"\n}}')
    with pytest.raises(InputError, match=rf"{file}: line 2 holds {run_dir}"):
        check_private([file], [run_dir])
    check_private([file], [])
    file.write_text(f"{Path.home()}/model")
    with pytest.raises(InputError, match="line 1"):
        check_private([file], [])
    weights = tmp_path / "x.safetensors"
    weights.write_bytes(b"\xff" * 10)  # no text
    check_private([weights], [run_dir])
