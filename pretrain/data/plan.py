"""The sample order as a pure function of (seed, epoch, manifest).

Nothing about the order is ever saved: a resumed run, another number of reader processes and another number of
ranks all see the same global batches. Nor is an epoch's order ever held whole: a batch asks for its own slice, and only
the blocks that the slice touches are permuted, so a hundred million samples cost no more memory than a block.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: domains keep the random streams of different uses apart
ORDER_DOMAIN, SAMPLE_DOMAIN, MASK_DOMAIN, STEP_DOMAIN, REPLACEMENT_DOMAIN = 1, 2, 3, 4, 5
STREAM_DOMAIN, BUFFER_DOMAIN = 6, 7  # of the streaming mode


def generator(*key: int) -> np.random.Generator:
    """A random stream that depends on the integers alone, the same on every machine (Philox, counter based)."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(*key), "little")))


def _digest(*key: int) -> bytes:
    return hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16).digest()


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """63-bit seed of one sample's augmentation and mask in one epoch."""
    # the digest itself: a generator made for one number takes ten times as long, once an image
    return int.from_bytes(_digest(SAMPLE_DOMAIN, seed, epoch, sample)[:8], "little") >> 1


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """63-bit seed of what a rank draws in one step, or in one part of it (dropout)."""
    return int(generator(STEP_DOMAIN, seed, step, rank, part).integers(2**63))


class SampleOrder:
    """The order of every epoch: permutations of the positions in the index, computed a block at a time.

    Two levels: shards are permuted and cut into blocks, then samples are permuted within a block, so that a batch
    touches few shards and reads stay near each other on a shared file system. A block's permutation depends on
    (seed, epoch, block) alone; the first block goes on with the stream that permuted the shards.
    """

    def __init__(self, shard_sizes: NDArray[np.int64], seed: int, shards_per_block: int) -> None:
        self.seed, self.shards_per_block = seed, shards_per_block
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self._open_caches()

    def _open_caches(self) -> None:
        self._shard_starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._epoch = lru_cache(2)(self._permute_shards)
        # batches come in order, and a batch ends in the block that the next one begins in
        self._block = lru_cache(2)(self._permute_block)

    def __getstate__(self) -> dict[str, Any]:
        names = ("seed", "shards_per_block", "shard_sizes", "num_samples")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_caches()

    def slice(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) int64: the positions in the index of this range of the epoch's order.

        Raises ValueError for a range that is not within the epoch.
        """
        if not 0 <= start < stop <= self.num_samples:
            raise ValueError(f"{start}:{stop} is no range of the {self.num_samples} samples of an epoch")
        _, block_ends = self._epoch(epoch)
        first, last = np.searchsorted(block_ends, [start, stop - 1], side="right").tolist()
        begins_at = int(block_ends[first - 1]) if first else 0
        touched = np.concatenate([self._block(epoch, block) for block in range(first, last + 1)])
        return touched[start - begins_at : stop - begins_at]

    def digest(self, epoch: int) -> str:
        """Twelve hex digits that name the epoch's order, for the log, without computing it.

        Of what decides it (seed, epoch, block size, the shards' sizes in their order) and of the first block as it came
        out, which a random generator that behaves otherwise would change.
        """
        shards, _ = self._epoch(epoch)
        digest = hashlib.blake2b(f"{self.seed},{epoch},{self.shards_per_block}".encode(), digest_size=6)
        for array in (shards, self.shard_sizes[shards], self._block(epoch, 0)):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def _permute_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the shards in their order, where each block ends in the epoch's order)."""
        shards = generator(ORDER_DOMAIN, self.seed, epoch).permutation(len(self.shard_sizes))
        ends = np.cumsum(self.shard_sizes[shards])
        last_of_block = np.arange(self.shards_per_block, len(shards) + self.shards_per_block, self.shards_per_block)
        return shards, ends[np.minimum(last_of_block, len(shards)) - 1]

    def _permute_block(self, epoch: int, block: int) -> NDArray[np.int64]:
        shards, _ = self._epoch(epoch)
        members = shards[block * self.shards_per_block : (block + 1) * self.shards_per_block]
        starts, sizes = self._shard_starts[members], self.shard_sizes[members]
        positions = np.concatenate([np.arange(s, s + n, dtype=np.int64) for s, n in zip(starts, sizes, strict=True)])
        if block == 0:
            random = generator(ORDER_DOMAIN, self.seed, epoch)
            random.permutation(len(shards))  # the stream stands where the shards' permutation left it
        else:
            random = generator(ORDER_DOMAIN, self.seed, epoch, block)
        return random.permutation(positions)


def epoch_order(shard_sizes: NDArray[np.int64], seed: int, epoch: int, shards_per_block: int) -> NDArray[np.int64]:
    """(num_samples,) int64: the whole order of an epoch, for data that is small enough to hold it."""
    order = SampleOrder(shard_sizes, seed, shards_per_block)
    return order.slice(epoch, 0, order.num_samples)


def order_digest(order: NDArray[np.int64]) -> str:
    """Twelve hex digits that name an epoch's whole order, for the log."""
    return hashlib.blake2b(np.ascontiguousarray(order, dtype="<i8").tobytes(), digest_size=6).hexdigest()


def stream_shard_order(num_shards: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(num_shards,) int64: the order in which the streaming mode deals shards to its readers in one epoch."""
    return generator(STREAM_DOMAIN, seed, epoch).permutation(num_shards)


def buffer_seed(seed: int, epoch: int, rank: int, worker: int) -> int:
    """63-bit seed of one reader's shuffle buffer in one epoch of the streaming mode."""
    return int(generator(BUFFER_DOMAIN, seed, epoch, rank, worker).integers(2**63))
