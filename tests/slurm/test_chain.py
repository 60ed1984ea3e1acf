"""The whole way on a real SLURM: preparation, captions by a server beside each job, training, evaluation."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.evaluation.results import read_result
from tests.integration.conftest import write_config
from tests.integration.tables import plain_rows, samples, write_table
from tests.slurm.cluster import Cluster, running_cluster, why_not
from tests.slurm.conftest import add_to_environment, logs

_WHY_NOT = why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or "")]

NUM_ROWS, NUM_PARTS = 48, 2
SERVER = "python -m tests.slurm.scripted_llm $PORT asked-$SLURM_ARRAY_TASK_ID.log"
SCRIPTS = {
    "prepare_array.sbatch": ("config.yaml", "scan"),
    "caption_array.sbatch": ("config.yaml",),
    "train_multinode.sbatch": ("run.yaml",),
    "evaluate_array.sbatch": ("list.tsv",),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(memory_mb_per_node=131_072, gpus_per_node=1) as running:
        yield running
    assert not running.processes() and not running.directory.exists()


@pytest.fixture
def data_config_path(submit_dir: Path) -> Path:
    """Captions of a table, which a model is to split."""
    rows = plain_rows(NUM_ROWS, diagnosis=lambda i: ("psoriasis", "eczema", "melanoma")[i % 3])
    write_table(submit_dir, rows)
    columns = {"image": "file", "caption": "text", "diagnosis": "diagnosis"}
    config = {
        "name": "drawn",
        "source": {"kind": "table", "columns": columns, "table_path": "t.csv", "image_dir": "img"},
        "decomposer": {"kind": "llm", "model": "scripted", "max_retries": 0},
        "val_fraction": 0.25,
        "samples_per_shard": 8,
        "images_per_chunk": 8,
        "out_dir": "out",
    }
    (submit_dir / "data.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return submit_dir / "data.yaml"


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_the_script(cluster: Cluster, submit_dir: Path, script: str) -> None:
    cluster.run(["sbatch", "--test-only", f"slurm/{script}", *SCRIPTS[script]], cwd=submit_dir)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(submit_dir: Path) -> None:
    # followed into common.sh, and from there not into the test's own env.sh
    scripts = sorted(f"slurm/{path.name}" for path in (submit_dir / "slurm").iterdir() if path.suffix != ".py")
    scripts.remove("slurm/env.sh")
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=submit_dir, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_from_a_table_to_numbers(
    cluster: Cluster, submit_dir: Path, data_config_path: Path, run_config: dict[str, Any]
) -> None:
    run_config["data"]["train_dir"] = "out/train"
    run_config |= {"num_steps": 4, "checkpoint": {"every": 2}, "launch": {"threads_per_rank": 1}}
    write_config(submit_dir / "run.yaml", run_config | {"run_dir": "somewhere-else"})
    add_to_environment(submit_dir, f"export DERMVLP_LLM_SERVER='{SERVER}' OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu")
    command = ["slurm/chain.sh", "data.yaml", str(NUM_PARTS), "run.yaml", "runs/made", "out/val", "out/train"]
    train_options = "--nodes=2 --gpus-per-node=1 --time=10"
    printed = cluster.run(command, cwd=submit_dir, DERMVLP_SERVE_LLM="1", DERMVLP_TRAIN_OPTIONS=train_options)
    jobs = dict(line.split(": job ") for line in printed.splitlines())
    assert list(jobs) == ["scan", "plan", "captions", "shards", "merge", "train", "evaluate"]
    tasks = cluster.wait_for_end(*jobs.values(), timeout_s=240)
    assert {task.state for task in tasks} == {"COMPLETED"}, logs(submit_dir)
    by_job = {job: [task for task in tasks if task.job_id == job] for job in jobs.values()}
    assert by_job[jobs["train"]][0].node == "n[1-2]" and len(by_job[jobs["evaluate"]]) == 2

    # each caption was asked once, of the server of its own part, under a key of that job's
    with closing(sqlite3.connect(submit_dir / "out" / "work" / "answers.sqlite")) as ledger:
        assert ledger.execute("SELECT status, model, COUNT(*) FROM answers GROUP BY 1, 2").fetchall() == [
            ("answered", "scripted", NUM_ROWS)
        ]
    asked = [(submit_dir / f"asked-{part}.log").read_text(encoding="utf-8").splitlines() for part in range(NUM_PARTS)]
    assert min(len(lines) for lines in asked) > 0 and sum(len(lines) for lines in asked) == NUM_ROWS
    keys = {line.split()[1] for lines in asked for line in lines}
    assert len(keys) == NUM_PARTS and not any(key in logs(submit_dir) for key in keys)
    origins = {caption.origin for sample in samples(submit_dir / "out" / "val") for caption in sample.captions}
    assert any(origin.startswith("llm:scripted:") for origin in origins), origins
    assert len(list(submit_dir.glob("dermvlp-captions-*.server.out"))) == NUM_PARTS

    assert [path.name for path in sorted((submit_dir / "runs/made/checkpoints").iterdir())][-1] == "step-00000004"
    results = [read_result(submit_dir / "runs/made/evaluations" / name) for name in ("out-val", "out-train")]
    assert sum(result.dataset.num_images for result in results) == NUM_ROWS
    overlaps = [result.leakage.num_overlap for result in results if result.leakage is not None]
    assert overlaps == [0, results[1].dataset.num_images]


def captions(submit_dir: Path, server: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script by itself: it reads no more of SLURM than these variables."""
    add_to_environment(submit_dir, f"export DERMVLP_LLM_SERVER='{server}'")
    for stage in ("scan", "plan"):
        subprocess.run(
            ["bash", "slurm/prepare_array.sbatch", "data.yaml", stage, "num_workers=1"],
            cwd=submit_dir,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    variables = os.environ | {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    command = ["bash", "slurm/caption_array.sbatch", "data.yaml", "num_workers=1"]
    return subprocess.run(
        command, cwd=submit_dir, env=variables | environment, capture_output=True, text=True, timeout=100
    )


def test_a_server_that_cannot_start_is_named(submit_dir: Path, data_config_path: Path) -> None:
    done = captions(submit_dir, "echo CUDA out of memory; false")
    assert done.returncode == 1
    assert re.search(r"error: the server ended before it was ready;.*\nCUDA out of memory\n", done.stderr)


def test_a_server_that_is_never_ready_is_given_up(submit_dir: Path, data_config_path: Path) -> None:
    done = captions(submit_dir, "sleep 345.25", DERMVLP_LLM_START_S="2")
    assert done.returncode == 1 and "the server was not ready after 2 s" in done.stderr
    assert "sleep 345.25" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_server_that_dies_in_the_midst_ends_the_job_and_keeps_what_came(
    submit_dir: Path, data_config_path: Path
) -> None:
    config = yaml.safe_load(data_config_path.read_text())
    config["decomposer"] |= {"requests_per_minute": 60}  # so that it outlives no server
    data_config_path.write_text(yaml.safe_dump(config))
    server = f"{sys.executable} -m tests.slurm.scripted_llm $PORT asked.log 6"
    done = captions(submit_dir, server)
    assert done.returncode == 1, done.stderr
    assert "the server ended in the midst of the work" in done.stderr and "the scripted server is gone" in done.stderr
    with closing(sqlite3.connect(submit_dir / "out" / "work" / "answers.sqlite")) as ledger:
        (answered,) = ledger.execute("SELECT COUNT(*) FROM answers WHERE status = 'answered'").fetchone()
    assert 0 < answered < NUM_ROWS


def test_a_config_without_a_model_has_nothing_to_serve(submit_dir: Path, data_config_path: Path) -> None:
    config = yaml.safe_load(data_config_path.read_text()) | {"decomposer": {"kind": "rules"}}
    data_config_path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        ["bash", "slurm/caption_array.sbatch", "data.yaml"], cwd=submit_dir, capture_output=True, text=True
    )
    assert done.returncode == 2 and "names no model to serve" in done.stderr


@pytest.mark.parametrize("line", ["runs/made\tout/val", ""])
def test_a_line_that_is_missing_or_short_is_named(submit_dir: Path, line: str) -> None:
    (submit_dir / "list.tsv").write_text(f"{line}\n", encoding="utf-8")
    command = ["bash", "slurm/evaluate_array.sbatch", "list.tsv"]
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(command, cwd=submit_dir, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "list.tsv: line 1 is not MODEL, DATA and OUT" in done.stderr
