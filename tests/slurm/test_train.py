"""Training over two nodes of a real SLURM: stopped by a signal, preempted, requeued, and bit-equal at the end."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pretrain.train.metrics import read_metrics
from tests.integration.conftest import write_config
from tests.integration.test_train import losses, run, weights
from tests.slurm.cluster import Cluster, running_cluster, wait_for, why_not
from tests.slurm.conftest import add_to_environment

_WHY_NOT = why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or "")]

NUM_STEPS = 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running
    assert not running.processes() and not running.directory.exists()


@pytest.fixture
def config_path(run_config: dict[str, Any], submit_dir: Path) -> Path:
    """One rank a node; only a signal, and the end, make it save."""
    run_config |= {"num_steps": NUM_STEPS, "launch": {"threads_per_rank": 1}}
    run_config["checkpoint"] = {"every": 1000, "every_minutes": None}
    run_config["data"]["num_workers"] = 1  # a process more that the signals of SLURM can reach
    add_to_environment(submit_dir, "export DERMVLP_RANKS_PER_NODE=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu")
    return write_config(submit_dir / "run.yaml", run_config)


def submit(cluster: Cluster, submit_dir: Path, config_path: Path, *overrides: str) -> str:
    command = ["sbatch", "--parsable", "slurm/train_multinode.sbatch", str(config_path), *overrides]
    return cluster.run(command, cwd=submit_dir).strip()


def log_of(submit_dir: Path, job: str) -> str:
    path = submit_dir / f"dermvlp-train-{job}.out"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def ranks(cluster: Cluster, job: str) -> list[psutil.Process]:
    """Those of the job that train: their readers have the same environment, and a rank as parent."""
    found = [process for process in cluster.processes(SLURM_JOB_ID=job) if "RANK" in process.environ()]
    return [process for process in found if process.parent() not in found and "pretrain" in " ".join(process.cmdline())]


def halt(cluster: Cluster, submit_dir: Path, job: str, run_dir: Path, step: int) -> list[psutil.Process]:
    """Stops the ranks for a moment in the midst of their work, after this step."""

    def is_there() -> bool:
        assert cluster.jobs(job)[0].state in ("RUNNING", "PENDING", "COMPLETING"), log_of(submit_dir, job)
        return len(read_metrics(run_dir / "metrics.jsonl")) >= step

    wait_for(is_there, f"step {step}", 120, every_s=0.02)
    halted = ranks(cluster, job)
    for rank in halted:
        rank.suspend()
    assert len(halted) == 2
    assert len(read_metrics(run_dir / "metrics.jsonl")) < NUM_STEPS
    return halted


def test_stopped_preempted_and_requeued_equals_uninterrupted(
    cluster: Cluster, submit_dir: Path, config_path: Path, run_config: dict[str, Any]
) -> None:
    run_dir = Path(run_config["run_dir"])
    job = submit(cluster, submit_dir, config_path)
    halted = halt(cluster, submit_dir, job, run_dir, 4)
    cluster.run(["scancel", "--batch", "--signal=USR1", job])  # what SLURM itself does before the time is over
    wait_for(lambda: "the ranks save" in log_of(submit_dir, job), "the script to hear", 20)
    for rank in halted:
        rank.resume()
    cluster.wait_for_state(job, "PENDING", 60)
    (first,) = (run_dir / "checkpoints").iterdir()

    wait_for(lambda: log_of(submit_dir, job).count("from step") == 2, "the second attempt", 120)
    halt(cluster, submit_dir, job, run_dir, int(first.name[-8:]) + 4)
    urgent = cluster.run(
        [
            "sbatch",
            "--parsable",
            "--partition=urgent",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=sleep 1",
        ]
    ).strip()
    (preempting,) = cluster.wait_for_end(urgent, timeout_s=90)
    assert preempting.state == "COMPLETED"
    ended = cluster.wait_for_end(job, timeout_s=180)
    log = log_of(submit_dir, job)
    print(log)
    assert [task.state for task in ended] == ["COMPLETED"], log
    assert cluster.describe(job)["Restarts"] == "2"
    stops = [int(step) for step in re.findall(r"stopped by a signal after step (\d+)", log)]
    assert len(stops) == 2 and 4 <= stops[0] < stops[1] < NUM_STEPS
    assert [int(step) for step in re.findall(r"from step (\d+)", log)] == [0, *stops]
    assert f"job {job}, attempt 2: finished" in log

    whole = run(config_path, 2, f"run_dir={submit_dir / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert losses(run_dir) == losses(submit_dir / "whole") and len(losses(run_dir)) == NUM_STEPS
    theirs = weights(submit_dir / "whole", NUM_STEPS)
    for name, tensor in weights(run_dir, NUM_STEPS).items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_dead_rank_ends_the_job_at_once_and_for_good(
    cluster: Cluster, submit_dir: Path, config_path: Path, run_config: dict[str, Any]
) -> None:
    job = submit(cluster, submit_dir, config_path, "num_steps=1000000")
    halted = halt(cluster, submit_dir, job, Path(run_config["run_dir"]), 2)
    halted[1].send_signal(signal.SIGKILL)
    halted[0].resume()
    (ended,) = cluster.wait_for_end(job, timeout_s=60)
    log = log_of(submit_dir, job)
    assert ended.state == "FAILED", log
    said = cluster.describe(job)
    assert (said["ExitCode"], said["Restarts"]) == ("1:0", "0"), log
    assert "failed with status" in log


def test_a_cancelled_job_stays_cancelled(
    cluster: Cluster, submit_dir: Path, config_path: Path, run_config: dict[str, Any]
) -> None:
    job = submit(cluster, submit_dir, config_path, "num_steps=1000000")
    for rank in halt(cluster, submit_dir, job, Path(run_config["run_dir"]), 2):
        rank.resume()
    cluster.run(["scancel", job])
    (ended,) = cluster.wait_for_end(job, timeout_s=60)
    assert (ended.state, cluster.describe(job)["Restarts"]) == ("CANCELLED", "0"), log_of(submit_dir, job)


def test_a_refusal_is_not_tried_again(cluster: Cluster, submit_dir: Path, config_path: Path) -> None:
    job = submit(cluster, submit_dir, config_path, "num_stepz=3")
    (ended,) = cluster.wait_for_end(job, timeout_s=60)
    log = log_of(submit_dir, job)
    assert (ended.state, cluster.describe(job)["ExitCode"]) == ("FAILED", "2:0"), log
    assert "num_stepz: no such key" in log and "refused" in log


def test_ranks_must_be_counted(cluster: Cluster, submit_dir: Path, config_path: Path) -> None:
    add_to_environment(submit_dir, "unset DERMVLP_RANKS_PER_NODE")
    job = submit(cluster, submit_dir, config_path)
    (ended,) = cluster.wait_for_end(job, timeout_s=60)
    assert (ended.state, cluster.describe(job)["ExitCode"]) == ("FAILED", "2:0")
    assert "no GPU was asked for" in log_of(submit_dir, job)


@pytest.mark.slow  # a minute and a half of waiting
def test_a_lost_node_puts_the_job_back_into_the_queue(
    cluster: Cluster, submit_dir: Path, config_path: Path, run_config: dict[str, Any]
) -> None:
    job = submit(cluster, submit_dir, config_path, "checkpoint.every=5")
    for rank in halt(cluster, submit_dir, job, Path(run_config["run_dir"]), 7):
        rank.resume()
    cluster.lose_node("n2")
    try:
        wait_for(lambda: "a node does not answer" in log_of(submit_dir, job), "the script to notice", 150)
        wait_for(lambda: cluster.describe(job)["Restarts"] != "0", "the requeue", 30)
        cluster.run(["scancel", job])
    finally:
        cluster.start_node("n2")
    (ended,) = cluster.wait_for_end(job, timeout_s=120)
    assert ended.state == "CANCELLED", log_of(submit_dir, job)
