"""The sample order: a permutation, pure, near in the file system, and the same as yesterday."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain.data.plan import epoch_order, generator, sample_seed

ROOT = Path(__file__).parents[3]
SIZES = np.array([7, 1, 12, 5, 9, 9, 3, 20, 2, 11])


def order_digest(order: NDArray[np.int64]) -> str:
    """Names a whole order."""
    return hashlib.blake2b(np.ascontiguousarray(order, dtype="<i8").tobytes(), digest_size=6).hexdigest()


def shard_of(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(np.cumsum(sizes), order, side="right")


@pytest.mark.parametrize("shards_per_block", [1, 3, 10, 99])
@pytest.mark.parametrize("sizes", [SIZES, np.array([1]), np.array([5, 5])], ids=str)
def test_every_sample_once(sizes: NDArray[np.int64], shards_per_block: int) -> None:
    order = epoch_order(sizes, seed=3, epoch=2, shards_per_block=shards_per_block)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(sizes.sum()))


def test_same_in_another_process_other_with_seed_epoch_and_block() -> None:
    code = (
        "import numpy as np; from pretrain.data.plan import epoch_order, sample_seed\n"
        "from tests.unit.pretrain.test_plan import order_digest\n"
        f"print(order_digest(epoch_order(np.array({SIZES.tolist()}), 3, 2, 4)), sample_seed(3, 2, 17))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": str(ROOT)}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = epoch_order(SIZES, 3, 2, 4)
    assert there.stdout.split() == [order_digest(here), str(sample_seed(3, 2, 17))]
    others = [epoch_order(SIZES, *key) for key in ((3, 3, 4), (4, 2, 4), (2, 3, 4), (3, 2, 5))]
    assert len({order_digest(order) for order in [here, *others]}) == 5


@pytest.mark.parametrize("shards_per_block", [1, 3, 4])
def test_a_batch_touches_the_shards_of_its_block_alone(shards_per_block: int) -> None:
    sizes = np.full(24, 16)
    shards = shard_of(epoch_order(sizes, 0, 0, shards_per_block), sizes)
    samples_per_block = 16 * shards_per_block
    blocks = [set(shards[start : start + samples_per_block]) for start in range(0, len(shards), samples_per_block)]
    assert all(len(block) == shards_per_block for block in blocks)
    assert sum(len(block) for block in blocks) == 24  # no shard in two blocks
    for start in range(0, len(shards), 8):
        touched = len(set(shards[start : start + 8]))
        crosses = start // samples_per_block != (start + 7) // samples_per_block
        assert touched <= shards_per_block * (2 if crosses else 1)
    if shards_per_block > 1:  # and it is a shuffle: neighbours come from different shards
        assert (np.diff(shards) != 0).mean() > 0.5
    assert [min(block) for block in blocks] != sorted(min(block) for block in blocks)


def test_all_orders_of_a_block_come_up() -> None:
    """Three samples over 600 epochs: each of the six orders about 100 times (chi-square, 5 degrees, p < 1e-6 at 36)."""
    _, counts = np.unique([epoch_order(np.array([3]), 0, epoch, 1) for epoch in range(600)], axis=0, return_counts=True)
    assert len(counts) == 6 and ((counts - 100.0) ** 2 / 100.0).sum() < 36


def test_the_order_is_the_one_of_earlier_runs() -> None:
    """A change here breaks resuming and comparing: it needs a line in the changelog, not a new number alone."""
    assert order_digest(epoch_order(SIZES, 0, 0, 4)) == "00f75089837f"
    assert order_digest(epoch_order(np.full(40, 1000), 17, 3, 16)) == "0c227bb0c949"
    assert order_digest(np.array([2, 0, 1])) == "36503a67ef02"
    assert [sample_seed(0, 0, 0), sample_seed(1, 2, 3)] == [7947103229179566522, 7173814120722556717]


def test_seeds_and_streams_do_not_meet() -> None:
    keys = [(seed, epoch, sample) for seed in range(3) for epoch in range(3) for sample in range(300)]
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 23, 4) != sample_seed(12, 3, 4)  # the integers are kept apart, not joined
    assert generator(1, 5).integers(2**62) == generator(1, 5).integers(2**62) != generator(2, 5).integers(2**62)
