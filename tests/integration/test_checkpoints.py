"""Checkpoints on real file systems: torn, left over, on a disk that is full; and going back before a bad step."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from pretrain.cli import main
from pretrain.config import TrainConfig
from pretrain.train import loop
from pretrain.train.checkpoint import resume, save_checkpoint
from pretrain.train.metrics import read_metrics
from pretrain.train.record import RunRecord
from pretrain.train.retention import list_checkpoints, read_meta, step_of, whole_checkpoints
from pretrain.train.step import training_step
from tests.distributed.steps import build
from tests.integration.commands import finish, rank_pids, start_train, wait_for
from tests.integration.conftest import write_config
from tests.integration.test_train import losses, weights


@pytest.fixture
def config_path(run_config: dict[str, Any], tmp_path: Path) -> Path:
    """Six steps of one rank, saved after the third and the last."""
    return write_config(tmp_path / "run.yaml", run_config | {"num_steps": 6})


def steps_of(run_dir: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run_dir)]


def test_a_torn_newest_checkpoint_is_skipped(
    run_config: dict[str, Any], config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(run_config["run_dir"])
    assert main(["train", str(config_path)]) == 0
    expected_losses, expected = losses(run_dir), weights(run_dir, 6)
    torn = run_dir / "checkpoints" / "step-00000006" / "torch_engine.pt"
    os.truncate(torn, torn.stat().st_size - 1)
    shutil.copytree(run_dir / "checkpoints" / "step-00000003", run_dir / "checkpoints" / "step-00000005.partial")
    capsys.readouterr()

    assert main(["train", str(config_path)]) == 0
    said = capsys.readouterr().err
    assert f"skipped: {torn}: missing or not of the size" in said and "from step 3" in said
    assert "step-00000005.partial: left by an attempt that was killed; removed" in said
    assert losses(run_dir) == expected_losses
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run_dir, 6).items())
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006", "step-00000006.aside"]


def test_no_whole_checkpoint_is_refused(
    run_config: dict[str, Any], config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_path)]) == 0
    for checkpoint in list_checkpoints(Path(run_config["run_dir"])):
        (checkpoint / "meta.json").write_text("")
    assert main(["train", str(config_path)]) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert steps_of(Path(run_config["run_dir"])) == [3, 6]


def test_the_plain_engine_goes_on_with_another_number_of_ranks(
    run_config: dict[str, Any], config_path: Path, tmp_path: Path
) -> None:
    """The samples and their order are the same; losses differ by rounding."""
    assert main(["train", str(config_path)]) == 0
    expected = losses(run_config["run_dir"])
    shutil.rmtree(Path(run_config["run_dir"]) / "checkpoints" / "step-00000006")
    status, stderr = finish(start_train(config_path, "launch.num_ranks=2", "launch.threads_per_rank=1"))
    assert status == 0 and "2 rank(s), from step 3" in stderr, stderr
    for ours, reference in zip(losses(run_config["run_dir"]), expected, strict=True):
        assert ours == pytest.approx(reference, rel=1e-4)


def test_saved_by_the_clock(run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.1 s and a clock of 0.25 s: now and then, and never at two steps in a row."""

    def slow_step(*arguments: Any) -> Any:
        time.sleep(0.1)
        return training_step(*arguments)

    monkeypatch.setattr(loop, "training_step", slow_step)
    run_config |= {"num_steps": 30, "checkpoint": {"every": 1000, "every_minutes": 0.25 / 60, "keep_last": 30}}
    assert main(["train", str(write_config(tmp_path / "run.yaml", run_config))]) == 0
    steps = steps_of(Path(run_config["run_dir"]))
    assert steps[-1] == 30 and 4 <= len(steps) <= 15
    assert all(after - before > 1 for before, after in itertools.pairwise(steps[:-1]))


@pytest.fixture
def trainer_config(run_config: dict[str, Any], config_path: Path) -> TrainConfig:
    assert main(["train", str(config_path)]) == 0
    return TrainConfig.model_validate(run_config | {"num_steps": 6})


def test_going_back_before_a_bad_step(trainer_config: TrainConfig, config_path: Path) -> None:
    run_dir = trainer_config.run_dir
    trainer, reader = build(trainer_config, torch.float32)
    digest = reader.data.digest
    assert resume(trainer, digest).step == 6
    with pytest.raises(InputError, match="no checkpoint from before step 3"):
        resume(trainer, digest, pass_over=2)
    assert resume(trainer, digest).step == 6  # a refusal forgets nothing and removes nothing
    record = resume(trainer, digest, pass_over=4)
    assert (record.step, record.passed_over) == (3, [4])
    assert steps_of(run_dir) == [3]

    # a process that is killed here has forgotten nothing
    assert resume(trainer, digest).passed_over == [4]
    assert main(["train", str(config_path)]) == 0
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 6]
    whole, skipped = whole_checkpoints(run_dir)
    assert [meta["record"]["passed_over"] for _, meta in whole] == [[], [4]] and not skipped


def test_saving_the_same_step_again_replaces_it(trainer_config: TrainConfig) -> None:
    trainer, reader = build(trainer_config, torch.float32)
    resume(trainer, reader.data.digest)
    save_checkpoint(trainer, RunRecord(step=6, best_step=3), reader.data.digest)
    checkpoint = list_checkpoints(trainer_config.run_dir)[-1]
    assert read_meta(checkpoint)["record"]["best_step"] == 3
    assert steps_of(trainer_config.run_dir) == [3, 6]


# ------------------------------------------------------------------------------------------- a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MB; a checkpoint of the run is a fifth of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=100m") != 0:
        pytest.skip(f"cannot mount a file system here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(str(folder).encode(), 2)


def test_a_full_disk_ends_the_attempt_and_leaves_the_checkpoint(
    run_config: dict[str, Any], tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_config |= {"run_dir": str(small_disk / "run"), "num_steps": 6, "objectives": [{"kind": "clip"}]}
    config, run_dir = write_config(tmp_path / "run.yaml", run_config), small_disk / "run"
    process = start_train(config)
    wait_for(lambda: list_checkpoints(run_dir), "the first checkpoint")
    process.kill()
    finish(process)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006", ignore_errors=True)  # it was too late
    with (small_disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 1_000_000)

    assert main(["train", str(config)]) == 1
    said = capsys.readouterr().err
    assert "the checkpoint could not be written" in said and "make room" in said
    whole, skipped = whole_checkpoints(run_dir)
    assert [meta["step"] for _, meta in whole] == [3] and not skipped

    (small_disk / "filler").unlink()
    assert main(["train", str(config)]) == 0
    assert "from step 3" in capsys.readouterr().err and steps_of(run_dir) == [3, 6]


@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"kind": "deepspeed", "zero_stage": 1}], ids=["torch", "zero1"])
def test_one_rank_that_cannot_write_ends_all(
    run_config: dict[str, Any], tmp_path: Path, engine: dict[str, Any]
) -> None:
    """A limit on the size of one rank's files, set while it runs: with DeepSpeed the other is in its barrier then."""
    run_config |= {"engine": engine, "num_steps": 20_000, "objectives": [{"kind": "clip"}], "log_every": 5}
    run_config |= {"checkpoint": {"every": 5}, "launch": {"num_ranks": 2, "threads_per_rank": 1}}
    run_dir = Path(run_config["run_dir"])
    process = start_train(write_config(tmp_path / "run.yaml", run_config))
    wait_for(lambda: list_checkpoints(run_dir), "the first checkpoint")
    # with the plain engine rank 0 alone writes
    pid = rank_pids(process.pid)[0 if engine["kind"] == "torch" else 1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    status, stderr = finish(process, timeout_s=90)
    assert status == 1, stderr
    assert "the checkpoint could not be written" in stderr and "Traceback" not in stderr, stderr
    whole, skipped = whole_checkpoints(run_dir)
    assert whole and not skipped
