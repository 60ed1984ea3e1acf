"""Preparation as job arrays on a real SLURM of two nodes: the same bytes as on one machine, also after kills."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock

from tests.integration.tables import plain_rows, published, write_table
from tests.slurm.cluster import Cluster, Job, running_cluster, wait_for, why_not
from tests.slurm.conftest import REPOSITORY, SALT, logs

_WHY_NOT = why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or "")]

STAGES = ("scan", "plan", "captions", "shards", "merge")
NUM_ROWS = 300
NUM_PARTS = 4
ONE_WORKER = "num_workers=1"  # the nodes' eight cores are not there
SMALL = {"images_per_chunk": 5, "samples_per_shard": 5, "out_dir": "out"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:  # a node has room for one job of the script
        yield running
    assert not running.processes() and not running.directory.exists()


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of real images where they are to be had, else of noise; four rows of it have no image, or one twice."""
    directory = tmp_path_factory.mktemp("source")
    config = real_source(directory) if "DERMVLP_DATA" in os.environ else drawn_source(directory)
    (directory / "config.yaml").write_text(yaml.safe_dump(config | SMALL), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def expected(source_dir: Path) -> dict[str, bytes]:
    """What one `dermvlp prepare` makes of it."""
    run = "import sys; from pretrain.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "prepare", str(source_dir / "config.yaml"), ONE_WORKER]
    environment = os.environ | {"DERMVLP_SALT": SALT, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=source_dir, env=environment, check=True, stdout=subprocess.DEVNULL)
    files = published(source_dir / "out")
    assert {"rejected.csv", "train/index.npy", "val/index.npy"} < files.keys()
    assert files["rejected.csv"].count(b"\n") > 4
    return files


def real_source(directory: Path) -> dict[str, Any]:
    """Rows from all over the table, so that both of its sources are among them."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs/data/derm_images.yaml").read_text(encoding="utf-8"))
    config["ontology_path"] = str(REPOSITORY / config["ontology_path"])
    config["source"]["table_path"] = str(directory / "t.csv")
    with (Path(os.environ["DERMVLP_DATA"]) / "derm-images" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = rows[:: len(rows) // NUM_ROWS][:NUM_ROWS]
    chosen += [row | {"filename": f"images/missing{i}.jpg"} for i, row in enumerate(chosen[:2])] + chosen[2:4]
    with (directory / "t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(chosen)
    return config


def drawn_source(directory: Path) -> dict[str, Any]:
    rows = plain_rows(NUM_ROWS, patient=lambda i: f"patient {i // 3}")
    write_table(directory, [*rows, *rows[2:4]])
    for number in (0, 1):
        (directory / "img" / rows[number]["file"]).unlink()
    columns = {"image": "file", "caption": "text", "group": "patient"}
    paths = {"table_path": str(directory / "t.csv"), "image_dir": str(directory / "img")}
    return {"name": "drawn", "source": {"kind": "table", "columns": columns} | paths}


def submit(cluster: Cluster, submit_dir: Path, source_dir: Path) -> dict[str, str]:
    """Stage -> job."""
    command = ["slurm/prepare.sh", str(source_dir / "config.yaml"), str(NUM_PARTS), ONE_WORKER]
    printed = cluster.run(command, cwd=submit_dir, DERMVLP_NUM_PARTS="7")  # left in the shell: does not count here
    jobs = dict(line.split(": job ") for line in printed.splitlines())
    assert tuple(jobs) == STAGES
    return jobs


def wait_for_all(cluster: Cluster, jobs: dict[str, str]) -> dict[str, list[Job]]:
    """Stage -> its tasks, when all stages have come to their end."""
    tasks = cluster.wait_for_end(*jobs.values(), timeout_s=120)
    return {stage: [task for task in tasks if task.job_id == job] for stage, job in jobs.items()}


def states(tasks: list[Job]) -> set[str]:
    return {task.state for task in tasks}


def part_processes(cluster: Cluster, job: str, part: int) -> list[psutil.Process]:
    return cluster.processes(SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID=str(part))


def stop_part(cluster: Cluster, job: str, part: int, made: Path) -> None:
    """Halts a part's processes as soon as it has made this file, so that what follows meets it in the midst of work."""
    wait_for(made.exists, str(made), 60, every_s=0.002)
    processes = part_processes(cluster, job, part)
    for process in processes:
        process.suspend()
    assert len(processes) >= 2  # the command and its worker


def print_times(stages: dict[str, list[Job]]) -> None:
    previous: Job | None = None
    for stage, tasks in stages.items():
        for task in sorted(tasks, key=lambda task: task.task or 0):
            assert task.started is not None and task.ended is not None
            free = task.submitted if previous is None or previous.ended is None else previous.ended
            waited, ran = (int(gap.total_seconds()) for gap in (task.started - free, task.ended - task.started))
            name = stage if task.task is None else f"{stage} {task.task}"
            print(f"{name:12} {task.node}  waited {waited} s, ran {ran} s")
        previous = max(tasks, key=lambda task: str(task.ended))


def test_stages_follow_one_another_over_two_nodes(
    cluster: Cluster, submit_dir: Path, source_dir: Path, expected: dict[str, bytes]
) -> None:
    stages = wait_for_all(cluster, submit(cluster, submit_dir, source_dir))
    assert {state for tasks in stages.values() for state in states(tasks)} == {"COMPLETED"}, logs(submit_dir)
    print_times(stages)
    assert {stage: len(tasks) for stage, tasks in stages.items()} == dict(zip(STAGES, (4, 1, 4, 4, 1), strict=True))
    for earlier, later in itertools.pairwise(stages.values()):
        assert max(str(task.ended) for task in earlier) <= min(str(task.started) for task in later)
    assert {task.node for task in stages["scan"]} == {task.node for task in stages["shards"]} == set(cluster.nodes)
    assert published(submit_dir / "out") == expected
    # the log of each task under its own name
    names = {path.name for path in submit_dir.glob("*.out")}
    assert {f"dermvlp-scan-{stages['scan'][0].job_id}-3.out", f"dermvlp-plan-{stages['plan'][0].job_id}.out"} < names
    assert len(names) == 14


def test_a_killed_part_is_submitted_again_by_itself(
    cluster: Cluster, submit_dir: Path, source_dir: Path, expected: dict[str, bytes]
) -> None:
    scan_dir, part = submit_dir / "out" / "work" / "scan", 2
    jobs = submit(cluster, submit_dir, source_dir)
    stop_part(cluster, jobs["scan"], part, scan_dir / "chunk-000002.json")
    assert not (scan_dir / "chunk-000058.json").exists()  # its last
    cluster.run(["scancel", "--signal=KILL", f"{jobs['scan']}_{part}"])
    stages = wait_for_all(cluster, jobs)
    outcome = {task.task: task.state for task in stages.pop("scan")}
    assert outcome == {**dict.fromkeys(range(NUM_PARTS), "COMPLETED"), part: "CANCELLED"}
    for tasks in stages.values():  # an array that never began is one line
        assert states(tasks) == {"CANCELLED"} and all(task.node == "" for task in tasks)
    wait_for(lambda: not part_processes(cluster, jobs["scan"], part), "the part's processes to end", 10)

    done = {path: path.stat().st_mtime_ns for path in scan_dir.glob("chunk-*.json")}
    again = ["sbatch", "--parsable", f"--array={part}", "slurm/prepare_array.sbatch"]
    again += [str(source_dir / "config.yaml"), "scan", ONE_WORKER]
    job = cluster.run(again, cwd=submit_dir, DERMVLP_NUM_PARTS=str(NUM_PARTS)).strip()
    assert states(cluster.wait_for_end(job)) == {"COMPLETED"}, logs(submit_dir)
    made = {path: path.stat().st_mtime_ns for path in scan_dir.glob("chunk-*.json")}
    assert done.items() < made.items()  # nothing is done twice
    assert {int(path.stem[-6:]) % NUM_PARTS for path in made.keys() - done.keys()} == {part}

    wait_for_all(cluster, submit(cluster, submit_dir, source_dir))
    assert {path: path.stat().st_mtime_ns for path in scan_dir.glob("chunk-*.json")} == made
    assert published(submit_dir / "out") == expected


def test_a_requeued_part_goes_on_and_the_chain_waits_for_it(
    cluster: Cluster, submit_dir: Path, source_dir: Path, expected: dict[str, bytes]
) -> None:
    jobs, part = submit(cluster, submit_dir, source_dir), 1
    first = submit_dir / "out" / "train" / "shard-000001.json"
    stop_part(cluster, jobs["shards"], part, first)
    done_ns = first.stat().st_mtime_ns
    cluster.run(["scontrol", "requeue", f"{jobs['shards']}_{part}"])
    stages = wait_for_all(cluster, jobs)
    assert {state for tasks in stages.values() for state in states(tasks)} == {"COMPLETED"}, logs(submit_dir)
    assert "Restarts=1" in cluster.run(["scontrol", "show", "job", f"{jobs['shards']}_{part}"])
    assert first.stat().st_mtime_ns == done_ns
    assert published(submit_dir / "out") == expected


def test_a_stage_that_fails_ends_the_chain(cluster: Cluster, submit_dir: Path, source_dir: Path) -> None:
    with FileLock(submit_dir / "out" / "work" / ".whole.lock"):  # as of somebody else's preparation
        jobs = submit(cluster, submit_dir, source_dir)
        stages = wait_for_all(cluster, jobs)
    outcome = {stage: states(tasks) for stage, tasks in stages.items()}
    assert outcome == {"scan": {"COMPLETED"}, "plan": {"FAILED"}} | {stage: {"CANCELLED"} for stage in STAGES[2:]}
    assert "is running already" in (submit_dir / f"dermvlp-plan-{jobs['plan']}.out").read_text(encoding="utf-8")
    assert not (submit_dir / "out" / "train").exists()


def test_a_part_by_itself_must_say_how_many_there_are(submit_dir: Path, source_dir: Path) -> None:
    # the scripts read no more of SLURM than this
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}
    command = ["bash", "slurm/prepare_array.sbatch", str(source_dir / "config.yaml"), "scan"]
    done = subprocess.run(command, cwd=submit_dir, env=os.environ | array, capture_output=True, text=True)
    assert done.returncode == 2 and "part '3/1': write it as i/n" in done.stderr
    assert not (submit_dir / "out").exists()
