"""What ranks tell each other at a step's boundary arrives whole, and in order, beside the engine's own collectives."""

from __future__ import annotations

import torch

from pretrain.distributed import comm
from pretrain.train.agreement import Agreed, Agreement
from tests.distributed.run import run_on_ranks


def boundaries() -> list[list[int]]:
    """Rank 1 is signalled at the third boundary, rank 0's clock says save at the second; both have damaged images."""
    agreement, seen = Agreement(), []
    rank = comm.rank()
    for boundary in range(4):
        agreement.start(stop=rank == 1 and boundary >= 2, save=rank == 0 and boundary == 1, num_damaged=rank * boundary)
        comm.sum_over_ranks(torch.ones(3))  # a step's own collective meanwhile
        agreed = agreement.read()
        seen.append([agreed.num_stop, agreed.num_save, agreed.num_damaged])
    return seen


def test_two_ranks_see_the_same_sums_at_the_same_boundary() -> None:
    expected = [[0, 0, 0], [0, 1, 1], [1, 0, 2], [1, 0, 3]]
    assert run_on_ranks(boundaries, 2) == [expected, expected]


def test_one_process_tells_itself() -> None:
    agreement = Agreement()
    agreement.start(stop=True, save=False, num_damaged=2)
    assert agreement.read() == Agreed(num_stop=1, num_save=0, num_damaged=2)
