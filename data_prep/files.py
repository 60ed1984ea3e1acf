"""Files that are whole or absent, locks, and what a full disk says."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from data_prep.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedRandom]:
    """A file to write that gets its name when it is whole and on disk, also after a power cut; else it is removed.

    Two processes that write the same file at once do not disturb each other: the later one's bytes stay.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Either the old file or the whole new one."""
    with atomic(path) as file:
        file.write(content)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: Path, what: str, wait_s: float = 0) -> Iterator[None]:
    """Raises InputError where another process holds it for longer. A killed process lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path, timeout=wait_s)
    try:
        held.acquire()
    except filelock.Timeout:
        raise InputError(f"{path.parent}: {what} is running already; wait for it, or end it, and run again") from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def full_disk_is_input_error(directory: Path) -> Iterator[None]:
    """A full disk or quota as a message with the remedy; what was finished before is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InputError(
            f"{directory}: {error.strerror}; make room and run the same command again: it goes on where it stopped"
        ) from None
