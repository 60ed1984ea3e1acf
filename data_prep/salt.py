"""Ids of patients, lesions and videos as salted hashes: equal ids stay equal, and nobody finds them by guessing."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from data_prep.errors import InputError
from data_prep.files import lock, write_atomically


def salt_of_environment() -> str | None:
    """DERMVLP_SALT, None where it is not set. Raises InputError where it is empty."""
    salt = os.environ.get("DERMVLP_SALT")
    if salt is not None and not salt.strip():
        raise InputError("DERMVLP_SALT: set but empty, so group ids could be guessed; unset it or give a secret")
    return salt


def make_salt(work_dir: Path) -> str:
    """DERMVLP_SALT, or a secret made once. Raises InputError where it is not the one that the folder was made with."""
    salt = salt_of_environment()
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "salt"
    with lock(work_dir / ".salt.lock", "another job that makes the salt", wait_s=60):  # arrays start together
        if salt is None:
            if not path.exists():
                write_atomically(path, secrets.token_hex(16).encode())
                path.chmod(0o600)
            salt = path.read_text(encoding="utf-8")
        _check(work_dir, salt)
    return salt


def _check(work_dir: Path, salt: str) -> None:
    """Raises InputError where the folder was made with another salt: every patient would get another name."""
    path = work_dir / "salt.check"
    expected = hashlib.blake2b(b"check", key=salt.encode()[:64], digest_size=16).hexdigest()
    if not path.exists():
        write_atomically(path, expected.encode())
    elif path.read_text(encoding="utf-8") != expected:
        raise InputError(
            f"{work_dir}: made with another salt; export the DERMVLP_SALT that it was made with (or unset it, if it "
            "was made without), or give another out_dir"
        )


def hash_name(name: str, salt: str) -> int:
    """64 bits that name an image, whose own name can hold a record number."""
    return int.from_bytes(hashlib.blake2b(name.encode(), key=salt.encode()[:64], digest_size=8).digest(), "little")


def hash_group(dataset: str, group: str, salt: str) -> str:
    """16 hexadecimal digits that name a patient, lesion or video, and that nobody can find by hashing guesses."""
    return hashlib.blake2b(f"{dataset}/{group}".encode(), key=salt.encode()[:64], digest_size=8).hexdigest()
