"""The reader: the same global batches for any number of workers and ranks, and bad data is named."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.schema import ASPECT_CODE, ASPECTS, NO_ASPECT_CODE, SUBCAPTION_ASPECTS, Aspect, Sample
from pretrain.config import AugmentationConfig, BlockMask
from pretrain.data.batch import Batch
from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import BatchDataset, ReaderSpec, read_batches
from pretrain.data.tokenize import TextTokenizer
from pretrain.data.transforms import TrainTransform
from tests.unit.pretrain.plain_transform import PlainTransform

SPEC = ReaderSpec(
    seed=3,
    global_batch_size=12,
    shards_per_block=2,
    bucket_edges=(16, 32, 64),
    aspects_by_term={"clip": [Aspect.CAPTION], "local_alignment": SUBCAPTION_ASPECTS},
    aspects_read=ASPECTS,
    diagnoses=None,
    num_parts=1,
    mask=BlockMask(min_num_patches=2),
    patch_grid=(4, 4),
)
TOKENIZER = open_clip.SimpleTokenizer(context_length=64)


def reader(directory: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> BatchDataset:
    return BatchDataset(
        ShardedDataset(directory),
        dataclasses.replace(SPEC, **changes),
        TrainTransform(48, AugmentationConfig()),
        TextTokenizer(TOKENIZER, 64, pad_id=0, can_trim=True),
        rank,
        world_size,
    )


def leaves(value: object, name: str = "batch") -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}")
    else:
        yield name, value


def assert_same(left: Batch, right: Batch) -> None:
    pairs = list(zip(leaves(left), leaves(right), strict=True))
    assert sum(isinstance(value, Tensor) for (_, value), _ in pairs) >= 15
    for (name, value), (other_name, other) in pairs:
        assert name == other_name
        same = torch.equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other
        assert same, name


def token_rows(batches: list[Batch]) -> list[Tensor]:
    """Token ids of the U texts of a global batch, each from where its feature will be: all ranks' gathered rows."""
    gathered: list[Tensor | None] = []
    for batch in batches:
        (packed,) = batch.packed
        rows = [row for bucket in packed.bucket_tokens for row in bucket]
        mine = [rows[int(position)] for position in packed.order_R]
        gathered += [*mine, *([None] * (batch.num_padded_texts - len(mine)))]
    found = [gathered[int(row)] for row in batches[0].gathered_row_U]
    assert all(row is not None for row in found)
    return [row for row in found if row is not None]


# ---------------------------------------------------------------------------------------------- what a batch holds


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_tokens_are_those_of_the_samples_captions(prepared_dir: Path, world_size: int) -> None:
    ranks = [reader(prepared_dir / "train", rank, world_size) for rank in range(world_size)]
    for step in (0, 9):  # 9: in the second epoch
        batches = [rank[step] for rank in ranks]
        rows = token_rows(batches)
        num_captions = 0
        for batch in batches:
            for image, position in enumerate(batch.sample_B.tolist()):
                captions = ranks[0].data.read_sample(position).captions
                for k in range(batch.text_BK.shape[1]):
                    text, aspect = int(batch.text_BK[image, k]), int(batch.aspect_BK[image, k])
                    if k >= len(captions):
                        assert (text, aspect) == (batch.num_texts, NO_ASPECT_CODE)
                        continue
                    assert aspect == ASPECT_CODE[captions[k].aspect]
                    expected = TOKENIZER([captions[k].text])[0]
                    assert (
                        torch.equal(rows[text], expected[: len(rows[text])]) and not expected[len(rows[text]) :].any()
                    )
                    num_captions += 1
        assert num_captions > len(rows) > SPEC.global_batch_size  # some texts are shared


def test_images_are_the_samples_images(prepared_dir: Path) -> None:
    dataset = reader(prepared_dir / "train")
    dataset.transform = PlainTransform(48)
    batch = dataset[0]
    assert batch.image_BCHW.shape == (12, 3, 48, 48) and batch.image_BCHW.dtype == torch.uint8
    for image, position in zip(batch.image_BCHW, batch.sample_B.tolist(), strict=True):
        assert torch.equal(image, PlainTransform(48)(dataset.data.read_image(position)))


def test_masks_part_the_patches(prepared_dir: Path) -> None:
    batch = reader(prepared_dir / "train")[0]
    assert batch.visible_BV is not None and batch.masked_BM is not None
    assert batch.masked_BM.shape == batch.visible_BV.shape == (12, 8)
    both = torch.cat([batch.visible_BV, batch.masked_BM], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(16).expand(12, 16))
    assert (batch.visible_BV.diff(dim=1) > 0).all() and (batch.masked_BM.diff(dim=1) > 0).all()
    assert len({tuple(row.tolist()) for row in batch.masked_BM}) > 6
    without = reader(prepared_dir / "train", mask=None)[0]
    assert without.visible_BV is None and without.masked_BM is None


def test_an_epoch_is_every_sample_once(prepared_dir: Path) -> None:
    dataset = reader(prepared_dir / "train")
    assert dataset.steps_per_epoch == 8
    epochs = [np.concatenate([dataset[step].sample_B.numpy() for step in range(e * 8, e * 8 + 8)]) for e in range(2)]
    for epoch, seen in enumerate(epochs):
        assert np.array_equal(seen, dataset.order(epoch)) and np.array_equal(np.sort(seen), np.arange(96))
    assert not np.array_equal(epochs[0], epochs[1])
    # what does not fill a batch is left out, another part each epoch
    uneven = reader(prepared_dir / "train", global_batch_size=40)
    assert uneven.steps_per_epoch == 2
    left_out = [
        set(range(96)) - {int(s) for step in (2 * e, 2 * e + 1) for s in uneven[step].sample_B} for e in range(2)
    ]
    assert [len(samples) for samples in left_out] == [16, 16] and left_out[0] != left_out[1]


def test_a_sample_is_seen_anew_in_each_epoch(prepared_dir: Path) -> None:
    dataset = reader(prepared_dir / "train")
    views = []
    for epoch in range(2):
        step, place = divmod(int(np.flatnonzero(dataset.order(epoch) == 5)[0]), 12)
        batch = dataset[epoch * 8 + step]
        assert batch.masked_BM is not None
        views.append((batch.image_BCHW[place], batch.masked_BM[place]))
    assert not torch.equal(views[0][0], views[1][0]) and not torch.equal(views[0][1], views[1][1])


def test_texts_that_fill_the_context_are_counted(prepared_dir: Path) -> None:
    dataset = reader(prepared_dir / "train", bucket_edges=(16,))
    dataset.tokenizer = TextTokenizer(open_clip.SimpleTokenizer(context_length=16), 16, pad_id=0, can_trim=True)
    batch = dataset[0]
    (packed,) = batch.packed
    (tokens,) = packed.bucket_tokens
    long_ones = int((tokens[packed.order_R][:, -1] != 0).sum())
    assert batch.num_truncated == long_ones >= 12  # at least every whole caption
    assert reader(prepared_dir / "train")[0].num_truncated < long_ones


# ---------------------------------------------------------------------------------------------- workers and ranks


def test_batches_do_not_depend_on_the_number_of_workers(prepared_dir: Path) -> None:
    expected = [reader(prepared_dir / "train")[step] for step in range(6, 10)]  # across the end of an epoch
    for num_workers in (0, 1, 2):
        batches = list(read_batches(reader(prepared_dir / "train"), 6, 10, num_workers, pin=False))
        assert len(batches) == 4
        for batch, same in zip(batches, expected, strict=True):
            assert_same(batch, same)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_whole_batch(prepared_dir: Path, world_size: int) -> None:
    whole = reader(prepared_dir / "train")[2]
    parts = [reader(prepared_dir / "train", rank, world_size)[2] for rank in range(world_size)]
    assert whole.visible_BV is not None and whole.masked_BM is not None
    for name in ("image_BCHW", "sample_B", "text_BK", "aspect_BK", "visible_BV", "masked_BM"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    for part in parts:
        assert torch.equal(part.text_NK, whole.text_NK) and part.num_texts == whole.num_texts
        assert set(part.columns) == set(whole.columns)
        for label, columns in part.columns.items():
            for name in ("text_C", "column_of_text", "slot_M"):
                assert torch.equal(getattr(columns, name), getattr(whole.columns[label], name)), name
            assert (
                sum(columns.num_slots_by_rank) == len(columns.slot_M) and len(columns.num_slots_by_rank) == world_size
            )
        assert len(part.packed[0].bucket_tokens) == len(SPEC.bucket_edges)  # the same forwards on every rank
    assert sum(len(part.packed[0].order_R) for part in parts) == whole.num_texts == len(whole.packed[0].order_R)
    for row, same in zip(token_rows(parts), token_rows([whole]), strict=True):
        length = min(len(row), len(same))
        assert torch.equal(row[:length], same[:length])


# ---------------------------------------------------------------------------------------------- bad input


def test_batch_sizes_that_cannot_work(prepared_dir: Path) -> None:
    with pytest.raises(InputError, match="global_batch_size: 12 does not divide among 5 ranks"):
        reader(prepared_dir / "train", 0, 5)
    with pytest.raises(InputError, match=r"val: 24 samples are fewer than one global batch; lower global_batch"):
        reader(prepared_dir / "val", global_batch_size=25)
    assert reader(prepared_dir / "val", global_batch_size=24).steps_per_epoch == 1


@pytest.fixture
def own_dir(prepared_dir: Path, tmp_path: Path) -> Path:
    """A copy of val that the test may damage."""
    return Path(shutil.copytree(prepared_dir / "val", tmp_path / "val"))


def overwrite(directory: Path, position: int, part: str, old: bytes, new: bytes) -> None:
    """In the tar, without moving anything."""
    assert len(old) == len(new)
    dataset = ShardedDataset(directory)
    row = dataset.index[position]
    path = directory / dataset.manifest.shards[int(row["shard"])].name
    content = bytearray(path.read_bytes())
    start, num_bytes = int(row[f"{part}_offset"]), int(row[f"{part}_num_bytes"])
    member = bytes(content[start : start + num_bytes])
    assert old in member
    content[start : start + num_bytes] = member.replace(old, new, 1)
    path.write_bytes(content)


def damage(directory: Path) -> dict[int, str]:
    """What the one batch of all 24 samples says of them; it is read all the same."""
    dataset = reader(directory, global_batch_size=24)
    batch = dataset[0]
    found = dict(batch.damaged)
    assert len(found) == len(batch.damaged) and batch.image_BCHW.shape == (24, 3, 48, 48)
    for sample in range(24):  # a sample's own verdict, and its pixels: nothing where there is no picture
        assert (dataset.damage_of(sample) is None) == (sample not in found)
        place = batch.sample_B.tolist().index(sample)
        assert bool(batch.image_BCHW[place].any()) == (not found.get(sample, "").startswith("image"))
    return found


def test_a_changed_caption_is_damage(own_dir: Path) -> None:
    caption = ShardedDataset(own_dir).read_sample(17).caption
    assert sum(caption == ShardedDataset(own_dir).read_sample(i).caption for i in range(24)) == 1
    other = caption[:-3] + "xyz"
    overwrite(own_dir, 17, "json", caption.encode(), other.encode())
    assert ShardedDataset(own_dir).read_sample(17).caption == other  # still a Sample
    assert damage(own_dir) == {17: "caption 0 is not the text that index.npy names"}


def test_a_removed_caption_is_damage(own_dir: Path) -> None:
    sample = ShardedDataset(own_dir).read_sample(3)
    shorter = sample.model_copy(update={"captions": sample.captions[:1]}).model_dump_json().encode()
    whole = sample.model_dump_json().encode()
    overwrite(own_dir, 3, "json", whole, shorter + b" " * (len(whole) - len(shorter)))
    assert isinstance(ShardedDataset(own_dir).read_sample(3), Sample)
    found = damage(own_dir)
    assert list(found) == [3] and re.fullmatch(r"caption \d+ is not the text that index.npy names", found[3])


@pytest.mark.parametrize("bad", [b'"captains"', b'"capt\xff\xfe\xfds"'], ids=["other key", "not UTF-8"])
def test_unreadable_json_is_damage(own_dir: Path, bad: bytes) -> None:
    overwrite(own_dir, 20, "json", b'"captions"', bad)
    found = damage(own_dir)
    assert list(found) == [20] and "shard-000001.tar: sample 20 is damaged; run `dermvlp verify`" in found[20]
    assert "\n" not in found[20]
    # a worker process says the same
    (batch,) = read_batches(reader(own_dir, global_batch_size=24), 0, 1, num_workers=1, pin=False)
    assert dict(batch.damaged) == found


def test_bytes_that_are_no_image_are_damage(own_dir: Path) -> None:
    overwrite(own_dir, 20, "image", b"\xff\xd8\xff", b"\x00\x00\x00")
    found = damage(own_dir)
    assert list(found) == [20] and found[20] == "image: not a JPEG"
    assert ShardedDataset(own_dir).read_key(20) == ShardedDataset(own_dir).read_sample(20).key


def test_a_shard_that_ends_early_is_damage_of_its_samples(own_dir: Path) -> None:
    dataset = reader(own_dir, global_batch_size=24)
    last = int(np.argmax(dataset.data.index["image_offset"] * (dataset.data.index["shard"] == 1)))
    (own_dir / "shard-000001.tar").open("r+b").truncate(int(dataset.data.index["image_offset"][last]) - 600)
    (sample, reason), *others = dataset[0].damaged
    assert sample == last and "shard-000001.tar: ends before byte" in reason and not others
    assert dataset.data.read_key(last) is None


def test_a_shard_that_is_gone_ends_the_run(own_dir: Path) -> None:
    dataset = reader(own_dir, global_batch_size=24)
    (own_dir / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001.tar"):
        dataset[0]


def test_a_reader_process_that_dies_is_said(prepared_dir: Path) -> None:
    dataset = reader(prepared_dir / "train")
    dataset.transform = Deadly(48)
    with pytest.raises(OSError, match=r"a reader process died .*Lower data.num_workers"):
        list(read_batches(dataset, 0, 1, num_workers=1, pin=False))


class Deadly(PlainTransform):
    def __call__(self, jpeg: bytes, seed: int = 0) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_texts_are_encoded_in_as_many_parts_as_images(prepared_dir: Path) -> None:
    """The parts' texts, one after the other, are the whole's; each part has every bucket."""
    whole, parted = reader(prepared_dir / "train")[1], reader(prepared_dir / "train", num_parts=3)[1]
    assert len(parted.packed) == 3 and all(len(part.bucket_tokens) == 3 for part in parted.packed)

    def texts(batch: Batch) -> list[list[int]]:
        found = []
        for part in batch.packed:
            rows = [row for bucket in part.bucket_tokens for row in bucket]
            found += [[int(token) for token in rows[int(position)] if token] for position in part.order_R]
        return found

    assert texts(parted) == texts(whole) and len(texts(whole)) == whole.num_texts
    assert max(len(part.order_R) for part in parted.packed) == -(-whole.num_texts // 3)


def test_without_contrastive_terms_no_text_is_read(prepared_dir: Path) -> None:
    batch = reader(prepared_dir / "train", aspects_by_term={}, aspects_read=())[0]
    assert batch.packed == [] and batch.columns == {} and batch.masked_BM is not None
