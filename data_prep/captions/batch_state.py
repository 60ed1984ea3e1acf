"""What became of each file of requests: one SQLite file beside them, so that a kill between two steps loses nothing.

Held by one process at a time. A request is `pending` from the moment its file is written until its answer, or the
certainty that there is none, is in the ledger of answers; a pending request is never written a second time.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from data_prep.captions.tasks import Task
from data_prep.errors import InputError
from data_prep.files import lock

_FILE_NAME = "batches.sqlite"
_VERSION = 2
_TABLES = """
CREATE TABLE run (           -- one row: which questions this folder holds
    id          TEXT NOT NULL,   -- random; finds our batches among those of the account
    task        TEXT NOT NULL,
    model       TEXT NOT NULL,
    prompt_hash TEXT NOT NULL,
    started_s   INTEGER NOT NULL,
    server_said TEXT             -- the words of its last error: they may quote a question, so they are shown nowhere
);
CREATE TABLE files (
    number         INTEGER PRIMARY KEY,
    state          TEXT NOT NULL,
    sha256         TEXT NOT NULL,
    num_bytes      INTEGER NOT NULL,
    num_requests   INTEGER NOT NULL,
    max_tokens_in  INTEGER NOT NULL,            -- the most they can take, and have taken so far
    max_tokens_out INTEGER NOT NULL,
    num_tokens_in  INTEGER NOT NULL DEFAULT 0,
    num_tokens_out INTEGER NOT NULL DEFAULT 0,
    upload_begun   INTEGER NOT NULL DEFAULT 0,  -- 1: the server may have it, whether or not we know its id
    create_begun   INTEGER NOT NULL DEFAULT 0,
    file_id        TEXT,                        -- the server's names
    batch_id       TEXT,
    output_file_id TEXT,
    error_file_id  TEXT,
    server_status  TEXT,
    num_refusals   INTEGER NOT NULL DEFAULT 0,  -- for too many tokens in the queue, since a batch last ended
    failure        TEXT,                        -- fixed phrases
    server_said    TEXT                         -- of the file it refused: may quote a question
);
CREATE TABLE pending (
    request_key  TEXT PRIMARY KEY,
    file         INTEGER NOT NULL REFERENCES files,
    num_attempts INTEGER NOT NULL,              -- that the ledger held unusable answers to, when this was written
    num_bytes_in INTEGER NOT NULL               -- of the question's text
) WITHOUT ROWID;
CREATE INDEX pending_by_file ON pending (file);
CREATE TABLE found (                            -- where in the result files each request's line is; of one collection
    request_key TEXT PRIMARY KEY,
    path        INTEGER NOT NULL,
    offset      INTEGER NOT NULL,
    failure     TEXT,                           -- fixed phrases; NULL: an answer of the model
    server_said TEXT                            -- instead of an answer: may quote the question
) WITHOUT ROWID;
"""

#: written: not at the server as a batch. submitted: it is, and has not ended. refused: the server found fault with the
#: file. ended: there are results to be had, perhaps none. collected: nothing of it is pending.
FileState = Literal["written", "submitted", "refused", "ended", "collected"]

_COLUMNS = (
    *("number", "state", "sha256", "num_bytes", "num_requests", "max_tokens_in", "max_tokens_out"),
    *("num_tokens_in", "num_tokens_out", "upload_begun", "create_begun", "file_id", "batch_id", "output_file_id"),
    *("error_file_id", "server_status", "num_refusals", "failure", "server_said"),
)


@dataclass(frozen=True)
class BatchFile:
    """A row of `files`."""

    number: int
    state: FileState
    sha256: str
    num_bytes: int
    num_requests: int
    max_tokens_in: int
    max_tokens_out: int
    num_tokens_in: int = 0
    num_tokens_out: int = 0
    upload_begun: int = 0
    create_begun: int = 0
    file_id: str | None = None
    batch_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    server_status: str | None = None
    num_refusals: int = 0
    failure: str | None = None
    server_said: str | None = None

    @property
    def name(self) -> str:
        return f"requests-{self.number:03d}.jsonl"


@dataclass(frozen=True)
class Pending:
    file: int
    num_attempts: int
    num_bytes_in: int


class BatchState:
    """The state of one folder, locked. Raises InputError when it is in use, or holds another task's requests."""

    def __init__(self, folder: Path, task: Task[Any], *, create: bool = False) -> None:
        self.folder = folder
        path = folder / _FILE_NAME
        if not create and not path.is_file():
            raise InputError(f"{folder}: holds no batches; write them first")
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            held.enter_context(lock(Path(f"{path}.lock"), "a command that works on these batches"))
            try:
                self._connection = sqlite3.connect(path, isolation_level=None)
                held.callback(self._connection.close)
                self._open(path, task)
            except sqlite3.Error as error:
                raise InputError(f"{path}: cannot be used as state of batches: {error}") from None
            self._held = held.pop_all()

    def _open(self, path: Path, task: Task[Any]) -> None:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        ours = (task.name, task.options.model, task.prompt_hash)
        if version == 0 and not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            run = (secrets.token_hex(8), *ours, int(time.time()))
            with self.transaction():
                for statement in _TABLES.split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute("INSERT INTO run VALUES (?, ?, ?, ?, ?, NULL)", run)
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise InputError(f"{path}: not a state of batches of version {_VERSION} (found {version})")
        self.run_id, *found, self.started_s, _ = self._connection.execute("SELECT * FROM run").fetchone()
        if tuple(found) != ours:
            raise InputError(
                f"{self.folder}: holds requests of task {found[0]!r} to model {found[1]!r} with prompt "
                f"{found[2][:12]}, not of {ours[0]!r} to {ours[1]!r} with {ours[2][:12]}; give another folder"
            )

    def transaction(self) -> _Transaction:
        return _Transaction(self._connection)

    def path(self, file: BatchFile, kind: Literal["requests", "output", "errors"] = "requests") -> Path:
        return self.folder / f"{kind}-{file.number:03d}.jsonl"

    # ------------------------------------------------------------------------------------------ files

    def files(self, *states: FileState) -> list[BatchFile]:
        """In the order of their numbers; without arguments all of them."""
        rows = self._connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM files ORDER BY number")
        return [file for file in (BatchFile(*row) for row in rows) if not states or file.state in states]

    def next_number(self) -> int:
        """Numbers are given once: the server's metadata tells files apart by them."""
        return int(self._connection.execute("SELECT coalesce(max(number) + 1, 0) FROM files").fetchone()[0])

    def add(self, file: BatchFile) -> None:
        values = [getattr(file, name) for name in _COLUMNS]
        self._connection.execute(
            f"INSERT INTO files ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})", values
        )

    def update(self, number: int, **values: object) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        self._connection.execute(f"UPDATE files SET {columns} WHERE number = ?", (*values.values(), number))

    def add_tokens(self, number: int, num_in: int, num_out: int) -> None:
        self._connection.execute(
            "UPDATE files SET num_tokens_in = num_tokens_in + ?, num_tokens_out = num_tokens_out + ? WHERE number = ?",
            (num_in, num_out, number),
        )

    def keep_server_said(self, words: str) -> None:
        self._connection.execute("UPDATE run SET server_said = ?", (words,))

    def forget_refusals(self) -> None:
        """The queue has room again."""
        self._connection.execute("UPDATE files SET num_refusals = 0")

    # ------------------------------------------------------------------------------------------ requests

    def add_pending(self, key: str, pending: Pending) -> None:
        row = (key, pending.file, pending.num_attempts, pending.num_bytes_in)
        self._connection.execute("INSERT INTO pending VALUES (?, ?, ?, ?)", row)

    def pending(self, key: str) -> Pending | None:
        row = self._connection.execute(
            "SELECT file, num_attempts, num_bytes_in FROM pending WHERE request_key = ?", (key,)
        ).fetchone()
        return None if row is None else Pending(*row)

    def drop_pending(self, key: str) -> None:
        self._connection.execute("DELETE FROM pending WHERE request_key = ?", (key,))

    def num_pending(self, number: int | None = None) -> int:
        """Of one file, or of all."""
        where, values = ("", ()) if number is None else ("WHERE file = ?", (number,))
        return int(self._connection.execute(f"SELECT count(*) FROM pending {where}", values).fetchone()[0])

    # ------------------------------------------------------------------------------------------ results

    def clear_found(self) -> None:
        self._connection.execute("DELETE FROM found")

    def add_found(self, key: str, path: int, offset: int, failure: str | None, server_said: str | None) -> bool:
        """An answer takes the place of an error, else the first line counts. False: another line was there before."""
        cursor = self._connection.execute(
            "INSERT OR IGNORE INTO found VALUES (?, ?, ?, ?, ?)", (key, path, offset, failure, server_said)
        )
        if cursor.rowcount:
            return True
        if failure is None:
            self._connection.execute(
                "UPDATE found SET path = ?, offset = ?, failure = NULL WHERE request_key = ? AND failure IS NOT NULL",
                (path, offset, key),
            )
        return False

    def found(self, key: str) -> tuple[int, int] | None:
        """Position of an answer: (index of the file, offset in bytes)."""
        row: tuple[int, int] | None = self._connection.execute(
            "SELECT path, offset FROM found WHERE request_key = ? AND failure IS NULL", (key,)
        ).fetchone()
        return row

    def drop_found(self, key: str) -> None:
        self._connection.execute("DELETE FROM found WHERE request_key = ?", (key,))

    def num_answers_found(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM found WHERE failure IS NULL").fetchone()[0])

    def left_over(self) -> Iterator[tuple[str, bool]]:
        """(key, whether it is pending) of each line found and not dropped."""
        rows = self._connection.execute(
            "SELECT request_key, file IS NOT NULL FROM found LEFT JOIN pending USING (request_key)"
        )
        yield from ((key, bool(pending)) for key, pending in rows)

    def numbers_found(self) -> set[int]:
        """Files of which at least one request was found."""
        rows = self._connection.execute("SELECT DISTINCT file FROM pending JOIN found USING (request_key)")
        return {row[0] for row in rows}

    def without_answer(self, number: int) -> Iterator[tuple[str, str | None, str | None]]:
        """(key, failure, the server's words) of pending requests of a file for which an error was found, or (failure
        None) nothing."""
        rows = self._connection.execute(
            "SELECT request_key, failure, server_said FROM pending LEFT JOIN found USING (request_key) "
            "WHERE file = ? AND (path IS NULL OR failure IS NOT NULL)",
            (number,),
        )
        # all at once, of one file at most: rows are deleted while they are gone through
        yield from rows.fetchall()

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> BatchState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pending_questions(folder: Path) -> int:
    """How many requests of a folder of batches have no answer yet; 0 where there are no batches. Writes nothing.

    Raises InputError where the state cannot be read, such as after a kill in the middle of a commit.
    """
    path = folder / _FILE_NAME
    if not path.is_file():
        return 0
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM pending").fetchone()[0])
    except sqlite3.Error as error:
        raise InputError(
            f"{path}: cannot be read as state of batches: {error}; take up the batches again with `dermvlp batch`, or "
            "remove the folder to give them up"
        ) from None


class _Transaction:
    """BEGIN, then COMMIT, or ROLLBACK after an exception."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")
