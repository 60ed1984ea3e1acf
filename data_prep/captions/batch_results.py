"""Answers from files of results into the ledger: OpenAI's batches and `vllm run-batch` write them. No network here.

Answers come in any order and are found by key, so the items are needed again to judge them: they are streamed, and must
be those that the requests were written from.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_prep.captions.batch_state import BatchFile, BatchState
from data_prep.captions.completions import Judged, NotACompletionError, judge
from data_prep.captions.ledger import Answer, Ledger
from data_prep.captions.tasks import Task, request_key
from data_prep.config import LLMOptions
from data_prep.errors import InputError

Item = TypeVar("Item")

_MAX_REASON_CHARACTERS = 300
_MAX_OPEN_FILES = 64


@dataclass
class CollectSummary:
    num_answered: int = 0
    num_failed: int = 0  # answers that cannot be used
    num_unanswered: int = 0  # errors, expired, no line at all
    num_unknown: int = 0  # lines with a custom_id that was not asked, or whose answer is known
    num_repeated: int = 0  # further lines of the same custom_id
    num_malformed: int = 0  # lines that are not of the format
    num_without_item: int = 0  # answers to requests whose item was not given: they stay pending
    reasons: Counter[str] = field(default_factory=Counter)  # of failed and unanswered

    def __str__(self) -> str:
        parts = [f"{self.num_answered} answered, {self.num_failed} failed, {self.num_unanswered} unanswered"]
        parts += [
            f"{number} {what}"
            for number, what in (
                (self.num_unknown, "lines of requests that were not asked"),
                (self.num_repeated, "lines repeated"),
                (self.num_malformed, "malformed lines"),
                (self.num_without_item, "answers whose item was not given again"),
            )
            if number
        ]
        parts += [f"{number} x {reason}" for reason, number in self.reasons.most_common(3)]
        return "; ".join(parts)


def hide_key(text: str, options: LLMOptions) -> str:
    """Servers repeat the key they refuse, sometimes."""
    key = os.environ.get(options.api_key_env, "").strip()
    return text.replace(key, "***") if key else text


def collect_files(
    task: Task[Item], items: Iterable[Item], ledger: Ledger, folder: Path, result_paths: Sequence[Path]
) -> CollectSummary:
    """Take answers from files of results that were made here, such as by `vllm run-batch`, into the ledger.

    Of each file of requests that was not submitted and of which some request is in the results, the missing ones count
    as unanswered: `write_batches` writes them anew. Results may be given again, whole or longer: what is known is
    passed over. Raises InputError for a file that cannot be read.
    """
    with BatchState(folder, task) as state:
        summary = CollectSummary()
        with state.transaction():
            state.clear_found()
            for index, path in enumerate(result_paths):
                for key, offset, failure in result_lines(path, summary):
                    if not state.add_found(key, index, offset, failure):
                        summary.num_repeated += 1
        numbers = state.numbers_found()
        for file in state.files("written", "refused"):
            if file.number in numbers:
                give_up_missing(state, task, ledger, file, "no line in the file of results", summary)
        take_answers(state, task, items, ledger, result_paths, summary)
        return summary


def result_lines(path: Path, summary: CollectSummary) -> Iterator[tuple[str, int, str | None]]:
    """(custom_id, offset in bytes, None or why there is no answer) of each line; malformed lines are counted.

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
                    yield str(result["custom_id"]), begin, _why_no_answer(result)
                except (ValueError, KeyError, TypeError):
                    summary.num_malformed += 1
    except OSError as error:
        raise InputError(f"{path}: cannot be read as file of results: {error.strerror}") from None


def _why_no_answer(result: dict[str, Any]) -> str | None:
    response = result.get("response")
    response = response if isinstance(response, dict) else {}
    body = response.get("body")
    if response.get("status_code") == 200 and isinstance(body, dict) and not result.get("error"):
        return None
    # OpenAI: {"error": {"code", "message"}} at the top, or so in the body of a response with another status;
    # vLLM: a string, or its ErrorResponse, at the top
    error = result.get("error") or body
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    message = str((error.get("message") or error.get("code") or "no message") if isinstance(error, dict) else error)
    code = error.get("code") if isinstance(error, dict) else None
    if code == "batch_expired":
        return "the batch expired before this request was done"
    status = response.get("status_code")
    return (f"HTTP {status}: {message}" if status not in (None, 200) else message)[:_MAX_REASON_CHARACTERS]


def give_up_missing(
    state: BatchState, task: Task[Any], ledger: Ledger, file: BatchFile, reason: str, summary: CollectSummary
) -> None:
    """Put into the ledger, as unanswered, the requests of a file whose results hold an error for them, or nothing."""
    with state.transaction():
        for key, failure in state.without_answer(file.number):
            known = ledger.get(key)
            if known is None or known.status == "unanswered":  # an unusable answer says more than none
                ledger.put(key, task, Answer("unanswered", failure=hide_key(failure or reason, task.options)))
            state.drop_pending(key)
            state.drop_found(key)
            summary.num_unanswered += 1
            summary.reasons[hide_key(failure or reason, task.options)] += 1


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
        num_without_item, num_unknown = state.num_left_over()
        summary.num_without_item += num_without_item
        summary.num_unknown += num_unknown
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
        summary.num_unknown += 1  # a file given again
        return
    num_before = pending.num_attempts if pending is not None else 0
    num_bytes_in = pending.num_bytes_in if pending is not None else 0
    try:
        answer = _answer(judge(task, item, body), known, num_before, num_bytes_in, task.options)
    except NotACompletionError as error:
        answer = Answer("unanswered", failure=str(error))
    if pending is not None:
        state.add_tokens(pending.file, answer.num_tokens_in, answer.num_tokens_out)
        state.drop_pending(key)
    # not replaced: an answer that came another way meanwhile, or in this collection before it was killed
    retried = known is not None and known.status == "failed" and known.num_attempts == num_before
    if known is None or known.status == "unanswered" or (retried and answer.status != "unanswered"):
        ledger.put(key, task, answer)
    if answer.status == "answered":
        summary.num_answered += 1
        return
    if answer.status == "failed":
        summary.num_failed += 1
    else:
        summary.num_unanswered += 1
    summary.reasons[answer.failure or ""] += 1


def _answer(judged: Judged, known: Answer | None, num_before: int, num_bytes_in: int, options: LLMOptions) -> Answer:
    earlier: tuple[tuple[str, str | None], ...] = ()
    if known is not None and known.status == "failed":
        earlier = (*known.raw_failures, (known.failure or "", known.raw))
    return Answer(
        "answered" if judged.failure is None else "failed",
        raw=None if judged.raw is None else hide_key(judged.raw, options),
        finish_reason=judged.finish_reason,
        # of this attempt alone: the ledger adds what it replaces to what was paid
        num_tokens_in=judged.num_tokens_in or 0,
        num_tokens_out=judged.num_tokens_out or 0,
        num_attempts=num_before + 1,
        failure=None if judged.failure is None else hide_key(judged.failure, options),
        raw_failures=earlier,
        num_bytes_in=num_bytes_in if num_before == 0 else 0,  # not measured: tokens and attempts do not belong together
    )
