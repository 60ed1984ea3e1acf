"""Runs a function on W gloo ranks, each a real process, and returns what each returned."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.distributed import comm


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 600.0) -> list[Any]:
    """`function(*arguments)` with a process group; its results (torch.save-able) in the order of the ranks.

    Raises TimeoutError, after ending the ranks, when they take longer: two ranks that wait for each other's
    different collectives wait for ever.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _worker, (function, world_size, folder, arguments), world_size, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + timeout_s
        while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{world_size} ranks are not done with {function.__name__} after {timeout_s:.0f} s")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _worker(rank: int, function: Callable[..., Any], world_size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size
    )
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    comm.end_process(0)  # an error is reported by the interpreter's way out
