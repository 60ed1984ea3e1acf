"""Every way to start two ranks gives the same run; what cannot be a rank is refused; a dead rank ends the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.distributed.launchers import adopt_environment, first_host
from pretrain.train import launch
from pretrain.train.metrics import read_metrics
from tests.integration.conftest import write_config
from tests.integration.test_train import ENVIRONMENT, command, kill_all, losses, run

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
BARE = {k: v for k, v in ENVIRONMENT.items() if k not in LAUNCHER_VARIABLES and not k.startswith(("SLURM_", "OMPI_"))}


@pytest.fixture
def small_run(run_config: dict[str, Any]) -> dict[str, Any]:
    return run_config | {"objectives": [{"kind": "clip"}], "num_steps": 2, "optimizer": {"warmup_steps": 1}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(config: Path, environments: list[dict[str, str]], *overrides: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            command(config, 1, *overrides),
            env=BARE | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]


def slurm_task(rank: int) -> dict[str, str]:
    """What srun gives a task of two on one node. SLURM_LOCALID and SLURM_PROCID are its number."""
    task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    place = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_ID": "0"}
    return task | place | {"SLURM_JOB_ID": str(os.getpid())}


@pytest.mark.long
def test_every_launcher_starts_the_same_run(small_run: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", small_run)
    torchrun = run(config, 2, f"run_dir={tmp_path / 'torchrun'}")
    assert torchrun.returncode == 0, torchrun.stderr

    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    launcher += ["--master_port", str(free_port()), "--module", "pretrain.train", str(config)]
    result = subprocess.run(
        [*launcher, f"run_dir={tmp_path / 'deepspeed'}"], env=BARE, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    tasks = start_ranks(config, [slurm_task(rank) for rank in (0, 1)], f"run_dir={tmp_path / 'srun'}")
    for task in tasks:
        _, errors = task.communicate(timeout=400)
        assert task.returncode == 0, errors

    expected = losses(tmp_path / "torchrun")
    assert [record["step"] for record in expected] == [1, 2]
    assert losses(tmp_path / "deepspeed") == losses(tmp_path / "srun") == expected


def test_a_killed_rank_ends_the_other(small_run: dict[str, Any], tmp_path: Path) -> None:
    """Bare processes: no launcher watches them."""
    small_run |= {"num_steps": 100_000, "checkpoint": {"every": 100_000}}
    config = write_config(tmp_path / "run.yaml", small_run)
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = start_ranks(config, [rendezvous | {"RANK": r, "LOCAL_RANK": r} for r in ("0", "1")])
    try:
        metrics = Path(small_run["run_dir"]) / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        _, errors = ranks[0].communicate(timeout=60)
        assert time.monotonic() - killed_at < 60
        assert ranks[0].returncode == 1
        assert "error: rank 0: another rank is gone" in errors
        assert "Traceback" not in errors
    finally:
        for rank in ranks:
            if rank.poll() is None:
                kill_all(rank)  # type: ignore[arg-type]


WATCHED = """
import sys, time
from datetime import timedelta
from pretrain.distributed import comm
from pretrain.distributed.watch import PeerWatch
comm.initialise("gloo", timedelta(minutes=30))
with PeerWatch():
    print("ready", flush=True)
    time.sleep(float(sys.argv[1]))  # in no collective, as a rank that reads, or waits for its device
"""


def start_watched(*sleeps_s: float) -> list[subprocess.Popen[str]]:
    rendezvous = {"WORLD_SIZE": str(len(sleeps_s)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WATCHED, str(sleep_s)],
            env=BARE | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": "."},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, sleep_s in enumerate(sleeps_s)
    ]


def test_a_killed_rank_ends_those_that_wait_for_nothing() -> None:
    """Three ranks: of 1 and 2 neither knows the other, so it goes through rank 0."""
    ranks = start_watched(600, 600, 600)
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        ranks[1].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        for number in (0, 2):
            _, errors = ranks[number].communicate(timeout=60)
            assert ranks[number].returncode == 1, errors
            assert f"error: rank {number}: another rank is gone" in errors
        assert time.monotonic() - killed_at < 60
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("sleeps_s", [(0.0, 8.0), (8.0, 0.0)])
def test_a_rank_that_is_done_ends_nobody(sleeps_s: tuple[float, float]) -> None:
    for rank in start_watched(*sleeps_s):
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0 and errors == "", errors


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("node[08-11,14],gpu2", "node08"),
        ("node[3,5-7]", "node3"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("a-b[2-3].cluster.org", "a-b2.cluster.org"),
    ],
)
def test_first_host_of_a_nodelist(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def adopted(**environment: str) -> dict[str, str]:
    adopt_environment(environment)
    return {name: environment[name] for name in LAUNCHER_VARIABLES if name in environment}


SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "n[3-4]",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n9", "MASTER_PORT": "1234"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def test_what_a_task_of_srun_becomes() -> None:
    ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n3"}
    first = adopted(**SRUN)
    port = int(first.pop("MASTER_PORT"))
    assert first == ranks and 20_000 <= port < 30_000
    assert adopted(**SRUN)["MASTER_PORT"] == str(port)  # the same on every rank
    assert adopted(**SRUN | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != str(port)
    chosen = {"MASTER_ADDR": "n4.ib", "MASTER_PORT": "77"}  # as batch scripts like to
    assert adopted(**SRUN, **chosen) == ranks | chosen


def test_other_launchers_are_left_alone() -> None:
    assert adopted(**SRUN, **TORCHRUN) == TORCHRUN
    assert adopted() == {}
    assert adopted(**SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    batch_script = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_NTASKS": "8"}
    assert adopted(**batch_script) == {}


def test_what_a_rank_of_mpirun_becomes() -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    assert adopted(**MPIRUN, MASTER_ADDR="n1") == ranks | {"MASTER_ADDR": "n1"}
    assert adopted(**MPIRUN, OMPI_COMM_WORLD_LOCAL_SIZE="4") == ranks | {"MASTER_ADDR": "127.0.0.1"}
    daemon = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}  # mpirun's own, one a node
    assert adopted(**daemon, **MPIRUN, MASTER_ADDR="n1") == ranks | {"MASTER_ADDR": "n1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, "LOCAL_RANK: not set, although RANK is"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT: not set, although RANK is"),
        ({"WORLD_SIZE": "2"}, "RANK: not set, although WORLD_SIZE is"),
        (TORCHRUN | {"RANK": "2"}, "RANK: 2 is no rank of WORLD_SIZE 2"),
        (TORCHRUN | {"RANK": "one"}, "RANK: 'one' is no number"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_PROCID: not set"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST: not set"),
        (SRUN | {"SLURM_LOCALID": ""}, "SLURM_LOCALID: '' is no number"),
        (MPIRUN, "MASTER_ADDR: not set; give mpirun the host of rank 0"),
    ],
)
def test_an_environment_that_is_set_in_part_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        adopt_environment(dict(environment))
    assert message in str(refusal.value)


def test_a_task_of_srun_that_is_told_its_nodes_is_a_launcher(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in slurm/train_multinode.sbatch: one task a node, which starts the ranks of its node."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    task = {
        "PROCID": "1",
        "NTASKS": "2",
        "STEP_NUM_TASKS": "2",
        "LOCALID": "0",
        "JOB_ID": "7",
        "STEP_NODELIST": "n[1-2]",
    }
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    started: list[tuple[int, int]] = []

    def note(config: TrainConfig, nodes: launch.Nodes, num_local: int, arguments: Sequence[str]) -> int:
        started.append((nodes.count, num_local))
        return 0

    monkeypatch.setattr(launch, "_run_ranks", note)
    config = write_config(tmp_path / "run.yaml", run_config)
    assert launch.launch(str(config), [], launch.Nodes(2, "n1:20000", "7-0", 2)) == 0
    assert started == [(2, 2)] and "RANK" not in os.environ
