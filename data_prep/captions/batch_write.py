"""Questions as files of requests, for batch processing elsewhere. No network here.

    requests-000.jsonl   a request a line, `custom_id` = request_key: OpenAI's Batch API and `vllm run-batch` read it
    output-000.jsonl     what a batch brought (batch_results.py), and errors-000.jsonl: OpenAI's two files
    batches.sqlite       what became of each (batch_state.py)

The files hold questions as they are (captions, images): the folder is as private as the source. They are deleted when
nothing of them is pending any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Generic, Literal, TypeVar

from data_prep.captions.batch_state import BatchFile, BatchState, Pending
from data_prep.captions.completions import CUT_OFF
from data_prep.captions.ledger import Answer, Ledger
from data_prep.captions.limits import PromptTokens, checked_max_usd, cost_usd, num_text_bytes
from data_prep.captions.tasks import Task, request_body, request_key
from data_prep.config import LLMOptions
from data_prep.errors import InputError
from data_prep.files import atomic

Item = TypeVar("Item")


@dataclass(frozen=True)
class BatchLimits:
    """Of one file of requests. The defaults are OpenAI's."""

    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    #: Prompt tokens, estimated: where an account's queue holds fewer than 50,000 requests take. None: no limit
    max_tokens: int | None = None


@dataclass
class WriteSummary:
    num_files: int = 0
    num_written: int = 0
    num_already: int = 0  # with a final answer in the ledger
    num_pending: int = 0  # in files written before
    num_repeated: int = 0  # earlier among the items
    num_left: int = 0  # not written, for `stopped_by`
    stopped_by: Literal["limit", "max_usd"] | None = None

    def __str__(self) -> str:
        text = f"{self.num_written} requests in {self.num_files} files, {self.num_pending} pending from before"
        text += f", {self.num_already} with an answer"
        text += f", {self.num_repeated} repeated" if self.num_repeated else ""
        return text + (f", {self.num_left} left by {self.stopped_by}" if self.stopped_by else "")


def write_batches(
    task: Task[Item],
    items: Iterable[Item],
    ledger: Ledger,
    folder: Path,
    *,
    limits: BatchLimits | None = None,
    retry_failed: bool = False,
    limit: int | None = None,
    max_usd: float | None = None,
) -> WriteSummary:
    """Write a request for each item that has no final answer and is not pending; `items` is streamed.

    `limit`: at most so many requests. `max_usd` (default: the options') bounds what all batches of this folder can
    cost at most, at the batch price. An unusable answer is asked again up to `max_attempts` times in total, one that
    was cut off once, with twice the room; `retry_failed` asks once more. Raises InputError for a folder of another
    task, a request above the size limit, and as `limits.checked_max_usd` says.
    """
    checked_max_usd(task.options, limit, max_usd)
    with BatchState(folder, task, create=True) as state:
        return write(state, task, items, ledger, limits or BatchLimits(), retry_failed, limit, max_usd)


def write(
    state: BatchState,
    task: Task[Item],
    items: Iterable[Item],
    ledger: Ledger,
    limits: BatchLimits,
    retry_failed: bool = False,
    limit: int | None = None,
    max_usd: float | None = None,
    again_only: bool = False,
) -> WriteSummary:
    """`write_batches` with an open state. `again_only`: nothing that the ledger does not know."""
    summary = WriteSummary()
    max_usd = checked_max_usd(task.options, limit, max_usd)
    budget_usd = None if max_usd is None else max_usd - committed_usd(state, task.options)
    first_number = state.next_number()
    with _Writer(state, task, limits, budget_usd, PromptTokens(task, ledger)) as writer:
        for item in items:
            key = request_key(task, task.identity(item))
            if (pending := state.pending(key)) is not None:
                summary.num_repeated += pending.file >= first_number
                summary.num_pending += pending.file < first_number
                continue
            status = ledger.status(key)
            known = ledger.get(key) if status in ("failed", "unanswered") else None
            if status == "answered" or (known and not retry_failed and _is_final(known, task.options)):
                summary.num_already += 1
                continue
            if again_only and known is None:
                continue
            if summary.stopped_by is None and limit is not None and summary.num_written >= limit:
                summary.stopped_by = "limit"
            if summary.stopped_by is None and not writer.add(key, item, known):
                summary.stopped_by = "max_usd"
            if summary.stopped_by is None:
                summary.num_written += 1
            else:
                summary.num_left += 1
    summary.num_files = writer.num_files
    return summary


def committed_usd(state: BatchState, options: LLMOptions) -> float:
    """What the folder's batches have cost, or can at most cost where they are not collected."""
    usd = 0.0
    for file in state.files():
        done = file.state == "collected"
        num_in, num_out = (
            (file.num_tokens_in, file.num_tokens_out) if done else (file.max_tokens_in, file.max_tokens_out)
        )
        usd += _batch_usd(options, num_in, num_out)
    return usd


def _batch_usd(options: LLMOptions, num_tokens_in: int, num_tokens_out: int) -> float:
    return cost_usd(options.prices[options.model], num_tokens_in, num_tokens_out) * (1.0 - options.batch_discount)


def _is_final(known: Answer, options: LLMOptions) -> bool:
    if known.status != "failed":
        return False
    reasons = [*(reason for reason, _ in known.raw_failures), known.failure]
    return known.num_attempts >= options.max_attempts or reasons.count(CUT_OFF) > 1


class _Writer(Generic[Item]):
    """Fills one file after another. A file has its final name, and a row in the state, when it is whole."""

    def __init__(
        self,
        state: BatchState,
        task: Task[Item],
        limits: BatchLimits,
        budget_usd: float | None,
        sizes: PromptTokens,
    ) -> None:
        self._state, self._task, self._limits, self._budget_usd = state, task, limits, budget_usd
        self._sizes = sizes
        self._out: BinaryIO | None = None
        self.num_files = 0

    def add(self, key: str, item: Item, known: Answer | None) -> bool:
        """False: there is no money for it."""
        body = request_body(self._task, item)
        limit_name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        if known is not None and known.failure == CUT_OFF:
            body[limit_name] *= 2
        messages = body["messages"]
        most_in, most_out = self._sizes.at_most(messages), int(body[limit_name])
        if self._budget_usd is not None:
            usd = _batch_usd(self._task.options, most_in, most_out)
            if usd > self._budget_usd:
                return False
            self._budget_usd -= usd
        request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
        num_tokens = self._sizes.estimated(messages)
        self._make_room(len(line), num_tokens)
        assert self._out is not None
        self._out.write(line)
        self._digest.update(line)
        self._num_bytes += len(line)
        self._num_requests += 1
        self._num_tokens += num_tokens
        self._most_in += most_in
        self._most_out += most_out
        num_attempts = known.num_attempts if known is not None and known.status == "failed" else 0
        self._state.add_pending(key, Pending(self._number, num_attempts, num_text_bytes(messages)))
        return True

    def _make_room(self, num_bytes: int, num_tokens: int) -> None:
        limits = self._limits
        if num_bytes > limits.max_bytes:
            raise InputError(f"a request of {num_bytes} bytes, more than a file may have: reduce describer.image_px")
        if self._out is not None and (
            self._num_requests >= limits.max_requests
            or self._num_bytes + num_bytes > limits.max_bytes
            or (limits.max_tokens is not None and self._num_tokens + num_tokens > limits.max_tokens)
        ):
            self._finish()
        if self._out is None:
            self._begin()

    def _begin(self) -> None:
        self._number = self._state.next_number()
        self._file = atomic(self._state.folder / f"requests-{self._number:03d}.jsonl")
        self._out = self._file.__enter__()
        self._digest = hashlib.sha256()
        self._num_bytes = self._num_requests = self._num_tokens = self._most_in = self._most_out = 0
        self._transaction = self._state.transaction()
        self._transaction.__enter__()

    def _finish(self) -> None:
        assert self._out is not None
        self._out = None
        # killed after this and before the commit, the file is written over by the next one with its number
        self._file.__exit__(None, None, None)
        self._state.add(
            BatchFile(
                self._number, "written", self._digest.hexdigest(), self._num_bytes, self._num_requests,
                self._most_in, self._most_out,
            )
        )  # fmt: skip
        self._transaction.__exit__(None, None, None)
        self.num_files += 1

    def __enter__(self) -> _Writer[Item]:
        _remove_leftovers(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is None:
            return
        if kind is None:
            self._finish()
            return
        self._transaction.__exit__(kind, error, trace)
        self._file.__exit__(kind, error, trace)


def _remove_leftovers(state: BatchState) -> None:
    """Files that a killed process left: nothing of them was ever sent, or nothing is pending."""
    known = {state.path(file) for file in state.files("written", "submitted", "refused", "ended")}
    for path in (*state.folder.glob("requests-[0-9]*.jsonl"), *state.folder.glob("*-[0-9]*.partial")):
        if path not in known:
            path.unlink()
