"""What it costs to plan the order of a hundred million samples: `python -m benchmarks.plan`.

Shards of 500 to 1,500 samples (there are none: the order needs their sizes alone), 16 to a block, one rank of a run
with global batches of 32,768. In a process of its own it asks for the positions of every global batch of an epoch, one
after the other, as a rank's reader does (any rank's: each plans for all), and for the epoch's digest; then, anew, for a
batch in the middle, as a resumed run does. Memory is the process's peak, Python and numpy included.

The last line is one JSON object: seconds_100m of the whole epoch, gb_100m.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from pretrain.data.plan import SampleOrder

GLOBAL_BATCH_SIZE = 32_768
SHARDS_PER_BLOCK = 16
BARS = {"seconds_100m": 60.0, "gb_100m": 4.0}


def shard_sizes(num_samples: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Random sizes, a thousand on the mean, that add up to `num_samples`."""
    sizes = np.random.default_rng(0).integers(500, 1501, size=num_samples // 1000)
    sizes[-1] += num_samples - sizes.sum()  # of a hundred million, a thousandth of them
    return np.abs(sizes)


def measure(num_samples: int) -> dict[str, float]:
    """In this process; its memory must not have been higher before."""
    sizes = shard_sizes(num_samples)
    began_at = time.perf_counter()
    order = SampleOrder(sizes, seed=0, shards_per_block=SHARDS_PER_BLOCK)
    order.digest(epoch=3)
    starts = range(0, order.num_samples - GLOBAL_BATCH_SIZE + 1, GLOBAL_BATCH_SIZE)
    total = sum(int(order.slice(3, start, start + GLOBAL_BATCH_SIZE).sum()) for start in starts)
    whole_s = time.perf_counter() - began_at
    assert total > 0
    began_at = time.perf_counter()
    order = SampleOrder(sizes, seed=0, shards_per_block=SHARDS_PER_BLOCK)
    middle = starts[len(starts) // 2]
    order.slice(3, middle, middle + GLOBAL_BATCH_SIZE)
    resumed_s = time.perf_counter() - began_at
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"whole_s": whole_s, "resumed_s": resumed_s, "peak_gb": peak_gb, "num_batches": len(starts)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--here", action="store_true", help="measure in this process, and print the raw figures")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.samples)))
        return
    command = [sys.executable, "-m", "benchmarks.plan", "--here", "--samples", str(arguments.samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{arguments.samples:,} samples, {figures['num_batches']:,} global batches of {GLOBAL_BATCH_SIZE:,}")
    print(f"a whole epoch, batch by batch   {figures['whole_s']:8.2f} s    bar <= {BARS['seconds_100m']:g}")
    print(f"one batch in the middle, anew   {figures['resumed_s']:8.4f} s")
    print(f"peak memory of the process      {figures['peak_gb']:8.3f} GB   bar <= {BARS['gb_100m']:g}")
    print(json.dumps({"seconds_100m": round(figures["whole_s"], 2), "gb_100m": round(figures["peak_gb"], 3)}))


if __name__ == "__main__":
    main()
