"""What the model was asked and what it answered: one SQLite file, every answer committed when it arrives.

A killed run loses at most the calls in flight; the next one asks only for what is missing. Captions themselves and
the API key are not stored. The file uses a write-ahead log, which needs a file system of one machine (several
processes may read it; on Lustre or NFS keep it on a node's own disk and copy it).
"""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from data_prep.errors import InputError
from data_prep.schema import text_hash

_VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    request_key   TEXT PRIMARY KEY,   -- of model, prompt and caption
    model         TEXT NOT NULL,
    prompt_hash   TEXT NOT NULL,
    caption_hash  TEXT NOT NULL,      -- hexadecimal data_prep.schema.text_hash
    status        TEXT NOT NULL CHECK (status IN ('answered', 'failed', 'unanswered')),
    raw           TEXT,               -- the answer as it came, usable or not
    finish_reason TEXT,
    num_tokens_in INTEGER,            -- of all attempts together
    num_tokens_out INTEGER,
    num_attempts  INTEGER NOT NULL,
    failure       TEXT,
    recorded_at   TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) WITHOUT ROWID
"""

#: answered: usable. failed: the model answered, and the answer cannot be used. unanswered: no answer came.
Status = Literal["answered", "failed", "unanswered"]


@dataclass(frozen=True)
class Answer:
    status: Status
    raw: str | None = None
    finish_reason: str | None = None
    num_tokens_in: int = 0
    num_tokens_out: int = 0
    num_attempts: int = 1
    failure: str | None = None


def request_key(model: str, prompt_hash: str, caption: str) -> str:
    """Hexadecimal SHA-256 of what determines an answer."""
    return hashlib.sha256("\x00".join((model, prompt_hash, caption)).encode()).hexdigest()


class Ledger:
    """The answers to one model and prompt. Raises InputError when the file is not a ledger of this version."""

    def __init__(self, path: Path, model: str, prompt_hash: str) -> None:
        self.path, self.model, self.prompt_hash = path, model, prompt_hash
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
            if version == 0 and not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute(_TABLE)
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")
                version = _VERSION
            # enough against a killed process; a power failure may cost the last answers, not the file
            self._connection.execute("PRAGMA synchronous = NORMAL")
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"{path}: cannot be used as ledger of answers: {error}; move it away or repair it"
            ) from None
        if version != _VERSION:
            raise InputError(f"{path}: not a ledger of version {_VERSION} (found {version}); move it away to ask again")

    def get(self, caption: str) -> Answer | None:
        row = self._connection.execute(
            "SELECT status, raw, finish_reason, num_tokens_in, num_tokens_out, num_attempts, failure "
            "FROM answers WHERE request_key = ?",
            (request_key(self.model, self.prompt_hash, caption),),
        ).fetchone()
        return None if row is None else Answer(*row)

    def put(self, caption: str, answer: Answer) -> None:
        """Committed on return; replaces what was there for the same caption."""
        self._connection.execute(
            "INSERT OR REPLACE INTO answers (request_key, model, prompt_hash, caption_hash, status, raw, finish_reason,"
            " num_tokens_in, num_tokens_out, num_attempts, failure) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                request_key(self.model, self.prompt_hash, caption),
                self.model,
                self.prompt_hash,
                f"{text_hash(caption):016x}",
                answer.status,
                answer.raw,
                answer.finish_reason,
                answer.num_tokens_in,
                answer.num_tokens_out,
                answer.num_attempts,
                answer.failure,
            ),
        )

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
