"""Memory that reader processes decode into and the trainer reads from, used again when a batch is gone.

A fresh piece of shared memory for every batch costs the kernel more than a quarter of the time to decode it: a fault
for each of its pages, twice, and its removal.
"""

from __future__ import annotations

import math
import secrets
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


@dataclass(frozen=True)
class Slot:
    """Where the images of a batch lie: what a reader process sends in their place."""

    buffers: str
    number: int


class Buffers:
    """`num_workers` x `slots_per_worker` pieces for tensors of one shape; pages that were never used cost nothing."""

    def __init__(self, num_workers: int, slots_per_worker: int, shape: tuple[int, ...]) -> None:
        self.name = secrets.token_hex(8)
        self.shape, self.slots_per_worker = shape, slots_per_worker
        num_slots = num_workers * slots_per_worker
        self._bytes = _shared(num_slots, *shape)
        self._taken = _shared(num_slots).zero_()  # set by the reader, cleared by us
        _by_name[self.name] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        _by_name[self.name] = self

    def take(self) -> tuple[Slot, Tensor] | None:
        """In a reader process: a free slot and its memory; None where the trainer still holds all of this process's."""
        worker = get_worker_info()
        if worker is None:
            return None
        first = worker.id * self.slots_per_worker
        for number in range(first, first + self.slots_per_worker):
            if not self._taken[number]:
                self._taken[number] = 1
                return Slot(self.name, number), self._bytes[number]
        return None

    def deliver(self, number: int) -> Tensor:
        """In the trainer's process: the tensor in a slot, which is free again when nothing refers to its memory."""
        image_BCHW: np.ndarray[Any, Any] = self._bytes[number].numpy()
        weakref.finalize(image_BCHW, self._free, number).atexit = False
        return torch.from_numpy(image_BCHW)  # its storage, and so every view of it, keeps the array

    def _free(self, number: int) -> None:
        self._taken[number] = 0


def _shared(*shape: int) -> Tensor:
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]  # share_memory_() writes it
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


#: of this process; the data set that the reader reads holds them
_by_name: weakref.WeakValueDictionary[str, Buffers] = weakref.WeakValueDictionary()


def delivered(slot: Slot) -> Tensor:
    return _by_name[slot.buffers].deliver(slot.number)
