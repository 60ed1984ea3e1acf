"""Ids of patients, lesions and videos as salted hashes: equal ids stay equal, and nobody finds them by guessing."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import filelock

from data_prep.errors import InputError
from data_prep.files import write_atomically


def make_salt(work_dir: Path) -> str:
    """Keeps patient ids from being found by hashing guesses: DERMVLP_SALT, or a secret made once."""
    if (salt := os.environ.get("DERMVLP_SALT")) is not None:
        if not salt.strip():
            raise InputError("DERMVLP_SALT: set but empty, so group ids could be guessed; unset it or give a secret")
        return salt
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "salt"
    with filelock.FileLock(work_dir / ".salt.lock", timeout=60):  # jobs of an array start together
        if not path.exists():
            write_atomically(path, secrets.token_hex(16).encode())
            path.chmod(0o600)
    return path.read_text(encoding="utf-8")


def hash_group(dataset: str, group: str, salt: str) -> str:
    """16 hexadecimal digits that name a patient, lesion or video, and that nobody can find by hashing guesses."""
    return hashlib.blake2b(f"{dataset}/{group}".encode(), key=salt.encode()[:64], digest_size=8).hexdigest()
