"""What ranks tell each other at a step's boundary: sent on the CPU while the device works, read a step later."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_prep.errors import InputError
from pretrain.distributed import comm


class SharedInputError(InputError):
    """Raised on all ranks at the same place, with the same message: rank 0 says it for all."""


@dataclass(frozen=True)
class Agreed:
    """Sums over the ranks."""

    num_stop: int = 0  # ranks that received a signal
    num_save: int = 0  # rank 0, when its clock says so
    num_damaged: int = 0  # images of the upcoming batch that could not be decoded


class Agreement:
    """One small all_reduce a step, on the CPU's own process group: it never waits for the device."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._work: comm.Work | None = None

    def start(self, stop: bool, save: bool, num_damaged: int) -> None:
        self._counts = torch.tensor([int(stop), int(save), num_damaged], dtype=torch.int64)
        self._work = comm.start_cpu_sum_(self._counts)

    def read(self) -> Agreed:
        """Waits for the slowest rank to have come to its last boundary."""
        assert self._counts is not None
        if self._work is not None:
            self._work.wait()
        return Agreed(*self._counts.tolist())
