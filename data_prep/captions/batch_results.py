"""Answers from files of results into the ledger: OpenAI's batches and `vllm run-batch` write them. No network here.

Answers come in any order and are found by key, so the items are needed again to judge them: they are streamed, and must
be those that the requests were written from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_prep.captions.batch_state import BatchFile, BatchState
from data_prep.captions.completions import Judged, NotACompletionError, judge
from data_prep.captions.endpoint import failure_of, hide_key
from data_prep.captions.ledger import Answer, Ledger
from data_prep.captions.tasks import Task, request_key
from data_prep.config import LLMOptions
from data_prep.errors import InputError

Item = TypeVar("Item")

_MAX_OPEN_FILES = 64


@dataclass
class CollectSummary:
    num_answered: int = 0
    num_failed: int = 0  # answers that cannot be used
    num_unanswered: int = 0  # errors, expired, no line at all
    num_known: int = 0  # lines of requests that were collected before
    num_unknown: int = 0  # lines with a custom_id that was not asked
    num_repeated: int = 0  # further lines of the same custom_id
    num_malformed: int = 0  # lines that are not of the format
    num_without_item: int = 0  # answers to requests whose item was not given: they stay pending
    reasons: Counter[str] = field(default_factory=Counter)  # of failed and unanswered

    def __str__(self) -> str:
        parts = [f"{self.num_answered} answered, {self.num_failed} failed, {self.num_unanswered} unanswered"]
        parts += [
            f"{number} {what}"
            for number, what in (
                (self.num_known, "lines already collected"),
                (self.num_unknown, "lines of requests that were not asked"),
                (self.num_repeated, "lines repeated"),
                (self.num_malformed, "malformed lines"),
                (self.num_without_item, "answers whose item was not given again"),
            )
            if number
        ]
        parts += [f"{number} x {reason}" for reason, number in self.reasons.most_common(3)]
        return "; ".join(parts)


def collect_files(
    task: Task[Item], items: Iterable[Item], ledger: Ledger, folder: Path, result_paths: Sequence[Path]
) -> CollectSummary:
    """Take answers from files of results that were made here, such as by `vllm run-batch`, into the ledger.

    Of each file of requests that was not submitted and of which some request is in the results, the missing ones count
    as unanswered: `write_batches` writes them anew. Results may be given again, whole or longer: what is known is
    passed over. Raises InputError for a file that cannot be read, or holds no line of results.
    """
    with BatchState(folder, task) as state:
        summary = CollectSummary()
        find_lines(state, task, result_paths, summary, may_be_empty=False)
        numbers = state.numbers_found()
        for file in state.files("written", "refused"):
            if file.number in numbers:
                give_up_missing(state, task, ledger, file, "no line in the file of results", summary)
        take_answers(state, task, items, ledger, result_paths, summary)
        return summary


def find_lines(
    state: BatchState, task: Task[Any], paths: Sequence[Path], summary: CollectSummary, *, may_be_empty: bool = True
) -> None:
    """Note in the state where in `paths` the line of each request is. Raises InputError as `collect_files` says."""
    with state.transaction():
        state.clear_found()
        for index, path in enumerate(paths):
            num_lines = 0
            for key, offset, failure, server_said in _result_lines(path, summary):
                num_lines += 1
                said = None if server_said is None else hide_key(server_said, task.options)
                if not state.add_found(key, index, offset, failure, said):
                    summary.num_repeated += 1
            if not num_lines and not may_be_empty:
                raise InputError(f"{path}: no line of it is a result (custom_id and response); give the output file")


def _result_lines(path: Path, summary: CollectSummary) -> Iterator[tuple[str, int, str | None, str | None]]:
    """(custom_id, offset in bytes, None or why there is no answer, the server's words) of each line; malformed lines
    are counted.

    OpenAI's format and vLLM's differ in where they put an error: beside a `response` of null, or beside a status.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                begin, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    result = json.loads(line)
                    yield str(result["custom_id"]), begin, *_why_no_answer(result)
                except (ValueError, KeyError, TypeError):
                    summary.num_malformed += 1
    except OSError as error:
        raise InputError(f"{path}: cannot be read as file of results: {error.strerror}") from None


def _why_no_answer(result: dict[str, Any]) -> tuple[str | None, str | None]:
    """The failure in fixed phrases and the server's own words; (None, None) where there is an answer."""
    response = result["response"] if "error" not in result else result.get("response")
    response = response if isinstance(response, dict) else {}
    body = response.get("body")
    if response.get("status_code") == 200 and isinstance(body, dict) and not result.get("error"):
        return None, None
    # OpenAI: {"error": {"code", "message"}} at the top, or so in the body of a response with another status;
    # vLLM: a string, or its ErrorResponse, at the top
    error = result.get("error") or body
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    message, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
    if code == "batch_expired":
        return "the batch expired before this request was done", None
    status = response.get("status_code")
    return failure_of(None if status == 200 else status, code), None if message is None else str(message)


def give_up_missing(
    state: BatchState, task: Task[Any], ledger: Ledger, file: BatchFile, reason: str, summary: CollectSummary
) -> None:
    """Put into the ledger, as unanswered, the requests of a file whose results hold an error for them, or nothing."""
    with state.transaction():
        for key, failure, server_said in state.without_answer(file.number):
            known = ledger.get(key)
            if known is None or known.status == "unanswered":  # an unusable answer says more than none
                ledger.put(key, task, Answer("unanswered", raw=server_said, failure=failure or reason))
            state.drop_pending(key)
            state.drop_found(key)
            summary.num_unanswered += 1
            summary.reasons[failure or reason] += 1


class _Lines:
    """Lines of many files at their offsets, with a bounded number of files open."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open: dict[int, BinaryIO] = {}

    def read(self, path: int, offset: int) -> bytes:
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._close()
            self._open[path] = self._paths[path].open("rb")
        self._open[path].seek(offset)
        return self._open[path].readline()

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def take_answers(
    state: BatchState,
    task: Task[Item],
    items: Iterable[Item],
    ledger: Ledger,
    result_paths: Sequence[Path],
    summary: CollectSummary,
) -> None:
    """Judge the answers found, put them into the ledger; close and delete the files of which nothing is pending.

    A kill in the middle is made good by collecting again: the ledger's number of attempts shows what it has.
    """
    with _Lines(result_paths) as lines, state.transaction():
        num_left = state.num_answers_found()
        for item in items:
            if not num_left:
                break
            key = request_key(task, task.identity(item))
            place = state.found(key)
            if place is None:
                continue
            body = json.loads(lines.read(*place))["response"]["body"]
            _take(state, task, item, key, body, ledger, summary)
            state.drop_found(key)
            num_left -= 1
        for key, pending in state.left_over():
            summary.num_without_item += pending
            summary.num_known += not pending and ledger.status(key) is not None
            summary.num_unknown += not pending and ledger.status(key) is None
        state.clear_found()
        closed = [file for file in state.files("written", "refused", "ended") if not state.num_pending(file.number)]
        for file in closed:
            state.update(file.number, state="collected")
    for file in closed:
        for path in (state.path(file), state.path(file, "output"), state.path(file, "errors")):
            path.unlink(missing_ok=True)


def _take(
    state: BatchState, task: Task[Item], item: Item, key: str, body: object, ledger: Ledger, summary: CollectSummary
) -> None:
    pending, known = state.pending(key), ledger.get(key)
    if pending is None and known is not None and known.status != "unanswered":
        summary.num_known += 1  # a file given again
        return
    num_before = pending.num_attempts if pending is not None else 0
    num_bytes_in = pending.num_bytes_in if pending is not None else 0
    # not replaced: an answer that came another way meanwhile, or in this collection before it was killed
    again = known if known is not None and known.status == "failed" and known.num_attempts == num_before else None
    try:
        judged = judge(task, item, body)
        answer = _answer(judged, again, num_bytes_in, task.options)
        if pending is not None:
            state.add_tokens(pending.file, judged.num_tokens_in or 0, judged.num_tokens_out or 0)
    except NotACompletionError as error:
        answer = Answer("unanswered", failure=str(error))
    if pending is not None:
        state.drop_pending(key)
    if known is None or known.status == "unanswered" or (again is not None and answer.status != "unanswered"):
        ledger.put(key, task, answer, continues=again)
    if answer.status == "answered":
        summary.num_answered += 1
        return
    if answer.status == "failed":
        summary.num_failed += 1
    else:
        summary.num_unanswered += 1
    summary.reasons[answer.failure or ""] += 1


def _answer(judged: Judged, again: Answer | None, num_bytes_in: int, options: LLMOptions) -> Answer:
    """Of all attempts; `again`: what the ledger holds of those before."""
    before = again or Answer("unanswered", num_attempts=0)
    return Answer(
        "answered" if judged.failure is None else "failed",
        raw=None if judged.raw is None else hide_key(judged.raw, options),
        finish_reason=judged.finish_reason,
        num_tokens_in=before.num_tokens_in + (judged.num_tokens_in or 0),
        num_tokens_out=before.num_tokens_out + (judged.num_tokens_out or 0),
        num_attempts=before.num_attempts + 1,
        failure=judged.failure,
        raw_failures=() if again is None else (*again.raw_failures, (again.failure or "", again.raw)),
        num_bytes_in=num_bytes_in,
    )
