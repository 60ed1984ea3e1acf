"""Batches lie in memory that is used again, and never while something still refers to it."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from pretrain.data.buffers import Buffers
from pretrain.data.reader import read_batches
from tests.unit.pretrain.test_reader import assert_same, reader


def test_batches_that_are_kept_are_not_written_over(prepared_dir: Path) -> None:
    """More than there are slots for: the reader goes on in memory of its own."""
    dataset = reader(prepared_dir / "train")
    kept = list(read_batches(dataset, 0, 12, num_workers=1, prefetch_batches=1))
    for step, batch in enumerate(kept):
        assert_same(batch, dataset[step])


def test_a_view_keeps_its_memory(prepared_dir: Path) -> None:
    """What autograd keeps of a batch is often a part of it."""
    dataset = reader(prepared_dir / "train")
    views = [batch.image_BCHW[3:5, 1] for batch in read_batches(dataset, 0, 12, num_workers=1, prefetch_batches=2)]
    for step, view in enumerate(views):
        assert torch.equal(view, dataset[step].image_BCHW[3:5, 1])


def test_the_memory_of_a_batch_that_is_gone_is_used_again(prepared_dir: Path) -> None:
    addresses = []
    for step, batch in enumerate(read_batches(reader(prepared_dir / "train"), 0, 20, num_workers=1)):
        assert_same(batch, reader(prepared_dir / "train")[step])
        addresses.append(batch.image_BCHW.data_ptr())
    # two asked for ahead, the one at hand, and the last, which the loop holds until it has the next
    assert len(set(addresses)) <= 4


def test_a_slot_is_free_when_the_last_view_is_gone() -> None:
    buffers = Buffers(1, 2, (4, 3))
    buffers._taken[1] = 1
    tensor = buffers.deliver(1)
    view = tensor[1]
    del tensor
    assert buffers._taken.tolist() == [0, 1]
    del view
    gc.collect()
    assert buffers._taken.tolist() == [0, 0]


def test_memory_outlives_the_buffers() -> None:
    buffers = Buffers(1, 1, (5,))
    tensor = buffers.deliver(0)
    tensor.fill_(7)
    del buffers
    gc.collect()
    assert tensor.tolist() == [7] * 5
