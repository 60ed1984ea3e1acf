"""OpenAI's Batch API, and servers that speak it: submit files of requests, wait, collect, until nothing is missing.

    write_batches -> submit -> poll -> collect -> write_batches of what is missing or failed -> ...

Each step is committed to the folder's state before the next; a run that was killed goes on where it was. Nothing is
paid twice: before a batch is created its intent is on disk, and where the server's answer to the creation was not
seen (killed, timeout, 5xx), the account's batches are searched for ours by their metadata before another is created.

What happens to failures:
- error lines, expired batches, lines that are missing, no file of results at all: unanswered, written anew;
- answers that cannot be used: written anew, up to `max_attempts` in total;
- a full queue (429, or a batch that fails with `token_limit_exceeded`): the file waits until another batch has ended;
- a file that the server finds fault with, key or model refused, a batch that the server does not know: InputError.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from openai.types import Batch

from data_prep.captions.batch_results import (
    CollectSummary,
    collect_files,
    find_lines,
    give_up_missing,
    take_answers,
)
from data_prep.captions.batch_server import BatchServer, OutageError, QueueFullError, is_full_queue
from data_prep.captions.batch_state import BatchFile, BatchState, FileState
from data_prep.captions.batch_write import BatchLimits, WriteSummary, write, write_batches
from data_prep.captions.endpoint import failure_of, hide_key
from data_prep.captions.ledger import Ledger
from data_prep.captions.limits import checked_max_usd
from data_prep.captions.tasks import Task
from data_prep.errors import InputError

__all__ = [
    "BatchLimits",
    "CollectSummary",
    "PollSummary",
    "RunSummary",
    "SubmitSummary",
    "WriteSummary",
    "collect",
    "collect_files",
    "poll",
    "run_batches",
    "submit",
    "write_batches",
]

Item = TypeVar("Item")

_LOG = logging.getLogger(__name__)
_MAX_REFUSALS = 20  # of a file for a full queue while none of our batches is in it
_MAX_OUTAGES = 20  # polls without an answer, one after another
_WHY_MISSING = {
    "expired": "the batch expired before this request was done",
    "cancelled": "the batch was cancelled",
}


@dataclass
class SubmitSummary:
    num_submitted: int = 0
    num_waiting: int = 0  # for room in the queue
    reason: str | None = None  # why they wait

    def __str__(self) -> str:
        text = f"{self.num_submitted} batches submitted"
        return text + (f", {self.num_waiting} wait: {self.reason}" if self.num_waiting else "")


@dataclass
class PollSummary:
    statuses: Counter[str] = field(default_factory=Counter)  # the server's, of all batches of the folder
    num_done: int = 0  # requests in batches that have not ended
    num_requests: int = 0
    refused: list[str] = field(default_factory=list)  # name of the file, and why

    def __str__(self) -> str:
        parts = [f"{number} {status}" for status, number in sorted(self.statuses.items())] or ["no batches"]
        parts += [f"{self.num_done} of {self.num_requests} requests done"] if self.num_requests else []
        return ", ".join([*parts, *self.refused])


@dataclass
class RunSummary:
    num_rounds: int = 0
    collected: CollectSummary = field(default_factory=CollectSummary)
    stopped_by: str | None = None  # None: nothing is missing, or attempts are used up

    def __str__(self) -> str:
        stopped = f"; stopped: {self.stopped_by}" if self.stopped_by else ""
        return f"{self.num_rounds} rounds: {self.collected}{stopped}"


# ---------------------------------------------------------------------------------------------- steps


def submit(task: Task[Any], folder: Path) -> SubmitSummary:
    """Upload each file that is not at the server and create its batch, as many as the queue has room for.

    Files that the server found fault with before are tried again. Raises InputError as the module says.
    """
    with BatchState(folder, task) as state:
        return _submit(state, BatchServer(task.options, state.keep_server_said), "written", "refused")


def poll(task: Task[Any], folder: Path, *, wait: bool = True, interval_s: float = 30.0) -> PollSummary:
    """Ask how the batches are, once, or every `interval_s` until all have ended. No results are fetched."""
    with BatchState(folder, task) as state:
        server = BatchServer(task.options, state.keep_server_said)
        if not wait:
            return _poll(state, server)
        while True:
            summary = _poll_through_outages(state, server, interval_s)
            if not state.files("submitted"):
                return summary
            _LOG.info("batches: %s", summary)
            time.sleep(interval_s)


def collect(task: Task[Item], items: Iterable[Item], ledger: Ledger, folder: Path) -> CollectSummary:
    """Fetch the results of the batches that have ended, and put every request's answer, or lack of one, in the ledger.

    `items` is streamed, and must hold those that the requests were written from. Raises InputError as the module says.
    """
    with BatchState(folder, task) as state:
        return _collect(state, BatchServer(task.options, state.keep_server_said), task, items, ledger)


def run_batches(
    task: Task[Item],
    items: Callable[[], Iterable[Item]],
    ledger: Ledger,
    folder: Path,
    *,
    limits: BatchLimits | None = None,
    retry_failed: bool = False,
    limit: int | None = None,
    max_usd: float | None = None,
    interval_s: float = 30.0,
) -> RunSummary:
    """Write, submit, poll, collect, and again, until nothing is missing, attempts are used up, or `stopped_by`.

    `items` gives the same items whenever it is called. Arguments as of `write_batches`. Stops after a round that
    brought no answer at all, and after a batch was cancelled. Raises InputError as the module says; the state is kept.
    """
    checked_max_usd(task.options, limit, max_usd)
    run = RunSummary()
    with BatchState(folder, task, create=True) as state:
        server: BatchServer | None = None
        while True:
            if not _open_files(state):
                again_only = run.num_rounds > 0 and limit is not None  # a pilot asks its own questions again, no others
                written = write(
                    state, task, items(), ledger, limits or BatchLimits(),
                    retry_failed and not run.num_rounds, None if again_only else limit, max_usd, again_only,
                )  # fmt: skip
                _LOG.info("%s: %s", task.name, written)
                if not written.num_written:
                    run.stopped_by = _why_stopped(written)
                    return run
            server = server or BatchServer(task.options, state.keep_server_said)
            run.num_rounds += 1
            num_before = run.collected.num_answered + run.collected.num_failed
            cancelled = _finish_round(state, server, task, items, ledger, run.collected, interval_s)
            if cancelled:
                run.stopped_by = f"{cancelled} was cancelled; run again to ask for the rest"
                return run
            if run.collected.num_answered + run.collected.num_failed == num_before:
                common = run.collected.reasons.most_common(1)
                run.stopped_by = f"a whole round without an answer ({common[0][0] if common else 'none collected'})"
                return run


def _why_stopped(written: WriteSummary) -> str | None:
    return f"{written.stopped_by}, {written.num_left} left to ask" if written.stopped_by == "max_usd" else None


def _open_files(state: BatchState) -> list[BatchFile]:
    return state.files("written", "submitted", "refused", "ended")


def _finish_round(
    state: BatchState,
    server: BatchServer,
    task: Task[Item],
    items: Callable[[], Iterable[Item]],
    ledger: Ledger,
    collected: CollectSummary,
    interval_s: float,
) -> str | None:
    """Take all files that are open through to the end. Returns the name of a batch that somebody cancelled, if any."""
    cancelled: str | None = None
    submitted = _submit(state, server, "written", "refused")
    while True:
        polled = _poll_through_outages(state, server, interval_s)
        ended = state.files("ended")
        if ended:
            cancelled = cancelled or next((file.batch_id for file in ended if file.server_status == "cancelled"), None)
            part = _collect(state, server, task, items(), ledger)
            _LOG.info("%s: %s", task.name, part)
            _add(collected, part)
            if part.num_without_item:
                raise InputError(
                    f"{state.folder}: {part.num_without_item} answers are to items that the source no longer gives; "
                    "run with the source as it was when they were written"
                )
        if not state.files("submitted"):
            if state.files("refused"):
                raise InputError(f"{state.folder}: {'; '.join(polled.refused)}")
            if cancelled or not state.files("written"):
                return cancelled
        _LOG.info("batches: %s; %s", polled, submitted)
        if not ended:
            time.sleep(interval_s)
        if not cancelled:
            submitted = _submit(state, server, "written")


def _add(total: CollectSummary, part: CollectSummary) -> None:
    for name, value in vars(part).items():
        if name == "reasons":
            total.reasons += value
        else:
            setattr(total, name, getattr(total, name) + value)


def _submit(state: BatchState, server: BatchServer, *states: Literal["written", "refused"]) -> SubmitSummary:
    summary = SubmitSummary()
    for file in state.files(*states):
        # a file that did not fit waits until a batch has ended; where none of ours is in the queue, it is tried again
        if summary.num_waiting or (file.num_refusals and state.files("submitted")):
            summary.num_waiting += 1
            summary.reason = summary.reason or file.failure
            continue
        if not state.path(file).is_file() or state.path(file).stat().st_size != file.num_bytes:
            raise InputError(f"{state.path(file)}: missing or changed since it was written; put it back")
        if file.num_refusals >= _MAX_REFUSALS:
            state.update(file.number, num_refusals=0)
            raise InputError(
                f"{file.name}: does not fit into the queue even alone ({file.failure}); see to the account's limit, or "
                "write smaller files into another folder (max_tokens)"
            )
        file_id = file.file_id
        if file_id is None:
            file_id = server.upload(state, file)
            state.update(file.number, file_id=file_id)
        try:
            batch = server.create_batch(state, file, file_id)
        except QueueFullError as error:
            summary.num_waiting += 1
            summary.reason = str(error)
            state.update(file.number, num_refusals=file.num_refusals + 1, failure=summary.reason)
            continue
        state.update(file.number, state="submitted", batch_id=batch.id, server_status=batch.status, failure=None)
        summary.num_submitted += 1
    return summary


def _poll(state: BatchState, server: BatchServer) -> PollSummary:
    summary = PollSummary()
    for file in state.files("submitted"):
        assert file.batch_id is not None
        with server.asked_for(f"looking for batch {file.batch_id} of {file.name}"):
            batch = server.client.batches.retrieve(file.batch_id)
        _record(state, file, batch, server)
        if batch.request_counts is not None and _state_of(batch) == "submitted":
            summary.num_done += batch.request_counts.completed + batch.request_counts.failed
            summary.num_requests += file.num_requests
    for file in state.files():
        if file.server_status is not None:
            summary.statuses[file.server_status] += 1
        if file.state == "refused":
            summary.refused.append(
                f"{file.name} was refused: {file.failure} (what the server says: batches.sqlite, files.server_said)"
            )
    return summary


def _poll_through_outages(state: BatchState, server: BatchServer, interval_s: float) -> PollSummary:
    """A batch takes up to a day, in which a server may be away for a while."""
    for _ in range(_MAX_OUTAGES):
        try:
            return _poll(state, server)
        except OutageError as error:
            _LOG.warning("%s", error)
            time.sleep(interval_s)
    return _poll(state, server)


def _state_of(batch: Batch) -> FileState:
    if batch.status in ("completed", "expired", "cancelled"):
        return "ended"
    return "refused" if batch.status == "failed" else "submitted"


def _record(state: BatchState, file: BatchFile, batch: Batch, server: BatchServer) -> None:
    """What the server says of a batch, in one commit."""
    new_state = _state_of(batch)
    with state.transaction():
        state.update(file.number, state=new_state, server_status=batch.status)
        if new_state == "ended":
            # some servers name an absent file by an empty string
            state.update(
                file.number, output_file_id=batch.output_file_id or None, error_file_id=batch.error_file_id or None
            )
            state.forget_refusals()
        elif new_state == "refused":
            errors = (batch.errors.data if batch.errors is not None else None) or []
            failures = [
                (f"line {error.line}: " if isinstance(error.line, int) else "") + failure_of(None, error.code)
                for error in errors[:3]
            ]
            said = "; ".join(f"{error.code}: {error.message}" for error in errors)
            failure = "; ".join(failures) or "the server gives no reason"
            state.update(
                file.number, batch_id=None, failure=failure, server_said=hide_key(said, server.options) or None
            )
            if is_full_queue(None, said):
                state.update(file.number, state="written", num_refusals=file.num_refusals + 1)


def _collect(
    state: BatchState, server: BatchServer, task: Task[Item], items: Iterable[Item], ledger: Ledger
) -> CollectSummary:
    summary = CollectSummary()
    ended = state.files("ended")
    if not ended:
        return summary
    paths: list[Path] = []
    for file in ended:
        paths += _fetch(state, server, file)
    find_lines(state, task, paths, summary)
    for file in ended:
        reason = _WHY_MISSING.get(file.server_status or "", "the batch's results have no line of this request")
        give_up_missing(state, task, ledger, file, reason, summary)
    take_answers(state, task, items, ledger, paths, summary)
    return summary


def _fetch(state: BatchState, server: BatchServer, file: BatchFile) -> list[Path]:
    """The files of results and of errors, those that there are, downloaded once."""
    if file.output_file_id is None and file.error_file_id is None and file.batch_id is not None:
        # completed without any file: perhaps it was not ready yet, and asking anew costs money
        with server.asked_for(f"looking for batch {file.batch_id} of {file.name}"):
            _record(state, file, server.client.batches.retrieve(file.batch_id), server)
        file = next(one for one in state.files() if one.number == file.number)
    paths: list[Path] = []
    kinds: tuple[tuple[str | None, Literal["output", "errors"]], ...] = (
        (file.output_file_id, "output"),
        (file.error_file_id, "errors"),
    )
    for file_id, kind in kinds:
        if file_id is not None:
            paths.append(state.path(file, kind))
            if not paths[-1].is_file():
                server.download(file_id, paths[-1])
    return paths
