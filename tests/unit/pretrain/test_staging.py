"""Staging: the copy is a prepared folder like the original, made once a node, whatever is killed or runs beside."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.data.manifest import ShardedDataset
from pretrain.data.staging import stage

ROOT = Path(__file__).parents[3]


@pytest.fixture
def source(prepared_dir: Path) -> Path:
    return prepared_dir / "train"


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change by name, without the lock."""
    found = [path for path in folder.iterdir() if path.name != ".lock"]
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def test_the_copy_is_read_as_the_original(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stage(source, tmp_path / "disk")
    copy, original = ShardedDataset(folder), ShardedDataset(source)
    assert folder.parent == tmp_path / "disk" and copy.digest == original.digest
    assert np.array_equal(copy.index, original.index)
    assert all(copy.read_image(position) == original.read_image(position) for position in range(96))
    assert set(files(folder)) == {f"shard-{n:06d}.tar" for n in range(6)} | {"index.npy", "manifest.json"}
    assert capsys.readouterr().err.startswith("staging 7 files, 0.00 GB, in ")
    assert ShardedDataset(folder)._files == {} and str(copy.shard_of(95)).startswith(str(folder))


def test_a_later_run_copies_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(stage(source, tmp_path))
    capsys.readouterr()
    assert files(stage(source, tmp_path)) == before and capsys.readouterr().err == ""


def test_what_is_missing_or_short_is_copied_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stage(source, tmp_path)
    before = files(folder)
    (folder / "shard-000001.tar").unlink()
    os.truncate(folder / "shard-000003.tar", 1000)
    capsys.readouterr()
    assert stage(source, tmp_path) == folder
    assert capsys.readouterr().err.startswith("staging 2 files")
    after = files(folder)
    assert {name: size for name, (size, _) in after.items()} == {name: size for name, (size, _) in before.items()}
    unchanged = set(before) - {"shard-000001.tar", "shard-000003.tar", "manifest.json"}
    assert all(after[name] == before[name] for name in unchanged)


def test_other_data_have_a_folder_of_their_own(source: Path, prepared_dir: Path, tmp_path: Path) -> None:
    assert len({stage(source, tmp_path), stage(prepared_dir / "val", tmp_path), stage(source, tmp_path)}) == 2


def test_a_disk_without_room_is_refused_with_the_numbers(tmp_path: Path) -> None:
    """A manifest of a shard of 10 PB, written sparsely would be, is asked for: nothing is begun."""
    source = tmp_path / "source"
    source.mkdir()
    shard = {"name": "shard-000000.tar", "num_samples": 1, "num_bytes": 10**16, "sha256": "0" * 64}
    manifest = {
        **{"dataset": "x", "split": "train", "num_samples": 1, "shards": [shard], "index_sha256": "0" * 64},
        **{"image_short_side": 48, "captions_by_aspect": {}, "samples_by_diagnosis": {}, "samples_by_licence": {}},
        **{"num_rejected": 0, "decomposer": "none", "config_digest": "0"},
    }
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"needs 10000000\.0 GB more, and its disk has \d+\.\d GB free; make room"):
        stage(source, tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("*.tar"))


def test_a_shard_of_another_size_is_refused(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    os.truncate(copy / "shard-000002.tar", 512)
    with pytest.raises(InputError, match=r"copy/shard-000002.tar: missing or not of the size in manifest.json"):
        stage(copy, tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("manifest.json"))  # so nobody reads what is there


def test_a_folder_that_cannot_be_made_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("a file")
    for folder in (tmp_path / "disk", Path("/proc/no-such-folder")):
        with pytest.raises(InputError, match=f"data.stage_dir: {folder}: .*; name a folder of the node's own disk"):
            stage(source, folder)


def test_jobs_at_once_make_one_copy(source: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=spawn) as pool:
        folders = list(pool.map(stage, [source] * 6, [tmp_path] * 6))
    assert len(set(folders)) == 1 and len(ShardedDataset(folders[0])) == 96
    assert not list(tmp_path.rglob("*.partial"))


def test_a_killed_copy_is_finished_by_the_next(tmp_path: Path, source: Path) -> None:
    """SIGKILL while a shard is being copied: from a pipe that ends never, so the copy is under way for sure."""
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    code = (
        "import sys, shutil, time; from pathlib import Path; from pretrain.data import staging\n"
        "whole = shutil.copyfileobj\n"
        "def slowly(reading, writing, size):\n"
        "    whole(reading, writing, size)\n"
        "    if reading.name.endswith('3.tar'): writing.flush(); print('copied', flush=True); time.sleep(100)\n"
        "shutil.copyfileobj = slowly\n"
        "staging.stage(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(copy), str(tmp_path / "disk")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "copied\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (tmp_path / "disk").iterdir()
    assert list(folder.glob("shard-000003.tar.*.partial")) and not (folder / "manifest.json").exists()
    assert stage(copy, tmp_path / "disk") == folder
    assert len(ShardedDataset(folder)) == 96 and not list(folder.glob("*.partial"))
