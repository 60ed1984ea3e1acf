"""What goes wrong on a cluster: processes killed at any moment, full disks, two jobs at once, tables that change."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.config import PrepareConfig
from data_prep.config_file import dump_yaml
from data_prep.errors import InputError
from data_prep.pool import Part
from data_prep.prepare import prepare
from data_prep.repair import repair
from data_prep.shards.manifest import verify
from tests.integration.tables import plain_rows, published, samples, shard_times, table_config, write_image, write_table

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = "import sys; from pretrain.cli import main; sys.exit(main(sys.argv[1:]))"
PARALLEL_STAGES = ("scan", "captions", "shards")


@pytest.fixture(autouse=True)
def salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMVLP_SALT", "a secret of these tests")


def config_in(folder: Path, out_dir: Path, num_rows: int = 60) -> PrepareConfig:
    """Rows of 20 patients, some with unreadable images, a pair twice and a copy, in chunks and shards of 6 and 5."""
    if not (folder / "t.csv").exists():
        rows = plain_rows(num_rows, patient=lambda i: f"P{i // 3}", dx=lambda i: ("eczema", "acne")[i % 2])
        rows.append(rows[4])
        write_table(folder, rows)
        (folder / "img" / rows[7]["file"]).write_bytes(b"")
        shutil.copy(folder / "img" / rows[1]["file"], folder / "img" / rows[40]["file"])
    changes = {"val_fraction": 0.2, "samples_per_shard": 5, "images_per_chunk": 6, "num_workers": 2, "out_dir": out_dir}
    return table_config(folder, {"group": "patient", "diagnosis": "dx"}, **changes)


def command(config: PrepareConfig, folder: Path, *arguments: str) -> list[str]:
    path = folder / f"{config.out_dir.name}.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    return [sys.executable, "-c", RUN, "prepare", str(path), *arguments]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


# ---------------------------------------------------------------------------------------------- kill -9


@pytest.mark.long
def test_killed_at_twenty_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    expected_dir, out_dir = tmp_path / "expected", tmp_path / "killed"
    started = time.monotonic()
    process = start(command(config_in(tmp_path, expected_dir), tmp_path))
    assert process.wait() == 0
    whole_s = time.monotonic() - started
    arguments = command(config_in(tmp_path, out_dir), tmp_path)
    moments = random.Random(0)
    num_killed = 0
    for _ in range(20):
        process = start(arguments)
        try:
            process.wait(timeout=moments.uniform(0.15, 0.8) * whole_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_killed += 1
        if moments.random() < 0.6:  # work is lost for good now and then, or the runs would soon have nothing to do
            for path in [*out_dir.rglob("shard-*"), *out_dir.rglob("chunk-*.json")][moments.randrange(3) :: 2]:
                path.unlink(missing_ok=True)
    assert num_killed >= 10
    last = start(arguments)
    assert last.wait() == 0, last.stderr and last.stderr.read()
    assert published(out_dir) == published(expected_dir)
    assert not list(out_dir.glob("t*/*.partial")) and not list(out_dir.glob("val/*.partial"))
    for split in ("train", "val"):
        verify(out_dir / split)


# ---------------------------------------------------------------------------------------------- job arrays


def run_in_parts(config: PrepareConfig, num_parts: int) -> None:
    for stage in ("scan", "plan", "captions", "shards", "merge"):
        for index in range(num_parts) if stage in PARALLEL_STAGES else (0,):
            part = Part(index, num_parts) if stage in PARALLEL_STAGES else Part()
            prepare(config, stage=stage, part=part)


def test_parts_of_a_job_array_make_what_one_job_makes(tmp_path: Path) -> None:
    whole, parts = config_in(tmp_path, tmp_path / "whole"), config_in(tmp_path, tmp_path / "parts")
    prepare(whole)
    run_in_parts(parts, 3)
    assert published(tmp_path / "parts") == published(tmp_path / "whole")


def test_a_part_that_did_not_run_is_named(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "out")
    for index in (0, 2):
        prepare(config, stage="scan", part=Part(index, 3))
    with pytest.raises(InputError, match=r"chunk 1 of 10 is not scanned; run the stage scan \(all its parts\) first"):
        prepare(config, stage="plan")
    prepare(config, stage="scan", part=Part(1, 3))
    with pytest.raises(InputError, match="not planned yet; run the stage plan first"):
        prepare(config, stage="shards", part=Part(0, 3))
    prepare(config, stage="plan")
    for index in (0, 2):
        prepare(config, stage="shards", part=Part(index, 3))
    with pytest.raises(InputError, match=r"train: \d of \d+ shards are missing .* the first is number 1;"):
        prepare(config, stage="merge")
    assert not list((tmp_path / "out").rglob("manifest.json"))
    with pytest.raises(InputError, match="planned under other settings; run the stage plan again"):
        prepare(config.model_copy(update={"val_fraction": 0.4}), stage="shards")
    with pytest.raises(InputError, match="plan and merge are one job each"):
        prepare(config, stage="merge", part=Part(1, 3))


def test_parts_that_run_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """All parts of an array, another array of another size on the same folder, and each part twice."""
    expected, config = config_in(tmp_path, tmp_path / "expected"), config_in(tmp_path, tmp_path / "out")
    prepare(expected)
    for stage in ("scan", "plan", "shards", "merge"):
        if stage not in PARALLEL_STAGES:
            prepare(config, stage=stage)
            continue
        parts = ["0/2", "1/2", "0/3", "1/3", "2/3", "0/2"]
        jobs = [start(command(config, tmp_path, "--stage", stage, "--part", part)) for part in parts]
        failed = []
        for job in jobs:
            _, errors = job.communicate()
            if job.returncode:
                failed.append(errors)
        assert len(failed) <= 1 and all("is running already" in errors for errors in failed), failed
    assert published(tmp_path / "out") == published(tmp_path / "expected")


# ---------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room_kb", [20, 60, 140, 220])
def test_a_full_disk_ends_with_one_message_and_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, room_kb: int
) -> None:
    expected, config = config_in(tmp_path, tmp_path / "expected"), config_in(tmp_path, small_disk / "out")
    prepare(expected)
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - room_kb * 1024))
    with pytest.raises(InputError, match=r"out: No space left on device; make room and run the same command again"):
        prepare(config)
    assert not list((small_disk / "out").rglob("*.partial"))
    ballast.unlink()
    prepare(config)
    assert published(small_disk / "out") == published(tmp_path / "expected")


def test_repair_makes_again_what_is_damaged_and_nothing_else(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "out")
    prepare(config)
    before, times = published(tmp_path / "out"), shard_times(tmp_path / "out")
    train = tmp_path / "out" / "train"
    content = bytearray((train / "shard-000002.tar").read_bytes())
    content[700] ^= 1
    (train / "shard-000002.tar").write_bytes(content)
    (train / "shard-000004.tar").unlink()
    chunk = next((tmp_path / "out" / "work" / "scan").glob("*.jpegs"))
    content = bytearray(chunk.read_bytes())
    content[50] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-000002.tar: .*run `dermvlp repair`"):
        verify(train)
    assert repair(tmp_path / "out") == [train / "shard-000002.tar", train / "shard-000004.tar"]
    assert published(tmp_path / "out") == before
    again = shard_times(tmp_path / "out")
    assert {Path(name).name for name in times if again[name] != times[name] and "train" in name} == {
        "shard-000002.tar",
        "shard-000004.tar",
    }
    assert repair(tmp_path / "out") == []
    with pytest.raises(InputError, match="no preparation here"):
        repair(tmp_path / "img")


def test_repair_refuses_before_it_touches_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images gone where they are needed, another salt, a table that changed."""
    config = config_in(tmp_path, tmp_path / "out")
    prepare(config)
    shard = tmp_path / "out" / "train" / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    damaged = published(tmp_path / "out")
    monkeypatch.setenv("DERMVLP_SALT", "another")
    with pytest.raises(InputError, match="made with another salt"):
        repair(tmp_path / "out")
    monkeypatch.setenv("DERMVLP_SALT", "a secret of these tests")
    table = (tmp_path / "t.csv").read_text(encoding="utf-8")
    (tmp_path / "t.csv").write_text(table.replace("Red plaque number 3 ", "Blue plaque "), encoding="utf-8")
    with pytest.raises(InputError, match="row 4 is not what it was when it was planned"):
        repair(tmp_path / "out")
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    assert published(tmp_path / "out") == damaged
    (tmp_path / "img").rename(tmp_path / "away")
    (tmp_path / "img").mkdir()
    assert repair(tmp_path / "out") == [shard]  # from what was scanned
    assert shard.read_bytes() == whole
    (tmp_path / "out" / "train" / "index.npy").write_bytes(b"")
    assert repair(tmp_path / "out") == []
    verify(tmp_path / "out" / "train")
    healthy = published(tmp_path / "out")
    shard.unlink()
    for chunk in (tmp_path / "out" / "work" / "scan").glob("*.jpegs"):
        chunk.write_bytes(b"")
    with pytest.raises(InputError, match=r"images that were read before cannot be read now; is their folder away\?"):
        repair(tmp_path / "out")
    del healthy["train/shard-000001.tar"]
    assert published(tmp_path / "out") == healthy


def test_a_disk_that_is_away_does_not_empty_a_preparation(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "out")
    prepare(config)
    before = published(tmp_path / "out")
    (tmp_path / "img").rename(tmp_path / "away")
    (tmp_path / "img").mkdir()
    for stage in (None, "scan"):
        with pytest.raises(InputError, match="images that were read before cannot be read now; is their folder away"):
            prepare(config, stage=stage)
    assert published(tmp_path / "out") == before
    with pytest.raises(InputError, match="no row became a training sample"):
        prepare(config, accept_changes=True)
    assert {n: d for n, d in published(tmp_path / "out").items() if n.startswith("train/")} == {
        n: d for n, d in before.items() if n.startswith("train/")
    }


def test_an_image_that_could_not_be_read_once_is_tried_again(tmp_path: Path) -> None:
    """A folder where a file should be gives an error of the disk, as a stale handle does; its time and size stay."""
    config = config_in(tmp_path, tmp_path / "out")
    path = tmp_path / "img" / "scan003.png"
    content, times = path.read_bytes(), path.stat()
    chunk = tmp_path / "out" / "work" / "scan" / "chunk-000000.json"
    path.unlink()
    path.symlink_to(path)  # reading it fails with "too many levels of symbolic links"
    prepare(config)
    assert "the image file cannot be read (OSError)" in (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8")
    assert '"is_final":false' in chunk.read_text(encoding="utf-8")
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(config, accept_changes=True)
    assert "cannot be read" not in (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8")


def test_a_killed_worker_ends_with_one_message(tmp_path: Path) -> None:
    process = start(command(config_in(tmp_path, tmp_path / "out", num_rows=400), tmp_path))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (workers := _workers(process.pid)):
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "error: a worker process was killed, perhaps for want of memory" in errors


def _workers(pid: int) -> list[int]:
    """The children of the fork server that work in pools: forked from it, with its command line."""
    found = []
    for server in psutil.Process(pid).children():
        found += [child.pid for child in server.children()]
    return found


# ---------------------------------------------------------------------------------------------- tables that change


def test_rows_that_changed_places_since_the_plan_get_no_other_rows_captions(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "out")
    for stage in ("scan", "plan"):
        prepare(config, stage=stage)
    header, *lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "t.csv").write_text("\n".join([header, *reversed(lines)]), encoding="utf-8")
    with pytest.raises(InputError, match=r"t.csv: row 1 is not what it was when it was planned; run"):
        prepare(config, stage="shards", accept_changes=True)
    prepare(config, accept_changes=True)
    for split in ("train", "val"):
        for sample in samples(tmp_path / "out" / split):
            row = len(lines) - int(sample.key.rpartition("-")[2])
            assert sample.caption in lines[row]


def test_rows_that_move_get_their_new_numbers(tmp_path: Path) -> None:
    """A line that is no row, above the others: nothing changed but the numbers that keys are made of."""
    config = config_in(tmp_path, tmp_path / "out")
    prepare(config)
    header, *lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "t.csv").write_text("\n".join([header, "", *lines]), encoding="utf-8")
    prepare(config, accept_changes=True)
    keys = {sample.caption: sample.key for split in ("train", "val") for sample in samples(tmp_path / "out" / split)}
    assert keys["Red plaque number 0 on the arm."] == "set-000000002"
    for split in ("train", "val"):
        verify(tmp_path / "out" / split)


def test_parts_scanned_under_other_options_are_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "out")
    prepare(config)
    other = config.model_copy(update={"images": config.images.model_copy(update={"jpeg_quality": 50})})
    prepare(other, stage="scan", part=Part(0, 2))
    with pytest.raises(InputError, match="scanned under other options of images; run the stage scan"):
        prepare(other, stage="plan")


def test_what_is_written_is_no_source(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    folder = {"kind": "folder", "image_dir": tmp_path, "levels": [], "caption_template": ["A lesion."]}
    with pytest.raises(InputError, match=r"out_dir: .*out lies in .*, whose files are read; write elsewhere"):
        prepare(table_config(tmp_path, source=folder))


def test_a_table_that_changed_is_refused_with_what_changed(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "out")
    prepare(config)
    before = {sample.group: split for split in ("train", "val") for sample in samples(tmp_path / "out" / split)}
    with (tmp_path / "t.csv").open(encoding="utf-8") as file:
        header, *lines = file.read().splitlines()
    lines[9] = lines[9].replace("Red plaque", "Blue plaque")
    del lines[20]
    rows = plain_rows(80, patient=lambda i: f"P{i // 3}", dx=lambda i: ("eczema", "acne")[i % 2])[60:]
    for row in rows:
        write_image(tmp_path / "img" / row["file"], int(row["file"][4:7]))
    columns = header.split(",")
    lines += [",".join(row[column] for column in columns) for row in rows]
    (tmp_path / "t.csv").write_text("\n".join([header, *lines]), encoding="utf-8")
    message = (
        r"t.csv: changed since this preparation began: 21 row\(s\) new or changed, the first is row 10 of t.csv; "
        r"2 row\(s\) gone, the first is row 10 of t.csv. Run with --accept-changes"
    )
    for stage in (None, "scan", "shards", "merge"):
        with pytest.raises(InputError, match=message):
            prepare(config, stage=stage)
    for stage in ("scan", "plan", "shards", "merge"):  # as slurm/prepare.sh passes it on
        prepare(config, stage=stage, accept_changes=True)
    after = {sample.group: split for split in ("train", "val") for sample in samples(tmp_path / "out" / split)}
    assert len(after) > len(before) and all(after[group] == split for group, split in before.items() if group in after)
    prepare(config)  # what was accepted is what is expected now


def test_a_table_that_changes_during_a_scan_is_noticed(tmp_path: Path) -> None:
    config = config_in(tmp_path, tmp_path / "out")
    prepare(config, stage="scan")
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"t.csv: changed since this preparation began. Run with --accept-changes"):
        prepare(config)
