"""What a rank and the `dermvlp train` that started it tell each other, by files in a folder of the launcher's.

3.pid       written by rank 3 before anything else: whom signals are forwarded to
3.status    its exit status
"""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.train.signals import REQUEUE_STATUS

FOLDER_VARIABLE, LAUNCHER_VARIABLE = "DERMVLP_LAUNCH_DIR", "DERMVLP_LAUNCHER_PID"


def register() -> None:
    """In a rank. Signals are held back already, or one that is forwarded would end it."""
    _write("pid", os.getpid())


def report(status: int) -> int:
    """In a rank, at its end. Returns the status to exit with.

    To torch's launcher a rank that saved because it was asked to has succeeded: for one that has not, it ends the
    others while they save.
    """
    return 0 if _write("status", status) and status == REQUEUE_STATUS else status


def _write(kind: str, value: int) -> bool:
    if FOLDER_VARIABLE not in os.environ:
        return False
    path = Path(os.environ[FOLDER_VARIABLE]) / f"{os.environ['RANK']}.{kind}"
    try:
        path.with_suffix(".partial").write_text(str(value), encoding="ascii")
        path.with_suffix(".partial").rename(path)
    except OSError:  # a full disk: the status itself tells enough
        return False
    return True


def pids(folder: Path) -> dict[int, int]:
    """By rank, of those that have registered."""
    return {int(path.stem): int(path.read_text(encoding="ascii")) for path in folder.glob("*.pid")}


def statuses(folder: Path) -> dict[int, int]:
    """By rank, of those that came to their end by themselves."""
    return {int(path.stem): int(path.read_text(encoding="ascii")) for path in folder.glob("*.status")}
