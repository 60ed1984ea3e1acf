"""What models were asked and what they answered: one SQLite file, every answer committed when it arrives.

A killed run loses at most the calls in flight; the next one asks only for what is missing. Neither the questions nor
the API key are stored: a question's identity enters as part of a SHA-256. `failure` holds fixed phrases and may be
shown; `raw` may quote the question, as answers and servers' errors do, and is for no log or table.

The file uses a write-ahead log, which needs a file system of one machine (several processes may read it; on Lustre or
NFS keep it on a node's own disk and copy it). One process at a time may ask (`Ledger.exclusive`); the parts of a job
array have a file each, and `merge_ledgers` makes one of them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from data_prep.captions.tasks import Task
from data_prep.errors import InputError
from data_prep.files import lock

_VERSION = 2
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    request_key    TEXT PRIMARY KEY,   -- data_prep.captions.tasks.request_key
    task           TEXT NOT NULL,
    model          TEXT NOT NULL,
    prompt_hash    TEXT NOT NULL,
    status         TEXT NOT NULL CHECK (status IN ('answered', 'failed', 'unanswered')),
    raw            TEXT,               -- the last answer as it came, usable or not; if none came, the server's words
    finish_reason  TEXT,
    failure        TEXT,
    raw_failures   TEXT NOT NULL,      -- JSON: [reason, raw] of each unusable answer before the last
    num_attempts   INTEGER NOT NULL,
    num_tokens_in  INTEGER NOT NULL,   -- of all attempts together
    num_tokens_out INTEGER NOT NULL,
    num_bytes_in   INTEGER NOT NULL,   -- of the question's text, once; 0: not measured
    latency_s      REAL,               -- of the last attempt; NULL: not measured
    answered_on    TEXT NOT NULL,      -- day, UTC
    paid_in        INTEGER NOT NULL,   -- tokens, also of earlier answers that this one replaced
    paid_out       INTEGER NOT NULL
)
"""
_FIELDS = (
    *("status", "raw", "finish_reason", "num_tokens_in", "num_tokens_out", "num_attempts", "failure"),
    *("answered_on", "raw_failures", "num_bytes_in", "latency_s"),
)
_GET = f"SELECT {', '.join(_FIELDS)} FROM answers WHERE request_key = ?"
_STATUS = "SELECT status FROM answers WHERE request_key = ?"
_COLUMNS = ("request_key", "task", "model", "prompt_hash", *_FIELDS, "paid_in", "paid_out")
_PUT = (
    f"INSERT INTO answers ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
    f"ON CONFLICT (request_key) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS[1:-2])}, "
    "paid_in = paid_in + excluded.paid_in, paid_out = paid_out + excluded.paid_out"
)

#: answered: usable. failed: the model answered, and the answer cannot be used. unanswered: no answer came.
Status = Literal["answered", "failed", "unanswered"]


@dataclass(frozen=True)
class Answer:
    """The last answer to one question and how it was come by."""

    status: Status
    raw: str | None = None  # unanswered: what the server said instead
    finish_reason: str | None = None
    num_tokens_in: int = 0  # of all attempts together
    num_tokens_out: int = 0
    num_attempts: int = 1
    failure: str | None = None  # fixed phrases, statuses, positions: nothing that the server or the model wrote
    answered_on: str = ""  # ISO date, UTC; "" in `put`: today
    raw_failures: tuple[tuple[str, str | None], ...] = ()  # reason and raw answer of the unusable ones before
    num_bytes_in: int = 0  # UTF-8 bytes of the question's text
    latency_s: float | None = None


@dataclass(frozen=True)
class Usage:
    """What the answers to one task, model and prompt took, in total, usable or not."""

    num_answers: int  # questions with an answer, and with what it took
    num_attempts: int
    num_tokens_in: int
    num_tokens_out: int
    max_tokens_in: int  # of one attempt
    num_bytes_in: int  # of all attempts
    mean_latency_s: float | None


class Ledger:
    """Answers by `data_prep.captions.tasks.request_key`, of any tasks and models.

    Every method raises InputError, naming the file, when it is not a ledger of this version or cannot be read or
    written (a full disk); what was committed before stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            #: in autocommit mode; `batch_api` keeps tables of its own in the same file
            self.connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
            if version == 0 and not self.connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute(_TABLE)
                self.connection.execute(f"PRAGMA user_version = {_VERSION}")
                version = _VERSION
            # enough against a killed process; a power failure may cost the last answers, not the file
            self.connection.execute("PRAGMA synchronous = NORMAL")
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"{path}: cannot be used as ledger of answers: {error}; make space, move it away or repair it"
            ) from None
        if version != _VERSION:
            raise InputError(f"{path}: not a ledger of version {_VERSION} (found {version}); move it away to ask again")

    def get(self, key: str) -> Answer | None:
        row = self._execute(_GET, (key,)).fetchone()
        if row is None:
            return None
        values = dict(zip(_FIELDS, row, strict=True))
        values["raw_failures"] = tuple((reason, raw) for reason, raw in json.loads(values["raw_failures"]))
        return Answer(**values)

    def status(self, key: str) -> Status | None:
        """As `get`, without the answer's text: what a run looks up for each of a million items."""
        row = self._execute(_STATUS, (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, task: Task[Any], answer: Answer, *, continues: Answer | None = None) -> None:
        """Committed on return; replaces what was there for the same question, whose tokens stay counted as paid.

        `continues`: what is there, where `answer` counts its attempts and tokens too.
        """
        paid_before = (0, 0) if continues is None else (continues.num_tokens_in, continues.num_tokens_out)
        self._execute(
            _PUT,
            (
                *(key, task.name, task.options.model, task.prompt_hash),
                *(answer.status, answer.raw, answer.finish_reason, answer.num_tokens_in, answer.num_tokens_out),
                *(answer.num_attempts, answer.failure, answer.answered_on or datetime.now(UTC).date().isoformat()),
                *(json.dumps(answer.raw_failures, ensure_ascii=False), answer.num_bytes_in, answer.latency_s),
                *(answer.num_tokens_in - paid_before[0], answer.num_tokens_out - paid_before[1]),
            ),
        )

    def usage(self, task: Task[Any]) -> Usage:
        """Of the answers to this task, model and prompt whose question was measured."""
        row = self._execute(
            "SELECT count(*), total(num_attempts), total(num_tokens_in), total(num_tokens_out), "
            "max((num_tokens_in + num_attempts - 1) / num_attempts), "
            "total(num_bytes_in * num_attempts), avg(latency_s) FROM answers "
            "WHERE task = ? AND model = ? AND prompt_hash = ? AND status IN ('answered', 'failed') "
            "AND num_tokens_in > 0 AND num_bytes_in > 0",
            (task.name, task.options.model, task.prompt_hash),
        ).fetchone()
        num_answers, num_attempts, num_in, num_out, most_in, num_bytes, latency_s = row
        return Usage(num_answers, int(num_attempts), int(num_in), int(num_out), most_in or 0, int(num_bytes), latency_s)

    def paid_tokens(self, task: Task[Any]) -> tuple[int, int]:
        """Input and output tokens that this task and model have taken in all runs and with all prompts."""
        row = self._execute(
            "SELECT total(paid_in), total(paid_out) FROM answers WHERE task = ? AND model = ?",
            (task.name, task.options.model),
        ).fetchone()
        return int(row[0]), int(row[1])

    def exclusive(self) -> AbstractContextManager[None]:
        """Held while asking, and released by the kernel when the process dies. InputError if another process has it.

        Two runs at once would pay for the same questions twice.
        """
        return lock(Path(f"{self.path}.lock"), f"a run that asks with {self.path.name}")

    def _execute(self, statement: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            return self.connection.execute(statement, values)
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path}: the ledger of answers cannot be read or written: {error}; make space or repair the "
                "disk and run again, what it holds is not asked again"
            ) from None

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_RANK = "CASE {}.status WHEN 'answered' THEN 2 WHEN 'failed' THEN 1 ELSE 0 END"
_MERGE = (
    f"INSERT INTO answers ({', '.join(_COLUMNS)}) SELECT {', '.join(_COLUMNS)} FROM part.answers WHERE true "
    f"ON CONFLICT (request_key) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS[1:])} "
    f"WHERE {_RANK.format('excluded')} > {_RANK.format('answers')}"
)
_MERGE_PAID = (
    "UPDATE answers SET paid_in = max(answers.paid_in, p.paid_in), paid_out = max(answers.paid_out, p.paid_out) "
    "FROM part.answers AS p WHERE p.request_key = answers.request_key "
    "AND (p.paid_in > answers.paid_in OR p.paid_out > answers.paid_out)"
)


def merge_ledgers(target: Path, parts: Sequence[Path]) -> None:
    """Add the answers of `parts` to `target`, which is made where it does not exist; the parts stay as they are.

    Of two answers to the same question, answered beats failed beats unanswered; of equals, what `target` holds. Each
    part is added whole or not at all, so a merge that was killed can be done again. Raises InputError for a part that
    is missing or not a ledger, and when a run is asking with `target`.
    """
    for part in parts:
        if not part.is_file():
            raise InputError(f"{part}: no such ledger; run this part first")
        Ledger(part).close()  # is one, and its write-ahead log is taken in
    with Ledger(target) as ledger, ledger.exclusive():
        for part in parts:
            if part.resolve() == target.resolve():
                continue
            ledger._execute("ATTACH DATABASE ? AS part", (str(part),))
            try:
                ledger._execute(_MERGE, ())
                ledger._execute(_MERGE_PAID, ())
            finally:
                ledger._execute("DETACH DATABASE part", ())
