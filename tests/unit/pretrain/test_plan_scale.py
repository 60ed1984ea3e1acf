"""The order of very many samples: a slice is the whole order's slice, costs a block, and says so in numbers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.plan import ORDER_DOMAIN, SampleOrder, epoch_order, generator
from tests.unit.pretrain.test_plan import order_digest

ROOT = Path(__file__).parents[3]
SIZES = np.array([7, 1, 12, 5, 9, 9, 3, 20, 2, 11])  # 79


@pytest.mark.parametrize("shards_per_block", [1, 3, 4, 99])
@pytest.mark.parametrize("batch", [1, 8, 30, 79])
def test_slices_in_any_order_are_the_whole(shards_per_block: int, batch: int) -> None:
    whole = epoch_order(SIZES, 3, 2, shards_per_block)
    order = SampleOrder(SIZES, 3, shards_per_block)
    starts = np.random.default_rng(0).permutation(np.arange(0, 79, batch))
    for start in starts.tolist():
        stop = min(start + batch, 79)
        assert np.array_equal(order.slice(2, start, stop), whole[start:stop])
        order.slice(3, start, stop)  # another epoch between does not disturb it
    assert np.array_equal(pickle.loads(pickle.dumps(order)).slice(2, 5, 60), whole[5:60])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 80), (5, 5), (6, 5)])
def test_a_range_outside_the_epoch_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"{start}:{stop} is no range of the 79 samples"):
        SampleOrder(SIZES, 3, 4).slice(0, start, stop)


def test_blocks_are_permuted_apart() -> None:
    """Blocks of equal size do not repeat one another's permutation, nor that of another epoch or seed."""
    sizes = np.full(8, 6)
    order = np.concatenate([SampleOrder(sizes, seed, 1).slice(e, 0, 48) for seed in (0, 1) for e in (0, 1)])
    within = {tuple(block % 6) for block in order.reshape(-1, 6)}
    assert len(within) >= 30  # of 32; two of 720 permutations can meet by chance


def test_data_of_one_block_keep_the_order_of_earlier_runs() -> None:
    """As it was when all blocks shared one stream. Larger data have another order since then."""
    assert order_digest(epoch_order(SIZES, 0, 0, 16)) == "a2f92de25125"
    assert order_digest(epoch_order(np.full(16, 1000), 17, 3, 16)) == "7af844344910"
    assert np.array_equal(SampleOrder(np.full(40, 50), 5, 16).slice(0, 0, 800), first_block_of_old(np.full(40, 50), 5))


def first_block_of_old(sizes: np.ndarray, seed: int) -> np.ndarray:
    random = generator(ORDER_DOMAIN, seed, 0)
    starts = np.cumsum(sizes) - sizes
    shards = random.permutation(len(sizes))[:16]
    return random.permutation(np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in shards]))


def test_the_digest_names_what_decides_the_order() -> None:
    key = (SIZES, 3, 4)
    others = [(SIZES, 4, 4), (SIZES, 3, 5), (SIZES[::-1].copy(), 3, 4), (np.append(SIZES, 1), 3, 4)]
    digests = [SampleOrder(*other).digest(2) for other in [key, *others]] + [SampleOrder(*key).digest(1)]
    assert len(set(digests)) == 6 and all(len(digest) == 12 for digest in digests)
    assert SampleOrder(*key).digest(2) == digests[0]


def test_a_slice_of_a_hundred_million_samples_costs_a_block() -> None:
    """In a process of its own: the last batch of an epoch, and the digest, under a second and 100 MB beyond numpy."""
    code = (
        "import resource, time, numpy as np\n"
        "from pretrain.data.plan import SampleOrder\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.perf_counter()\n"
        "order = SampleOrder(np.full(100_000, 1000), 0, 16)\n"
        "last = order.slice(7, 100_000_000 - 32_768, 100_000_000); order.digest(7)\n"
        "seconds = time.perf_counter() - start\n"
        "extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(len(np.unique(last)), seconds, extra / 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    num_distinct, seconds, extra_mb = (float(value) for value in done.stdout.split())
    assert num_distinct == 32_768 and seconds < 1.0 and extra_mb < 100


def test_the_benchmark_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.plan", "--samples", "2000000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"seconds_100m", "gb_100m"} and 0 < result["seconds_100m"] < 60 and 0 < result["gb_100m"] < 4
