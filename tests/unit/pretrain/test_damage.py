"""Damaged samples are replaced by a pure function of (seed, epoch, sample), listed once and counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.manifest import ShardedDataset
from pretrain.train.agreement import SharedInputError
from pretrain.train.damage import Damage
from tests.unit.pretrain.test_reader import assert_same, reader

STEPS = range(16)  # two epochs of 96 samples, 12 a batch


def damage_images(directory: Path, samples: Iterable[int]) -> None:
    """Zeros in the place of their pictures, in the tars."""
    data = ShardedDataset(directory)
    for sample in samples:
        row = data.index[sample]
        with data.shard_of(sample).open("r+b") as shard:
            shard.seek(int(row["image_offset"]))
            shard.write(b"\0" * int(row["image_num_bytes"]))


@pytest.fixture
def own_dir(prepared_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared_dir / "train", tmp_path / "train"))


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "damaged.jsonl").read_text().splitlines()]


def new_run(tmp_path: Path, name: str = "run") -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_others_take_their_places(own_dir: Path, tmp_path: Path) -> None:
    damaged = {3, 50, 77}
    damage_images(own_dir, damaged)
    dataset, run_dir = reader(own_dir), new_run(tmp_path)
    damage = Damage(dataset, run_dir, max_fraction=0.01)
    num_replaced = 0
    for step in STEPS:
        before = dataset[step]
        expected = dataset.samples(step)
        hit = damaged & set(expected.tolist())
        assert {sample for sample, _ in before.damaged} == hit
        batch = damage.replaced(before, step) if hit else before
        places = np.flatnonzero(np.isin(expected, list(damaged)))
        assert set(batch.sample_B[places].tolist()).isdisjoint(damaged | set(expected.tolist()))
        expected[places] = batch.sample_B[places]
        assert len(set(expected.tolist())) == 12
        assert_same(batch, dataset.make_batch(step // 8, expected))  # as if the order had them
        assert not batch.damaged and batch.image_BCHW.flatten(1).any(dim=1).all()
        num_replaced += len(places)
    assert num_replaced == 6 and damage.num_seen == 3
    lines = ledger(run_dir)
    assert {line["sample"] for line in lines} == damaged and len(lines) == 3
    for line in lines:
        (step,) = (s for s in range(8) if line["sample"] in dataset.samples(s))
        assert line["step"] == step + 1 and line["reason"] == "image: not a JPEG"
        assert line["shard"] == dataset.data.shard_of(line["sample"]).name
        assert line["key"] == dataset.data.read_sample(line["sample"]).key
        assert line["replacement"] not in damaged


def test_what_was_met_before_changes_nothing(own_dir: Path, tmp_path: Path) -> None:
    """Most samples are damaged, pictures and texts, so that candidates are, too."""
    damage_images(own_dir, range(0, 96, 2))
    data = ShardedDataset(own_dir)
    for sample in range(1, 40, 4):
        row = data.index[sample]
        with data.shard_of(sample).open("r+b") as shard:
            shard.seek(int(row["json_offset"]))
            shard.write(b"{")
            shard.write(b"\0" * 20)
    dataset = reader(own_dir)
    in_turn = Damage(dataset, new_run(tmp_path, "whole"), max_fraction=1.0)
    batches = [in_turn.replaced(dataset[step], step) for step in STEPS]
    for step in (13, 6, 0):
        anew = Damage(dataset, new_run(tmp_path, f"from {step}"), max_fraction=1.0, first_step=step)
        assert_same(anew.replaced(dataset[step], step), batches[step])
    assert in_turn.num_seen > 48
    other_epoch = {line["sample"]: line["replacement"] for line in ledger(tmp_path / "from 13")}
    first_epoch = {line["sample"]: line["replacement"] for line in ledger(tmp_path / "whole")}
    both = other_epoch.keys() & first_epoch.keys()
    assert both and any(other_epoch[sample] != first_epoch[sample] for sample in both)


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(own_dir: Path, tmp_path: Path) -> None:
    dataset, run_dir = reader(own_dir), new_run(tmp_path)
    order = dataset.order(0)
    damage_images(own_dir, order[[5, 30, 31, 90]])  # in the steps 1, 3, 3 and 8
    damage = Damage(dataset, run_dir, max_fraction=0.01)
    for step in range(8):
        damage.replaced(dataset[step], step)
    whole = (run_dir / "damaged.jsonl").read_bytes()
    assert [line["step"] for line in ledger(run_dir)] == [1, 3, 3, 8]
    with (run_dir / "damaged.jsonl").open("a") as file:
        file.write('{"sample": 4')  # torn by a kill
    resumed = Damage(dataset, run_dir, max_fraction=0.01, first_step=3)
    assert resumed.num_seen == 3 and len(ledger(run_dir)) == 3
    for step in range(3, 8):
        resumed.replaced(dataset[step], step)
    assert (run_dir / "damaged.jsonl").read_bytes() == whole


@pytest.mark.parametrize(("fraction", "num_allowed"), [(0.0, 0), (0.0002, 2), (0.0005, 5)])
def test_too_many_end_the_run(own_dir: Path, tmp_path: Path, fraction: float, num_allowed: int) -> None:
    dataset, run_dir = reader(own_dir), new_run(tmp_path)
    order = dataset.order(0)
    damage_images(own_dir, order[0:96:12])  # one a step
    damage = Damage(dataset, run_dir, max_fraction=fraction)
    for step in range(num_allowed):
        damage.replaced(dataset[step], step)
    expected = (
        rf"step {num_allowed + 1}: {num_allowed + 1} of {12 * (num_allowed + 1)} samples seen are damaged, more than "
        rf"data.max_damaged_fraction \({fraction}\) allows; they are listed in .*damaged.jsonl. Run `dermvlp verify"
    )
    with pytest.raises(SharedInputError, match=expected):
        damage.replaced(dataset[num_allowed], num_allowed)
    assert len(ledger(run_dir)) == num_allowed + 1  # the last one, too


def test_without_a_sound_sample_it_ends(own_dir: Path, tmp_path: Path) -> None:
    damage_images(own_dir, [7])
    dataset = reader(own_dir, global_batch_size=96)
    with pytest.raises(
        SharedInputError, match=r"step 1: sample 7 is damaged \(image: .*no sound one outside its batch"
    ):
        Damage(dataset, new_run(tmp_path), max_fraction=1.0).replaced(dataset[0], 0)
