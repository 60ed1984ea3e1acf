"""`dermvlp evaluate`, `compare` and `annotate` on a table of pictures, with a tiny model that open_clip saved."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import pretrain.evaluation.datasets.data as datasets_data
from data_prep.images.convert import ImageRejected
from data_prep.prepare import prepare
from data_prep.sources.base import ImageReference
from pretrain.cli import main
from pretrain.evaluation.results import read_result
from tests.integration.tables import table_config
from tests.unit.evaluation.dataset_files import write_image
from tests.unit.evaluation.dataset_files import write_table as write_csv
from tests.unit.evaluation.models import MODELS, save_model

NUM_IMAGES = 24
_OPTIONS = ("--set", "settings.num_workers=0", "--set", "settings.num_resamples=20")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("clip") / "model", MODELS["clip"])


@pytest.fixture
def description(tmp_path: Path) -> Path:
    """Two classes, captions, patients of two images each, a concept. One image is cut off, one is not there."""
    rows = []
    for number in range(NUM_IMAGES):
        image = write_image(tmp_path / "images" / f"{number}.jpg", number)
        if number == 5:
            (tmp_path / "images" / "5.jpg").write_bytes(image[:-300])
        label = ("nevus", "melanoma")[number % 2]
        rows.append(
            {"file": f"{number}.jpg", "dx": label, "patient": number // 2, "ulcer": number % 3 == 0}
            | {"text": f"a {label} with {number} dots"}
        )
    (tmp_path / "images" / "9.jpg").unlink()
    write_csv(tmp_path / "table.csv", rows)
    path = tmp_path / "set.yaml"
    path.write_text(
        f"""name: dots
source:
  kind: table
  table_path: {tmp_path}/table.csv
  image_dir: {tmp_path}/images
  columns: {{image: file, label: dx, texts: [text], patient: patient, concept_columns: {{ulcer: ulcer}}}}
"""
    )
    return path


def evaluate(model: Path, data: Path, out: Path, *options: str) -> int:
    return main(["evaluate", str(model), "--data", str(data), "--out", str(out), *_OPTIONS, *options])


def test_images_that_cannot_be_used_are_listed_and_the_rest_is_evaluated(
    model: Path, description: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(model, description, out) == 0
    ledger = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [("no such image" in line["reason"], "truncated" in line["reason"]) for line in ledger] == [
        (True, False),
        (False, True),
    ]
    result = read_result(out)
    assert result.dataset.num_images == NUM_IMAGES - 2 and result.dataset.num_rejected == 2
    assert "images that could not be decoded: 1" in result.dataset.notes
    assert [task.task for task in result.tasks] == ["zero_shot", "retrieval", "probe", "concepts"]
    assert not result.failed and set(result.left_out) == {"multiple_choice", "hierarchy"}
    for name in ("zero_shot_probabilities.csv", "concept_scores.csv"):
        with (out / name).open(newline="") as file:
            assert len(list(csv.reader(file))) == NUM_IMAGES - 2 + 1
    assert "images that could not be decoded: 1" in capsys.readouterr().out


def test_a_task_that_fails_is_named_and_the_others_stay(
    model: Path, description: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "out", tmp_path / "tasks.yaml"
    config.write_text("tasks: {zero_shot: {templates: of_nobody}, retrieval: {}}")
    assert evaluate(model, description, out, "--config", str(config)) == 2
    result = read_result(out)
    assert [task.task for task in result.tasks] == ["retrieval"] and "of_nobody" in result.failed["zero_shot"]
    assert "zero_shot: FAILED" in capsys.readouterr().out and "of_nobody" in (out / "report.html").read_text()
    config.write_text("tasks: {zero_shot: {templates: of_nobody}}")
    assert evaluate(model, description, tmp_path / "alone", "--config", str(config)) == 2
    assert "error: zero_shot: " in capsys.readouterr().err


def test_a_failure_is_kept_beside_later_tasks(model: Path, description: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", tmp_path / "tasks.yaml"
    config.write_text("tasks: {zero_shot: {templates: of_nobody}, retrieval: {}}")
    assert evaluate(model, description, out, "--config", str(config)) == 2
    assert evaluate(model, description, out, "--tasks", "concepts") == 2
    result = read_result(out)
    assert [task.task for task in result.tasks] == ["retrieval", "concepts"] and set(result.failed) == {"zero_shot"}
    assert evaluate(model, description, out, "--tasks", "zero_shot") == 0
    assert not read_result(out).failed


def test_another_models_numbers_and_tables_do_not_stay(model: Path, description: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", save_model(tmp_path / "other", MODELS["custom_text"])
    assert evaluate(model, description, out, "--tasks", "retrieval") == 0
    (out / "trained_on.csv").write_text("key\n")
    assert evaluate(other, description, out, "--tasks", "zero_shot") == 0
    assert [task.task for task in read_result(out).tasks] == ["zero_shot"]
    assert {path.name for path in out.glob("*.csv")} == {"zero_shot_probabilities.csv"}
    (out / "evaluation.json").write_text('{"schema_version": 0}')  # of another version
    assert evaluate(other, description, out, "--tasks", "zero_shot") == 0


def test_the_overlap_is_of_the_rows_that_are_left(model: Path, description: Path, tmp_path: Path) -> None:
    """Images 0 and 8 are trained on. Image 5, between them, is left out at first and mended afterwards."""
    folder = tmp_path / "training" / "img"
    folder.mkdir(parents=True)
    for number in (0, 8):
        shutil.copy(tmp_path / "images" / f"{number}.jpg", folder / f"{number}.jpg")
    rows = [{"file": f"{number}.jpg", "text": f"a lesion, number {number}"} for number in (0, 8)]
    write_csv(folder.parent / "t.csv", rows)
    prepare(table_config(folder.parent, images={"min_side_px": 1}))
    train = ("--training-data", str(folder.parent / "out" / "train"), "--tasks", "zero_shot")
    out = tmp_path / "out"
    for _ in range(2):
        assert evaluate(model, description, out, *train) == 0
        result = read_result(out)
        assert result.leakage is not None and result.leakage.num_same_pixels == 2
        assert (out / "trained_on.csv").read_text().split() == ["key", "dots-000000001", "dots-000000009"]
        accuracy = result.tasks[0].without_overlap["accuracy"]
        assert accuracy.n == result.dataset.num_images - 2
        with (out / "zero_shot_probabilities.csv").open(newline="") as file:
            left = [row for row in csv.DictReader(file) if row["key"] not in ("dots-000000001", "dots-000000009")]
        assert accuracy.value == pytest.approx(np.mean([row["label"] == row["predicted"] for row in left]))
        write_image(tmp_path / "images" / "5.jpg", 5)
        shutil.rmtree(out)


def test_a_fault_of_the_disk_is_not_taken_for_a_bad_image(
    model: Path, description: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is made: reading fails as the operating system reports it."""
    with monkeypatch.context() as patch:
        patch.setattr(datasets_data, "read_image", unreadable)
        assert evaluate(model, description, tmp_path / "out") == 2
        assert "cannot be read (OSError); when it can be, the same command goes on" in capsys.readouterr().err
    assert evaluate(model, description, tmp_path / "out") == 0
    assert read_result(tmp_path / "out").dataset.num_images == NUM_IMAGES - 2


def unreadable(_reference: ImageReference) -> bytes:
    raise ImageRejected("the image file cannot be read (OSError)", may_pass=True)


def test_further_tasks_join_those_before_and_encode_nothing_again(
    model: Path, description: Path, tmp_path: Path, prepared_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(model, description, out, "--tasks", "zero_shot") == 0
    (features,) = (out / "features").glob("*.npy")
    written = features.stat().st_mtime_ns
    assert evaluate(model, description, out, "--tasks", "retrieval") == 0
    assert [task.task for task in read_result(out).tasks] == ["zero_shot", "retrieval"]
    assert features.stat().st_mtime_ns == written
    capsys.readouterr()
    assert not (out / "trained_on.csv").exists()
    # what was compared with no training data does not stand beside what was
    train = str(prepared_dir / "train")
    assert evaluate(model, description, out, "--tasks", "retrieval", "--training-data", train) == 0
    assert [task.task for task in read_result(out).tasks] == ["retrieval"]
    assert "zero_shot: compared with other training data before, or with none" in capsys.readouterr().out
    assert (out / "trained_on.csv").read_text().split() == ["key"]  # none of the images
    assert evaluate(model, description, out, "--tasks", "retrieval") == 0
    assert not (out / "trained_on.csv").exists()
    shutil.copy(tmp_path / "images" / "0.jpg", tmp_path / "images" / "9.jpg")
    assert evaluate(model, description, out) == 2
    assert "on another data set" in capsys.readouterr().err


def test_unknown_tasks_and_layers_are_refused_before_anything_is_written(
    model: Path, description: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, description, tmp_path / "out", "--tasks", "zero_shot,") == 2
    assert "--tasks: no task ''; there are zero_shot" in capsys.readouterr().err
    table = tmp_path / "features.parquet"
    assert main(["embed", str(model), str(description), "--out", str(table), "--layer", "neck"]) == 2
    assert "layer 'neck'" in capsys.readouterr().err
    assert not list(tmp_path.glob("features*")) and not (tmp_path / "out").exists()


def test_templates_that_are_not_there_are_refused_before_encoding(
    model: Path, description: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, description, tmp_path / "out", "--set-data", "templates=peeers") == 2
    assert "no template list named 'peeers'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_annotation_leaves_out_what_cannot_be_decoded(model: Path, description: Path, tmp_path: Path) -> None:
    out = tmp_path / "concepts.csv"
    assert main(["annotate", str(model), str(description), "--out", str(out), "--num-workers", "0"]) == 0
    with out.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert len(rows) == NUM_IMAGES - 2 and "ulcer" in header and not any(name.endswith(":present") for name in header)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "concepts.csv.rejected.jsonl").open()]
    assert len(reasons) == 2 and any("truncated" in reason for reason in reasons)
