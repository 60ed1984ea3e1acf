"""Reader processes do not outlive their rank, and a signal that asks the run to save does not end them first.

srun, scancel and a terminal send signals to every process of a job: the readers must go on while the rank saves.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import torch

_OF_THE_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that are started meanwhile hold these signals back, from their first instruction on."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RANK)
    try:
        resource_tracker.ensure_running()  # its start unblocks two of them
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RANK)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def begin_worker(worker: int) -> None:
    """In the reader process: one thread, and an end when the rank is gone, or asks for it by SIGTERM."""
    torch.set_num_threads(1)
    rank = multiprocessing.parent_process()
    assert rank is not None and rank.pid is not None

    def watch(rank_pid: int) -> None:
        while rank.is_alive():
            taken = signal.sigtimedwait(_OF_THE_RANK, 1.0)
            if taken is not None and taken.si_signo == signal.SIGTERM and taken.si_pid == rank_pid:
                break
        os._exit(1)

    threading.Thread(target=watch, args=(rank.pid,), daemon=True).start()
