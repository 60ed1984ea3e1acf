"""What the keys of a run's config do, and what happens around a run: one behaviour a test."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.config_file import load_config
from pretrain.cli import main
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset
from pretrain.data.plan import epoch_order
from pretrain.evaluation.encoding.encoders import load_encoder, untrained_encoder
from pretrain.publish.export import check_export, export
from pretrain.train.checkpoint import list_checkpoints
from pretrain.train.metrics import read_metrics
from tests.conftest import TINY_MODEL
from tests.integration.conftest import val_dir, write_config
from tests.integration.test_train import losses, run, weights
from tests.unit.pretrain.test_damage import damage_images


def metrics(config: dict[str, Any]) -> list[dict[str, Any]]:
    return read_metrics(Path(config["run_dir"]) / "metrics.jsonl")


@pytest.mark.parametrize(("stage", "num_ranks"), [("torch", 1), (0, 1), (1, 2), (3, 2)])
def test_logit_scale_never_passes_its_maximum(
    run_config: dict[str, Any], tmp_path: Path, stage: int | str, num_ranks: int
) -> None:
    run_config["model"] |= {"init_logit_scale": 9.99, "max_logit_scale": 10.0}
    run_config |= {"optimizer": {"lr": 0.05, "warmup_steps": 0, "schedule": "constant"}, "num_steps": 4}
    run_config["engine"] = {"kind": "torch"} if stage == "torch" else {"kind": "deepspeed", "zero_stage": stage}
    result = run(write_config(tmp_path / "run.yaml", run_config), num_ranks)
    assert result.returncode == 0, result.stderr[-2000:]
    scales = [record["logit_scale"] for record in metrics(run_config)]
    assert max(scales) <= 10.0 * (1 + 1e-6) and len(set(scales)) > 1
    assert {record["lr"] for record in metrics(run_config)} == {0.05}
    assert all(record["grad_norm"] > 0 for record in metrics(run_config))


@pytest.fixture
def damaged_config(run_config: dict[str, Any], tmp_path: Path, prepared_dir: Path) -> dict[str, Any]:
    """Pictures that are zeros: four that rank 1 of two reads in the first step, two in the seventh, one in the last."""
    copy = Path(shutil.copytree(prepared_dir / "train", tmp_path / "train"))
    order = epoch_order(ShardedDataset(copy).shard_sizes, seed=0, epoch=0, shards_per_block=16)
    damage_images(copy, order[[4, 5, 6, 7, 49, 52, 60]])
    run_config["data"]["train_dir"] = str(copy)
    return run_config


def test_damaged_images_on_one_rank_alone_are_replaced(damaged_config: dict[str, Any], tmp_path: Path) -> None:
    """On two ranks as on one; and past the limit the run ends with one message."""
    config = write_config(tmp_path / "run.yaml", damaged_config)
    assert main(["train", str(config), f"run_dir={tmp_path / 'one'}"]) == 0
    result = run(config, 2, f"run_dir={tmp_path / 'two'}", "data.num_workers=1")
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [record["damaged_samples"] for record in two] == [4, 4, 4, 4, 4, 4, 6, 7]
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-4)
    ledgers = [(tmp_path / name / "damaged.jsonl").read_text() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1] and len(ledgers[0].splitlines()) == 7

    result = run(config, 2, f"run_dir={tmp_path / 'ended'}", "data.max_damaged_fraction=0.0005")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "step 7: 6 of 56 samples seen are damaged" in errors[0], result.stderr[-2000:]


def test_a_resumed_run_replaces_alike(damaged_config: dict[str, Any], tmp_path: Path) -> None:
    """As a run killed after its last step and before the checkpoint of it: steps 7 and 8 are done again."""
    config, run_dir = str(write_config(tmp_path / "run.yaml", damaged_config)), Path(damaged_config["run_dir"])
    assert main(["train", config]) == 0
    before = (losses(run_dir), weights(run_dir, 8), (run_dir / "damaged.jsonl").read_bytes())
    shutil.rmtree(list_checkpoints(run_dir)[-1])
    assert list_checkpoints(run_dir)[-1].name == "step-00000006"
    assert main(["train", config, "data.num_workers=1"]) == 0
    assert (losses(run_dir), (run_dir / "damaged.jsonl").read_bytes()) == (before[0], before[2])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in weights(run_dir, 8).items())


def test_shards_are_read_from_the_nodes_disk(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The second run reads the copy alone: in the original the pictures are gone by then."""
    copy = Path(shutil.copytree(run_config["data"]["train_dir"], tmp_path / "train"))
    run_config["data"] |= {"train_dir": str(copy), "stage_dir": str(tmp_path / "disk")}
    config = str(write_config(tmp_path / "run.yaml", run_config | {"num_steps": 3}))
    assert main(["train", config]) == 0
    damage_images(copy, range(96))
    assert main(["train", config, f"run_dir={tmp_path / 'again'}", "data.max_damaged_fraction=0"]) == 0
    assert losses(tmp_path / "again") == losses(run_config["run_dir"])


def test_a_run_goes_on_from_its_own_resolved_config(run_config: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    assert main(["train", str(config)]) == 0
    run_dir = Path(run_config["run_dir"])
    assert main(["train", str(run_dir / "config.yaml")]) == 0
    assert main(["train", str(config)]) == 0
    assert [record["step"] for record in metrics(run_config)] == list(range(1, 9))
    assert [path.name for path in list_checkpoints(run_dir)] == [
        "step-00000006",
        "step-00000008",
    ]


def test_a_torn_last_line_of_the_metrics_does_not_stop_a_resume(run_config: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_config | {"num_steps": 3})
    assert main(["train", str(config)]) == 0
    with (Path(run_config["run_dir"]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert main(["train", str(config)]) == 0
    assert [record["step"] for record in metrics(run_config)] == [1, 2, 3]


def test_gradients_are_reported_where_they_are_not_clipped(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_config |= {"num_steps": 2, "engine": {"kind": "deepspeed", "zero_stage": 0}}
    run_config["optimizer"] = {"warmup_steps": 0, "grad_clip_norm": None}
    assert run(write_config(tmp_path / "run.yaml", run_config), 1).returncode == 0
    assert all(record["grad_norm"] > 0 for record in metrics(run_config))


def test_a_frozen_image_tower_keeps_its_weights(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_config["model"] |= {"image": {"frozen": True}}
    run_config |= {"objectives": run_config["objectives"][:2], "num_steps": 3}
    assert main(["train", str(write_config(tmp_path / "run.yaml", run_config))]) == 0
    trained = load_encoder(Path(run_config["run_dir"])).model.state_dict()
    (Path(run_config["run_dir"]) / "checkpoints").rename(tmp_path / "first")
    assert main(["train", str(write_config(tmp_path / "run.yaml", run_config)), "optimizer.lr=0.01"]) == 0
    other = load_encoder(Path(run_config["run_dir"])).model.state_dict()
    same = {name for name in trained if torch.equal(trained[name], other[name])}
    assert all((name in same) is (name != "visual.proj") for name in trained if name.startswith("visual."))
    assert any(name not in same for name in trained if name.startswith("text."))


def test_preprocessing_and_a_sigmoid_bias_survive_training_and_export(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A tower with its own mean, std and resize mode, and the bias parameter that SigLIP's configs ask for."""
    document = json.loads(Path(run_config["model"]["name"]).read_text())
    document["model_cfg"]["init_logit_bias"] = -10
    document["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    model = tmp_path / "siglip_like.json"
    model.write_text(json.dumps(document))
    run_config["model"] = {"name": str(model)}
    assert main(["train", str(write_config(tmp_path / "run.yaml", run_config)), "num_steps=3"]) == 0
    encoder = load_encoder(Path(run_config["run_dir"]))
    assert encoder.model.visual.preprocess_cfg["resize_mode"] == "squash"
    folder = export(Path(run_config["run_dir"]), tmp_path / "export")
    exported = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert exported["mean"] == [0.5] * 3 and exported["resize_mode"] == "squash"
    assert check_export(folder, encoder, ShardedDataset(val_dir(run_config))) < 1e-5


def test_frozen_teacher_is_not_needed_to_evaluate(
    run_config: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher.json"
    teacher.write_text(tiny_model_path.read_text())
    run_config["objectives"][-1]["teacher"] = {"kind": "frozen", "name": str(teacher)}
    assert main(["train", str(write_config(tmp_path / "run.yaml", run_config)), "num_steps=3"]) == 0
    teacher.unlink()
    assert math.isfinite(load_encoder(Path(run_config["run_dir"])).logit_scale)


@pytest.mark.long
def test_two_ranks_go_on_with_edges_of_their_own(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint holds the edges with the context length added; the config does not."""
    run_config |= {"objectives": [{"kind": "clip"}], "num_steps": 3, "launch": {"num_ranks": 2, "threads_per_rank": 1}}
    run_config["data"] |= {"text_bucket_edges": [16, 32]}
    path = str(write_config(tmp_path / "run.yaml", run_config))
    assert main(["train", path]) == 0
    assert main(["train", path]) == 0  # nothing left to do, and nothing to refuse


CONVOLUTION = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}


def test_batch_norm_in_bf16_keeps_its_statistics(run_config: dict[str, Any], tmp_path: Path) -> None:
    """DeepSpeed rounds the parameters only; what does not learn comes out of the checkpoint as it went in."""
    (tmp_path / "model.json").write_text(json.dumps({"model_cfg": TINY_MODEL | {"vision_cfg": CONVOLUTION}}))
    run_config["model"] = {"name": str(tmp_path / "model.json"), "text": {"frozen": True}}
    run_config |= {"objectives": [{"kind": "clip"}], "num_steps": 3}
    run_config["engine"] = {"kind": "deepspeed", "precision": "bf16", "zero_stage": 1}
    path = write_config(tmp_path / "run.yaml", run_config)
    assert run(path, 1).returncode == 0
    start = untrained_encoder(load_config(path, [], TrainConfig)).model.state_dict()
    trained = load_encoder(Path(run_config["run_dir"])).model.state_dict()
    statistics = [name for name in start if "running_" in name]
    frozen = [name for name in start if name.startswith("text.") and name != "text.text_projection"]
    assert statistics and frozen and all(torch.equal(trained[name], start[name]) for name in statistics + frozen)
    assert not torch.equal(trained["visual.head.proj.weight"], start["visual.head.proj.weight"])


@pytest.mark.parametrize(
    "change",
    [{"micro_batch_size": 4}, {"engine": {"kind": "deepspeed", "precision": "bf16", "zero_stage": 1}}],
    ids=["parts", "bf16"],
)
def test_statistics_that_would_move_wrongly_are_refused(
    run_config: dict[str, Any], tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"model_cfg": TINY_MODEL | {"vision_cfg": CONVOLUTION}}))
    run_config["model"] = {"name": str(tmp_path / "model.json"), "freeze_batch_norm": False}
    run_config |= {"objectives": [{"kind": "clip"}], **change}
    assert main(["train", str(write_config(tmp_path / "run.yaml", run_config))]) == 2
    assert "model.freeze_batch_norm: false" in capsys.readouterr().err
