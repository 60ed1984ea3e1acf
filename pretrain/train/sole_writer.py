"""One run has one writer: two jobs on one run_dir would tear each other's checkpoints and metrics."""

from __future__ import annotations

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_prep.errors import InputError
from data_prep.files import lock
from pretrain.distributed import comm
from pretrain.train.agreement import SharedInputError

_WAIT_S = 30.0  # for what is left of a killed attempt to be gone


@contextmanager
def sole_writer(run_dir: Path) -> Iterator[None]:
    """Rank 0 holds a lock on the run, for all ranks. Raises SharedInputError where another job writes to it.

    A killed process lets go. On a file system without such locks it warns and goes on: a lock that is a mere file would
    outlive a killed job, and keep the next attempt from another node out.
    """
    problem = ""
    with ExitStack() as until_the_end:
        if comm.rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            if _has_locks(run_dir / ".lock"):
                try:
                    until_the_end.enter_context(lock(run_dir / ".lock", "a run of this run_dir", wait_s=_WAIT_S))
                except InputError as error:
                    problem = str(error)
            else:
                print(f"warning: {run_dir}: no locks on this file system; see that one job alone runs", file=sys.stderr)
        if problem := comm.from_rank_0(problem):
            raise SharedInputError(problem)
        yield


def _has_locks(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
    return True
