"""Every refusal: a message that names the file, the row or field and the remedy, and an exit status other than 0."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from pretrain.cli import main
from tests.integration.conftest import val_dir, write_config


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A data config over four images, one broken, and one row without a caption."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b", "c"):
        Image.effect_noise((64, 64), 90).convert("RGB").save(images / f"{name}.jpg")
    (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:-300])
    rows = [
        ("a.jpg", "A brown macule on the arm."),
        ("broken.jpg", "A papule."),
        ("b.jpg", "  "),
        ("gone.jpg", "A wheal."),
    ]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "text"), *rows, ("c.jpg", "A red plaque.")])
    return write_data_config(tmp_path)


def write_data_config(folder: Path, **source: Any) -> Path:
    config = {
        "name": "table",
        "source": {
            "kind": "table",
            "table_path": str(folder / "table.csv"),
            "image_dir": str(folder / "images"),
            "columns": {"image": "file", "caption": "text"},
        }
        | source,
        "val_fraction": 0,
        "num_workers": 1,
        "out_dir": str(folder / "out"),
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_rejected_rows_are_listed_with_their_reason_and_counted(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(table)]) == 0
    printed = capsys.readouterr().out
    with (table.parent / "out" / "rejected.csv").open(newline="") as file:
        rejected = {int(row["row"]): row for row in csv.DictReader(file)}
    assert set(rejected) == {2, 3, 4}
    assert rejected[2]["field"] == "image" and "truncated" in rejected[2]["reason"]
    assert rejected[3]["field"] == "text"
    assert (rejected[4]["field"], rejected[4]["reason"]) == ("image", "no such image file")
    assert all(row["table"] == "table.csv" for row in rejected.values())
    assert "2 samples" in printed and "rejected 1: truncated or corrupt image data" in printed


def test_missing_column(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_data_config(table.parent, columns={"image": "file", "caption": "texts"})
    message = refused(capsys, "prepare", config)
    assert "table.csv" in message and "'texts'" in message and "text" in message and "caption" in message


def test_missing_image_folder(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_data_config(table.parent, image_dir=str(table.parent / "nowhere"))
    message = refused(capsys, "prepare", config)
    assert "nowhere" in message and "image_dir" in message


def test_no_usable_row(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table.parent / "table.csv").write_text("file,text\ngone.jpg,A wheal.\n")
    assert "no row became a training sample" in refused(capsys, "prepare", table)


def test_misspelt_key(run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    message = refused(capsys, "train", config, "optimizer.learning_rate=1e-3")
    assert "run.yaml" in message and "optimizer.learning_rate" in message and "no such key; there are betas" in message
    message = refused(capsys, "prepare", tmp_path / "absent.yaml")
    assert "absent.yaml" in message and "configs/" in message


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_fewer_samples_than_a_batch(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], num_ranks: int
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    message = refused(capsys, "train", config, "global_batch_size=200", f"launch.num_ranks={num_ranks}")
    assert "96 samples" in message and "200" in message and "global_batch_size" in message
    message = refused(capsys, "train", config, "global_batch_size=9", "launch.num_ranks=2")
    assert "does not divide" in message


def test_no_manifest(run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    message = refused(capsys, "train", config, f"data.train_dir={tmp_path / 'nothing'}")
    assert "nothing/manifest.json" in message and "dermvlp prepare" in message


def test_checkpoint_of_another_config(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    assert main(["train", str(config), "num_steps=3"]) == 0
    capsys.readouterr()
    message = refused(capsys, "train", config, "num_steps=3", "optimizer.lr=0.5", "objectives.0.weight=2")
    assert "step-00000003" in message and "optimizer.lr: 0.001 in the checkpoint, 0.5 now" in message
    assert "objectives.0.weight" in message and "run_dir" in message
    weights = next((Path(run_config["run_dir"]) / "checkpoints").glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in refused(capsys, "train", config, "num_steps=3")


def test_convolutional_tower_with_masked_latent(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    message = refused(capsys, "train", config, "model.name=RN50")
    assert "patch tokens" in message or "cannot drop patches" in message


def test_unknown_model_and_missing_run(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config)
    assert "open_clip" in refused(capsys, "train", config, "model.name=ViT-Z-99")
    assert "no checkpoint" in refused(capsys, "evaluate", tmp_path, "--data", val_dir(run_config))
