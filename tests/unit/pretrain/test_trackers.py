"""TensorBoard's own files, and the calls that wandb and trackio (extras, not installed) would get."""

from __future__ import annotations

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.train.metrics import MetricsLog, read_metrics
from pretrain.train.trackers import check_trackers, open_trackers

VALUES = {"loss": 2.0, "loss/clip": 2.0, "samples_per_s": 10.0, "reader_wait_fraction": 0.0}


def run_config(run_dir: Path, *trackers: str) -> TrainConfig:
    run_dir.mkdir(exist_ok=True)
    return TrainConfig.model_validate(
        {
            "run_dir": run_dir,
            "data": {"train_dir": "unused"},
            "model": {"name": "unused"},
            "objectives": [{"kind": "clip"}],
            "global_batch_size": 8,
            "num_steps": 100,
            "optimizer": {"lr": 0.25, "warmup_steps": 1},
            "trackers": trackers,
        }
    )


def log_steps(config: TrainConfig, first_step: int, last_step: int, loss: float) -> None:
    log = MetricsLog(config, first_step)
    for step in range(first_step + 1, last_step + 1):
        log.write(step, VALUES | {"loss": loss + step})
    log.write_validation(last_step, {"val/loss": loss})
    log.close()


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_refused_with_the_remedy(name: str) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(InputError, match=rf'trackers: {name} is not installed; pip install "dermvlp\[{name}\]"'):
        check_trackers(["tensorboard", name])
    check_trackers(["tensorboard"])


def test_tensorboard_shows_repeated_steps_once(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", "tensorboard")
    log_steps(config, 0, 6, loss=100.0)
    log_steps(config, 4, 8, loss=200.0)  # resumed from the checkpoint of step 4
    expected = [(step, 100.0 + step) for step in range(1, 5)] + [(step, 200.0 + step) for step in range(5, 9)]
    assert scalars(config.run_dir, "loss") == expected
    assert scalars(config.run_dir, "val/loss") == [(8, 200.0)]
    events = EventAccumulator(str(config.run_dir / "tensorboard")).Reload()
    (text,) = events.Tensors("config/text_summary")
    assert b"lr: 0.25" in text.tensor_proto.string_val[0]
    assert [record["step"] for record in read_metrics(config.run_dir / "metrics.jsonl")] == [*range(1, 9), 8]


def test_tensorboard_survives_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", "tensorboard")
    log = MetricsLog(config, 0)
    log.write(1, VALUES)
    assert scalars(config.run_dir, "loss") == [(1, 2.0)]  # written at once: a kill loses nothing
    log_steps(config, 0, 2, loss=100.0)
    assert scalars(config.run_dir, "loss") == [(1, 101.0), (2, 102.0)]
    log.close()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the stand-in in the place of a package; returns what reads its calls."""
    calls = tmp_path / "calls.jsonl"
    monkeypatch.setenv("STAND_IN_CALLS", str(calls))
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def install(name: str) -> Any:
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
        (tmp_path / "packages").mkdir(exist_ok=True)
        shutil.copy(Path(__file__).with_name("stand_in_tracker.py"), tmp_path / "packages" / f"{name}.py")
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    return install


def test_wandb_goes_on_in_the_same_run(stand_in: Any, tmp_path: Path) -> None:
    calls, config = stand_in("wandb"), run_config(tmp_path / "my-run", "wandb")
    log_steps(config, 0, 2, loss=1.0)
    log_steps(config, 1, 3, loss=1.0)
    first, second = [call for call in calls() if call["call"] == "init"]
    assert first == second
    assert len(first.pop("id")) == 12
    assert first.pop("dir") == str(config.run_dir)
    assert first == {"call": "init", "project": "dermvlp", "name": "my-run", "resume": "allow", "lr": 0.25}
    logged = [call for call in calls() if call["call"] == "log"]
    assert [call["step"] for call in logged] == [1, 2, 2, 2, 3, 3]
    assert logged[0]["values"] == VALUES and logged[2]["values"] == {"val/loss": 1.0}
    assert [call["call"] for call in calls()].count("finish") == 2


def test_trackio_keeps_the_name_that_it_gave(stand_in: Any, tmp_path: Path) -> None:
    calls, config = stand_in("trackio"), run_config(tmp_path / "my-run", "trackio")
    log_steps(config, 0, 1, loss=1.0)
    log_steps(config, 1, 2, loss=1.0)
    first, second = [call for call in calls() if call["call"] == "init"]
    assert (first["project"], first["name"], first["resume"]) == ("dermvlp", "my-run", "never")
    assert (second["project"], second["name"], second["resume"]) == ("dermvlp", "my-run-1", "allow")


def test_a_tracker_that_fails_is_said_once_and_dropped(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, config = stand_in("wandb"), run_config(tmp_path / "run", "wandb", "tensorboard")
    monkeypatch.setenv("STAND_IN_FAILS_AT", "2")
    log_steps(config, 0, 4, loss=1.0)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "warning: wandb failed at step 2 and is left out from here: ConnectionError: no route to the server, with ***"
    ]
    assert [call["step"] for call in calls() if call["call"] == "log"] == [1]
    assert len(scalars(config.run_dir, "loss")) == 4
    assert len(read_metrics(config.run_dir / "metrics.jsonl")) == 5


def test_one_that_cannot_start_is_refused_at_first_and_left_out_on_resume(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("wandb")
    config, said = run_config(tmp_path / "run", "wandb", "tensorboard"), list[str]()
    monkeypatch.setenv("STAND_IN_CANNOT_START", "1")
    with pytest.raises(InputError, match=r"trackers: wandb cannot start .*does not answer.*WANDB_MODE=offline"):
        open_trackers(config, 0, said.append)
    assert [tracker.name for tracker in open_trackers(config, 5, said.append)] == ["tensorboard"]
    assert len(said) == 1 and said[0].startswith("warning: trackers: wandb cannot start")


def test_values_that_are_not_finite_reach_every_file(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", "tensorboard")
    log_steps(config, 0, 1, loss=math.nan)
    ((step, value),) = scalars(config.run_dir, "loss")
    assert step == 1 and math.isnan(value)
    assert math.isnan(read_metrics(config.run_dir / "metrics.jsonl")[0]["loss"])
