"""The streaming mode: which reader gives which sample when, and what it does with bytes that are not right."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_prep.errors import InputError
from pretrain.config import AugmentationConfig, DataConfig, StreamConfig
from pretrain.data import remote
from pretrain.data.manifest import ShardedDataset
from pretrain.data.plan import buffer_seed, epoch_order, order_digest, stream_shard_order
from pretrain.data.reader import BatchDataset
from pretrain.data.remote import read_shard, shard_url
from pretrain.data.streaming import StreamReader, check_stream, samples_by_step, stream_steps_per_epoch
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import TrainTransform
from tests.unit.pretrain.test_reader import SPEC, TOKENIZER, assert_same


def data_config(train_dir: Path, num_workers: int = 0, shuffle_buffer: int = 24) -> DataConfig:
    stream = StreamConfig(url=str(train_dir), shuffle_buffer=shuffle_buffer)
    return DataConfig(train_dir=train_dir, num_workers=num_workers, stream=stream)


def stream_reader(
    train_dir: Path, rank: int = 0, world_size: int = 1, num_workers: int = 0, batch_size: int = 8, buffer: int = 24
) -> StreamReader:
    batches = BatchDataset(
        ShardedDataset(train_dir, with_tars=False),
        dataclasses.replace(SPEC, global_batch_size=batch_size),
        TrainTransform(48, AugmentationConfig()),
        TextTokenizer(TOKENIZER, 64, pad_id=0, can_trim=True),
        rank,
        world_size,
    )
    return StreamReader(batches, data_config(train_dir, num_workers, buffer))


def alone(local: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: local


def given(reader: StreamReader, worker: int, first_step: int, num_steps: int) -> list[int]:
    """Positions of the samples that a reader gives to these steps."""
    return [position for share in reader.shares(worker, first_step, num_steps) for position in share.sample_B.tolist()]


@pytest.fixture
def own_dir(prepared_dir: Path, tmp_path: Path) -> Path:
    """A copy of the training split that a test may spoil."""
    return Path(shutil.copytree(prepared_dir / "train", tmp_path / "train"))


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.0)


# ---------------------------------------------------------------------------------------------- the order


def test_every_reader_gives_its_part_of_each_step() -> None:
    assert samples_by_step([6, 3], images_per_rank=3, num_steps=3).tolist() == [[2, 1], [2, 1], [2, 1]]
    sizes = [1000, 700, 13]
    count_SR = samples_by_step(sizes, images_per_rank=32, num_steps=53)
    assert (count_SR.sum(1) == 32).all() and (count_SR.sum(0) <= sizes).all()
    assert count_SR[:, 2].max() == 1 and 6 <= count_SR[:27, 2].sum() <= 7  # a small one lasts as long as a large one


def test_steps_are_those_of_the_rank_that_is_dealt_least() -> None:
    assert stream_steps_per_epoch(np.array([10, 10, 10, 10]), 8, 2) == 5
    assert stream_steps_per_epoch(np.array([10, 10, 10, 4]), 8, 2) == 3  # (10 + 4) // 4
    assert stream_steps_per_epoch(np.array([10, 10, 10, 10, 10]), 8, 2) == 5
    assert stream_steps_per_epoch(np.array([10, 0, 10, 0]), 8, 2) == 2  # empty shards are dealt to nobody
    assert stream_steps_per_epoch(np.array([100, 3]), 8, 2) == 0


@pytest.mark.parametrize(
    ("world_size", "num_workers", "batch_size", "num_used"), [(1, 0, 20, 80), (2, 2, 8, 96), (3, 1, 15, 90)]
)
def test_an_epoch_gives_every_sample_once_but_for_the_rest(
    prepared_dir: Path, world_size: int, num_workers: int, batch_size: int, num_used: int
) -> None:
    ranks = [stream_reader(prepared_dir / "train", r, world_size, num_workers, batch_size) for r in range(world_size)]
    steps = ranks[0].steps_per_epoch
    assert steps * batch_size == num_used
    for epoch in (0, 1):
        first, last = epoch * steps, (epoch + 1) * steps
        samples = [
            s for rank in ranks for worker in range(max(1, num_workers)) for s in given(rank, worker, first, last)
        ]
        assert len(samples) == len(set(samples)) == num_used
    assert f"leaves out {96 - num_used} samples" in ranks[0].summary(0, "")[0]


def test_samples_of_several_shards_are_mixed_and_another_way_each_epoch(prepared_dir: Path) -> None:
    reader = stream_reader(prepared_dir / "train", buffer=48)
    epochs = [np.array(given(reader, 0, epoch * 12, (epoch + 1) * 12)) for epoch in (0, 1)]
    for order in epochs:
        assert len(set((order[32:48] // 16).tolist())) >= 3  # shards in 16 samples, once the buffer is full
        assert (np.diff(order) == 1).mean() < 0.2
    assert (epochs[0] == epochs[1]).mean() < 0.2
    indexed = epoch_order(reader.data.shard_sizes, SPEC.seed, 0, SPEC.shards_per_block)
    assert (epochs[0] == indexed).mean() < 0.2
    assert epochs[0].tolist() == reader.sample_order(reader.plan(0, 0)).tolist()  # what is said beforehand


def test_the_order_is_the_one_of_earlier_runs(prepared_dir: Path) -> None:
    """A change here breaks resuming: it needs a line in the changelog. webdataset's buffer is part of it."""
    assert stream_shard_order(8, 0, 0).tolist() == [7, 0, 4, 1, 6, 3, 2, 5]
    assert buffer_seed(1, 2, 3, 4) == 6708088088039556140
    reader = stream_reader(prepared_dir / "train", 1, 2, 2)
    assert order_digest(reader.sample_order(reader.plan(3, 1))) == "3caf0f141579"
    assert sorted(reader.order(3).tolist()) == list(range(6))
    assert len({reader.order_digest(epoch) for epoch in range(20)}) == 20


def test_augmentation_and_masks_are_of_the_sample_and_epoch_alone(prepared_dir: Path) -> None:
    """A batch of the stream equals the one that the other mode makes of the same samples, field by field."""
    reader = stream_reader(prepared_dir / "train", num_workers=0)
    indexed = BatchDataset(ShardedDataset(prepared_dir / "train"), *_parts(reader), 0, 1)
    for epoch in (0, 1):
        order = reader.sample_order(reader.plan(epoch, 0))
        steps = range(epoch * 12, epoch * 12 + 3)
        for step, batch in zip(steps, reader.read_batches(steps[0], steps[-1] + 1, False, alone), strict=True):
            size, first = reader.spec.global_batch_size, step - epoch * 12
            assert_same(batch, indexed.make_batch(epoch, order[first * size : (first + 1) * size]))


def _parts(reader: StreamReader) -> tuple[object, ...]:
    return reader.spec, reader.batches.transform, reader.batches.tokenizer


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("step", [1, 5, 11, 12, 15])
def test_a_resumed_reader_goes_on_with_the_next_sample(prepared_dir: Path, step: int) -> None:
    for worker in (0, 1):
        reader = stream_reader(prepared_dir / "train", 1, 2, 2, buffer=6)
        whole = [share.sample_B.tolist() for share in reader.shares(worker, 0, 18)]
        assert [share.sample_B.tolist() for share in reader.shares(worker, step, 18)] == whole[step:]


def test_shards_that_are_used_up_are_not_read_again(own_dir: Path) -> None:
    reader = stream_reader(own_dir, buffer=4)
    rest = given(reader, 0, 9, 12)  # 24 of 96 samples are left: of two shards, and a little of the buffer
    plan = reader.plan(0, 0)
    needed, num_again = reader._needed(plan, 72)
    assert 2 <= len(needed) <= 4 and num_again == len(needed) * 16 - 24
    for shard in set(plan.shards.tolist()) - needed:
        (own_dir / reader.data.manifest.shards[shard].name).unlink()
    assert given(reader, 0, 9, 12) == rest
    (line,) = reader.summary(9, reader.order_of)[1:]
    assert f"reads {len(needed)} of its 6 shards of epoch 0" in line and f"drops {num_again} samples" in line


def test_another_number_of_readers_is_said(prepared_dir: Path) -> None:
    before, now = (stream_reader(prepared_dir / "train", num_workers=n) for n in (1, 3))
    assert not any("warning" in line for line in before.summary(5, stream_reader(prepared_dir / "train").order_of))
    (warning,) = [line for line in now.summary(5, before.order_of) if "warning" in line]
    assert "1 rank(s) x 1 reader(s)" in warning and "now 1 rank(s) x 3 reader(s)" in warning


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("pipe:cat shards", "one {}"),
        ("pipe:cat {} {}", "one {}"),
        ("s3://bucket/train/", "pipe:aws s3 cp s3://bucket/train/{} -"),
        ("http://host/train", "must end with /"),
        ("https://host/train/?key=1", "must end with /"),
        ("https://me:secret@host/train/", "password"),
    ],
)
def test_urls_that_cannot_work_are_refused(url: str, said: str) -> None:
    with pytest.raises(ValidationError) as error:
        StreamConfig(url=url)
    message = error.value.errors(include_input=False)[0]["msg"]
    assert said in message and "secret" not in message


@pytest.mark.parametrize(
    "name", ["a.tar; touch gone", "$(id).tar", "`id`.tar", "-rf.tar", "../a.tar", "a b.tar", "a\n.tar"]
)
def test_names_that_a_shell_could_take_for_more_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not one of letters"):
        shard_url("pipe:cat folder/{}", name)


def test_names_become_urls(tmp_path: Path) -> None:
    assert shard_url("pipe:cat 'a folder'/{}", "shard-000001.tar") == "pipe:cat 'a folder'/shard-000001.tar"
    assert shard_url("https://host/a/", "shard-000001.tar") == "https://host/a/shard-000001.tar"
    assert shard_url(str(tmp_path / "a folder"), "s.tar") == f"{tmp_path.as_uri()}/a%20folder/s.tar"


def test_too_few_shards_are_refused_with_the_numbers(prepared_dir: Path) -> None:
    data = ShardedDataset(prepared_dir / "train")
    check_stream(data, data_config(prepared_dir / "train", num_workers=3), 8, world_size=2)
    with pytest.raises(InputError, match=r"6 shard\(s\) are fewer than 2 rank\(s\) x 4 reader\(s\) = 8"):
        check_stream(data, data_config(prepared_dir / "train", num_workers=4), 8, world_size=2)
    with pytest.raises(InputError, match="fewer samples than its 24 of a step"):
        check_stream(data, data_config(prepared_dir / "train"), 96, world_size=4)
    with pytest.raises(InputError, match="no such folder"):
        check_stream(data, data_config(prepared_dir / "none"), 8, world_size=1)


# ---------------------------------------------------------------------------------------------- damage


def spoil_image(directory: Path, position: int) -> None:
    row = ShardedDataset(directory).index[position]
    with (directory / f"shard-{int(row['shard']):06d}.tar").open("r+b") as shard:
        shard.seek(int(row["image_offset"]))
        shard.write(b"\0" * int(row["image_num_bytes"]))


def test_a_damaged_sample_gives_its_place_to_the_next_one(own_dir: Path) -> None:
    reader = stream_reader(own_dir)
    order = reader.sample_order(reader.plan(0, 0)).tolist()
    spoil_image(own_dir, order[9])
    shares = list(reader.shares(0, 0, 12))
    assert [share.damaged for share in shares if share.damaged] == [shares[1].damaged]
    ((position, reason),) = shares[1].damaged.items()
    assert position == order[9] and reason == "image: not a JPEG"
    samples = [position for share in shares for position in share.sample_B.tolist()]
    assert samples[:95] == order[:9] + order[10:]
    assert samples[95] == order[0]  # nothing is left of the epoch: its first sample comes twice
    batch = next(reader.read_batches(1, 2, False, alone))
    assert batch.damaged == ((order[9], reason),) and order[9] not in batch.sample_B.tolist()


def test_a_stream_without_a_whole_image_ends(own_dir: Path) -> None:
    for position in range(96):
        spoil_image(own_dir, position)
    with pytest.raises(InputError, match="none of 96 samples is sound"):
        list(stream_reader(own_dir).shares(0, 0, 1))


@pytest.mark.parametrize("num_bytes", [0, 100, 5000, 10240, 20000])
def test_a_tar_that_breaks_off_is_refused_with_its_name(
    own_dir: Path, no_pause: None, capsys: pytest.CaptureFixture[str], num_bytes: int
) -> None:
    path, data = own_dir / "shard-000002.tar", ShardedDataset(own_dir)
    row = data.index[32:48]
    num_whole = int(((row["json_offset"] + row["json_num_bytes"]) <= num_bytes).sum())
    with path.open("r+b") as file:
        file.truncate(num_bytes)
    samples = []
    with pytest.raises(InputError, match=r"shard-000002.tar: .*, 5 times in a row"):
        for sample in read_shard(data, 2, str(own_dir)):
            samples.append(sample.position)
    # each once, none of them cut; the last whole one is not known to be whole
    assert samples == list(range(32, 32 + len(samples))) and num_whole - 1 <= len(samples) <= num_whole
    assert capsys.readouterr().err.count("reading it again") == 4


def test_every_cut_is_noticed(own_dir: Path, no_pause: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within headers, images and texts, at their borders, and where the stream's end looks like the tar's."""
    monkeypatch.setattr(remote, "_NUM_ATTEMPTS", 1)
    path, data = own_dir / "shard-000000.tar", ShardedDataset(own_dir)
    content, row = path.read_bytes(), data.index[3]
    image, text = int(row["image_offset"]), int(row["json_offset"])
    for end in (image - 512, image - 100, image, image + 1, text - 512, text, text + int(row["json_num_bytes"]) - 1):
        path.write_bytes(content[:end])
        samples = []
        with pytest.raises(InputError, match=r"shard-000000\.tar"):
            for sample in read_shard(data, 0, str(own_dir)):
                samples.append(sample)
        assert [sample.position for sample in samples] in ([0, 1], [0, 1, 2])
        assert all(sample.jpeg == data.read_image(sample.position) for sample in samples)


def test_other_shards_than_the_index_describes_are_refused(own_dir: Path, prepared_dir: Path, no_pause: None) -> None:
    (own_dir / "shard-000000.tar").write_bytes((own_dir / "shard-000001.tar").read_bytes())
    with pytest.raises(InputError, match=r"shard-000000.tar: .*sample 0, or is not the tar that index.npy describes"):
        list(read_shard(ShardedDataset(prepared_dir / "train"), 0, str(own_dir)))


def test_a_command_that_fails_or_is_silent_is_named(
    prepared_dir: Path, no_pause: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ShardedDataset(prepared_dir / "train")
    with pytest.raises(InputError, match=r"pipe:exit 3 # shard-000000.tar: exit status 3, 5 times in a row"):
        list(read_shard(data, 0, "pipe:exit 3 # {}"))
    with pytest.raises(InputError, match=r"exit status 127; does data.stream.url lead"):
        list(read_shard(data, 0, "pipe:no-such-command {} 2>/dev/null"))
    monkeypatch.setattr(remote, "_SILENCE_S", 0.2)
    monkeypatch.setattr(remote, "_NUM_ATTEMPTS", 1)
    with pytest.raises(InputError, match="no byte came for 0 s"):
        list(read_shard(data, 0, f"pipe:head -c 3000 {prepared_dir}/train/{{}}; exec sleep 600"))
