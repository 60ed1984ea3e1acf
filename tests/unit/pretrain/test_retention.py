"""Which checkpoints are whole, which are kept, and what a kill between two file operations leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_prep.errors import InputError
from pretrain.config import CheckpointConfig
from pretrain.train.retention import (
    checkpoint_folder,
    list_checkpoints,
    list_checksums,
    list_files,
    note_passed_over,
    prune,
    read_meta,
    read_passed_over,
    remove_checkpoint,
    remove_leftovers,
    set_aside,
    superfluous,
    whole_checkpoints,
)


def write_checkpoint(run_dir: Path, step: int, passed_over: list[int] | None = None) -> Path:
    folder = checkpoint_folder(run_dir, step)
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "optimizer.pt").write_bytes(bytes(100))
    (folder / "model.json").write_text('{"model_cfg": {}}')
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    meta: dict[str, Any] = {"step": step, "config": {}, "data_digest": "", "num_ranks": 1}
    meta |= {"record": {"step": step, "passed_over": passed_over or []}}
    meta |= {"files": list_files(folder), "crc32": list_checksums(folder)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def whole_steps(run_dir: Path) -> list[int]:
    return [meta["step"] for _, meta in whole_checkpoints(run_dir)[0]]


@pytest.mark.parametrize(
    ("config", "best_step", "expected"),
    [
        ({"keep_last": 1, "keep_best": False}, None, [10, 20, 30, 40]),
        ({"keep_last": 2}, None, [10, 20, 30]),
        ({"keep_last": 2}, 20, [10, 30]),
        ({"keep_last": 2, "keep_best": False}, 20, [10, 20, 30]),
        ({"keep_last": 1, "keep_every": 20}, 10, [30]),
        ({"keep_last": 1, "keep_every": 25}, None, [10, 20, 30, 40]),
        ({"keep_last": 9}, None, []),
    ],
)
def test_kept_are_the_last_the_best_and_every_nth(
    config: dict[str, Any], best_step: int | None, expected: list[int]
) -> None:
    assert superfluous([30, 10, 50, 20, 40], CheckpointConfig(**config), best_step) == expected


def test_pruning_leaves_the_folders_that_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, CheckpointConfig(keep_last=1), best_step=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "tear",
    [
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text((folder / "meta.json").read_text()[:-20]),
        lambda folder: (folder / "meta.json").write_text("{}"),
        lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "engine" / "optimizer.pt").write_bytes(bytes(99)),
        lambda folder: (folder / "engine" / "optimizer.pt").unlink(),
        lambda folder: (folder / "model.json").write_text('{"model_cfg": []}'),
        lambda folder: flip(folder / "model.safetensors", 20),
        lambda folder: flip(folder / "model.safetensors", 7),  # a header of an impossible size
    ],
)
def test_a_torn_one_is_skipped_with_the_reason(tmp_path: Path, tear: Any) -> None:
    write_checkpoint(tmp_path, 3)
    torn = write_checkpoint(tmp_path, 6)
    tear(torn)
    whole, skipped = whole_checkpoints(tmp_path)
    assert [path.name for path, _ in whole] == ["step-00000003"]
    assert list(skipped) == [torn] and str(torn) in skipped[torn]
    with pytest.raises(InputError, match="step-00000006"):
        read_meta(torn)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_what_kills_leave_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 6).rename(tmp_path / "checkpoints" / "step-00000006.partial")
    write_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoints" / "step-00000002.removed")
    assert whole_steps(tmp_path) == [3]
    said = remove_leftovers(tmp_path)
    assert len(said) == 2 and "step-00000002.removed" in said[0] and "step-00000006.partial" in said[1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_one_set_aside_is_not_counted_and_not_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    aside = set_aside(write_checkpoint(tmp_path, 6))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    assert remove_leftovers(tmp_path) == [] and (aside / "meta.json").is_file()


def test_removed_again_after_a_kill_in_the_middle_of_removing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3).rename(tmp_path / "checkpoints" / "step-00000003.removed")
    remove_checkpoint(write_checkpoint(tmp_path, 3))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_steps_passed_over_outlive_the_process_and_rule_out_later_checkpoints(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, step)
    note_passed_over(tmp_path, 7)
    assert whole_steps(tmp_path) == [3, 6]  # step 9 holds the batch of step index 7
    note_passed_over(tmp_path, 6)
    assert read_passed_over(tmp_path) == [6, 7]
    assert whole_steps(tmp_path) == [3, 6]
    remove_checkpoint(checkpoint_folder(tmp_path, 9))
    write_checkpoint(tmp_path, 9, passed_over=[6, 7])
    assert whole_steps(tmp_path) == [3, 6, 9]


def test_a_torn_list_of_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "passed_over.json").write_text("[3,")
    with pytest.raises(InputError, match=r"passed_over\.json"):
        read_passed_over(tmp_path)
