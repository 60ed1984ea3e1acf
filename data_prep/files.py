"""Files that are whole or absent, locks, and what a full disk says."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from data_prep.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"
_STALE_S = 86_400.0


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedRandom]:
    """A file to write that gets its name when it is whole and on disk, also after a power cut; else it is removed.

    Two processes that write the same file at once do not disturb each other: the later one's bytes stay.
    """
    partial = path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_stale_partials(directory: Path) -> None:
    """Files that killed processes left unfinished: of this machine, or a day old."""
    for path in directory.rglob("*.partial"):
        *_, host, pid, _, _ = ["", "", *path.name.split(".")]
        try:
            is_dead = host == _HOST and pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").is_dir()
            if is_dead or time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
        except FileNotFoundError:
            continue


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
def disk_errors(directory: Path) -> Iterator[None]:
    """A full disk, a quota, or a folder that cannot be written, as a message with the remedy; what was finished before
    is kept."""
    try:
        yield
    except OSError as error:
        place = error.filename or directory
        if error.errno in _FULL:
            raise InputError(
                f"{directory}: {error.strerror}; make room and run the same command again: it goes on where it stopped"
            ) from None
        if error.errno in _NOT_WRITABLE:
            raise InputError(f"{place}: {error.strerror}; correct the path or its permissions and run again") from None
        raise
