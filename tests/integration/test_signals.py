"""Real signals to real processes: what they save, with what status they end, and that nothing outlives them."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pretrain.train.metrics import read_metrics
from pretrain.train.retention import list_checkpoints, read_meta, step_of
from pretrain.train.signals import REQUEUE_STATUS
from tests.integration.commands import (
    descendants,
    finish,
    is_alive,
    is_holding,
    rank_pids,
    start_train,
    wait_for,
)
from tests.integration.conftest import write_config
from tests.integration.test_train import losses, weights

pytestmark = pytest.mark.long

NUM_STEPS = 60
TWO_RANKS = {"num_ranks": 2, "threads_per_rank": 1}


@pytest.fixture
def config_path(run_config: dict[str, Any], tmp_path: Path) -> Path:
    """Long enough for a signal in its middle; the clip term alone, on two ranks of the plain engine."""
    run_config |= {"num_steps": NUM_STEPS, "objectives": [{"kind": "clip"}], "launch": TWO_RANKS}
    run_config["checkpoint"] = {"every": NUM_STEPS}
    return write_config(tmp_path / "run.yaml", run_config)


def num_logged(run_dir: Path) -> int:
    return len(read_metrics(run_dir / "metrics.jsonl"))


def test_sigterm_to_the_launcher_of_two_deepspeed_ranks(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Status 75, a whole checkpoint where it stopped, and from there on the same losses and weights, bit by bit."""
    run_config |= {"engine": {"kind": "deepspeed", "zero_stage": 1}, "num_steps": 24, "launch": TWO_RANKS}
    run_config["checkpoint"] = {"every": 24}
    config, run_dir = write_config(tmp_path / "run.yaml", run_config), Path(run_config["run_dir"])
    status, stderr = finish(start_train(config, f"run_dir={tmp_path / 'whole'}"))
    assert status == 0, stderr

    process = start_train(config)
    wait_for(lambda: num_logged(run_dir) >= 3, "three steps")
    process.send_signal(signal.SIGTERM)
    status, stderr = finish(process)
    assert status == REQUEUE_STATUS, stderr
    [checkpoint] = list_checkpoints(run_dir)
    stopped = step_of(checkpoint)
    assert 3 <= stopped < 24 and read_meta(checkpoint)["step"] == stopped
    assert f"stopped by a signal after step {stopped}" in stderr and "Traceback" not in stderr

    status, stderr = finish(start_train(config))
    assert status == 0 and f"from step {stopped}" in stderr, stderr
    assert losses(run_dir) == losses(tmp_path / "whole")
    theirs = weights(tmp_path / "whole", 24)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(run_dir, 24).items())


def test_sigusr1_to_one_rank_and_more_signals_while_it_saves(config_path: Path, run_config: dict[str, Any]) -> None:
    run_dir = Path(run_config["run_dir"])
    process = start_train(config_path)
    wait_for(lambda: num_logged(run_dir) >= 2, "two steps")
    _, second = rank_pids(process.pid)
    psutil.Process(second).send_signal(signal.SIGUSR1)
    while process.poll() is None:  # whenever they come, saving and ending included
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    status, stderr = finish(process)
    assert status == REQUEUE_STATUS, stderr
    [checkpoint] = list_checkpoints(run_dir)
    assert read_meta(checkpoint)["step"] < NUM_STEPS
    assert not list((run_dir / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_signal_before_the_first_step(config_path: Path, run_config: dict[str, Any], num_ranks: int) -> None:
    """Also one that comes while the libraries are imported."""
    process = start_train(config_path, f"launch.num_ranks={num_ranks}")
    wait_for(lambda: is_holding(process.pid), "the command to hold signals back")
    process.send_signal(signal.SIGTERM)
    status, stderr = finish(process)
    assert status == REQUEUE_STATUS, stderr
    assert "before the first step" in stderr and "Traceback" not in stderr
    assert num_logged(Path(run_config["run_dir"])) == 0 and not list_checkpoints(Path(run_config["run_dir"]))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_one_ctrl_c_saves_and_two_end_at_once(config_path: Path, run_config: dict[str, Any], num_ranks: int) -> None:
    run_dir, overrides = Path(run_config["run_dir"]), (f"launch.num_ranks={num_ranks}", "num_steps=20000")
    for num_presses, expected in ((1, REQUEUE_STATUS), (2, 130)):
        already = num_logged(run_dir)
        process = start_train(config_path, *overrides)
        wait_for(lambda start=already: num_logged(run_dir) > start, "a step")
        process.send_signal(signal.SIGINT)
        while num_presses == 2 and process.poll() is None:  # two at once would be one
            time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        status, stderr = finish(process)
        assert status == expected, stderr
        assert "Traceback" not in stderr
    assert len(list_checkpoints(run_dir)) == 1


def test_readers_go_on_while_the_rank_saves(config_path: Path, run_config: dict[str, Any]) -> None:
    """As under srun and scancel, where the signal reaches every process of the job."""
    process = start_train(config_path, "launch.num_ranks=1", "data.num_workers=1", "num_steps=20000")
    wait_for(lambda: num_logged(Path(run_config["run_dir"])) >= 2, "two steps")
    for number in [process.pid, *descendants(process.pid)]:
        psutil.Process(number).send_signal(signal.SIGTERM)
    status, stderr = finish(process)
    assert status == REQUEUE_STATUS and "Traceback" not in stderr, stderr


@pytest.mark.parametrize("victim", ["asked to stop", "killed"])
def test_what_happens_on_one_node_ends_the_other(config_path: Path, run_config: dict[str, Any], victim: str) -> None:
    """Two launchers with a rank each, that find each other as two nodes do."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    options = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint={endpoint}")
    nodes = [start_train(config_path, "num_steps=20000", *options) for _ in range(2)]
    wait_for(lambda: num_logged(Path(run_config["run_dir"])) >= 2, "two steps")
    if victim == "killed":
        psutil.Process(rank_pids(nodes[1].pid)[0]).kill()
    else:
        nodes[1].send_signal(signal.SIGTERM)
    results = [finish(process, timeout_s=60) for process in nodes]
    assert [status for status, _ in results] == [1 if victim == "killed" else REQUEUE_STATUS] * 2, results
    assert all("Traceback" not in stderr for _, stderr in results), results
    assert len(list_checkpoints(Path(run_config["run_dir"]))) == (victim != "killed")


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_nothing_outlives_a_killed_launcher_or_rank(config_path: Path, run_config: dict[str, Any], victim: str) -> None:
    process = start_train(config_path, "data.num_workers=1", "num_steps=20000")
    wait_for(lambda: num_logged(Path(run_config["run_dir"])) >= 2, "two steps")
    others = list(descendants(process.pid))
    assert len(others) >= 4  # two ranks and their readers
    psutil.Process(process.pid if victim == "launcher" else rank_pids(process.pid)[1]).kill()
    status, stderr = finish(process, timeout_s=60)
    wait_for(lambda: not any(is_alive(number) for number in others), "ranks and readers to end", timeout_s=30)
    if victim == "rank":
        assert status == 1
        assert "rank 1 was ended by SIGKILL" in stderr or "another rank has ended" in stderr, stderr
        assert "Traceback" not in stderr
