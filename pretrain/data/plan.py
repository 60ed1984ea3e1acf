"""The sample order as a pure function of (seed, epoch, manifest).

Nothing about the order is ever saved: a resumed run, another number of reader processes and another number of
ranks all see the same global batches.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

#: domains keep the random streams of different uses apart
ORDER_DOMAIN, SAMPLE_DOMAIN, MASK_DOMAIN, STEP_DOMAIN = 1, 2, 3, 4


def generator(*key: int) -> np.random.Generator:
    """A random stream that depends on the integers alone, the same on every machine (Philox, counter based)."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """63-bit seed of one sample's augmentation and mask in one epoch."""
    return int(generator(SAMPLE_DOMAIN, seed, epoch, sample).integers(2**63))


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """63-bit seed of what a rank draws in one step, or in one part of it (dropout)."""
    return int(generator(STEP_DOMAIN, seed, step, rank, part).integers(2**63))


def epoch_order(shard_sizes: NDArray[np.int64], seed: int, epoch: int, shards_per_block: int) -> NDArray[np.int64]:
    """(num_samples,) int64: the positions in the index, in the order of the epoch.

    Two levels: shards are permuted and cut into blocks, then samples are permuted within a block, so that a batch
    touches few shards and reads stay near each other on a shared file system.
    """
    random = generator(ORDER_DOMAIN, seed, epoch)
    starts = np.concatenate([[0], np.cumsum(shard_sizes)[:-1]])
    shards = random.permutation(len(shard_sizes))
    blocks = []
    for first in range(0, len(shards), shards_per_block):
        members = shards[first : first + shards_per_block]
        block = np.concatenate([np.arange(starts[s], starts[s] + shard_sizes[s], dtype=np.int64) for s in members])
        blocks.append(random.permutation(block))
    return np.concatenate(blocks)


def order_digest(order: NDArray[np.int64]) -> str:
    """Twelve hex digits that name an epoch's order, for the log."""
    return hashlib.blake2b(np.ascontiguousarray(order, dtype="<i8").tobytes(), digest_size=6).hexdigest()
