"""Asking an OpenAI-compatible server, many calls in flight: items of a task in, answers in the ledger.

What happens to failures:
- an answer that cannot be used (refusal, not the schema, nothing of it grounded: another question's answer) is asked
  again up to `max_attempts` times, then kept as failed and not asked again in later runs (unless `retry_failed`); one
  that was cut off is asked again once, with twice the room. The raw answers of all attempts are kept;
- no answer (429, 5xx, 400, timeout, lost connection, after the client's own retries, which wait as Retry-After says) is
  kept as unanswered and asked again in the next run;
- what cannot get better by going on stops the run with InputError: key or model refused (401, 403, 404), no server at
  the address, a ledger that cannot be written, or so many calls without an answer in a row that the server must be
  down. What was answered is kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

import openai

from data_prep.captions.completions import CUT_OFF, Judged, NotACompletionError, judge
from data_prep.captions.endpoint import OPENAI_URL, failure_of, hide_key, read_api_key
from data_prep.captions.ledger import Answer, Ledger, Status
from data_prep.captions.limits import (
    Budget,
    Paces,
    PromptTokens,
    checked_max_usd,
    cost_usd,
    format_usd,
    num_text_bytes,
)
from data_prep.captions.tasks import Task, request_body, request_key
from data_prep.errors import InputError
from data_prep.progress import Progress

Item = TypeVar("Item")

_LOG = logging.getLogger(__name__)
#: This many calls in a row without any answer, times the concurrency: the server is down, not the question difficult.
_STOP_AFTER = 4
_REFUSED = (401, 403, 404)  # key or model
_OUT_OF_MONEY = "not asked again: max_usd is used up"


@dataclass
class AskSummary:
    """What became of the items of one run. `str` gives a line for people."""

    task: str
    num_distinct: int = 0  # questions among the items
    num_already: int = 0  # of them with a final answer in the ledger before
    num_answered: int = 0
    num_failed: int = 0
    num_unanswered: int = 0
    num_left: int = 0  # not asked, for `stopped_by`
    stopped_by: str | None = None  # "limit" or "max_usd"
    #: unusable answers by reason, also where a later attempt was usable
    unusable: Counter[str] = field(default_factory=Counter)
    num_tokens_in: int = 0
    num_tokens_out: int = 0
    usd: float | None = None  # of this run; None: the configuration has no price of the model
    elapsed_s: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.num_answered} answered, {self.num_failed} failed, {self.num_unanswered} unanswered"]
        parts.append(f"{self.num_already} known before")
        parts.append(f"{self.num_tokens_in} + {self.num_tokens_out} tokens")
        if self.usd is not None:
            parts.append(f"{format_usd(self.usd)} dollars")
        if self.stopped_by is not None:
            parts.append(f"stopped by {self.stopped_by} with {self.num_left} left to ask")
        return ", ".join(parts)


def ask(
    task: Task[Item],
    items: Iterable[Item],
    ledger: Ledger,
    *,
    retry_failed: bool = False,
    limit: int | None = None,
    max_usd: float | None = None,
) -> AskSummary:
    """Ask about every distinct item without a final answer in the ledger, `concurrency` at a time.

    `items` is streamed: only those in flight and eight bytes of each question's hash are held. `limit`: at most so many
    questions are asked. `max_usd` (default: the options') bounds what this run pays, by the tokens that the server
    reports and the price table; calls in flight count with the most they can cost, calls without an answer with
    nothing. Raises InputError as the module and `limits.checked_max_usd` say; neither the key nor an item nor anything
    that the server wrote enters its message.
    """
    run = _Run(task, ledger, retry_failed, limit, checked_max_usd(task.options, limit, max_usd))
    start_s = time.perf_counter()
    todo = run.questions(items)
    first = next((question for question in todo if question is not None), None)
    if first is not None:
        key = read_api_key(task.options)
        with ledger.exclusive(), Progress(f"asking for {task.name}", "questions") as progress:
            # another run may have asked the first while this one had no lock
            todo = chain((first,) if run.must_ask(first.key) else (), todo)
            try:
                asyncio.run(run.ask_all(todo, key, progress))
            except InputError as error:
                message = f"{error}; {run.summary}; answers so far are in {ledger.path}"
                raise InputError(hide_key(message, task.options)) from None
    run.summary.elapsed_s = time.perf_counter() - start_s
    _LOG.info("%s by %s: %s", task.name, task.options.model, run.summary)
    if run.summary.num_unanswered:
        _LOG.warning(
            "%d questions got no answer (the last: %s): served by on_failure now, asked again in the next run; what "
            "the server says is in %s",
            run.summary.num_unanswered,
            run.last_failure,
            ledger.path.name,
        )
    return run.summary


# ---------------------------------------------------------------------------------------------- one run


class _NoAnswerError(Exception):
    """No answer came for this question, for a reason in fixed phrases.

    `server_said` is for the ledger alone. `stop`: why no other question will be answered either.
    """

    def __init__(self, reason: str, server_said: str | None = None, stop: str | None = None) -> None:
        super().__init__(reason)
        self.server_said, self.stop = server_said, stop


@dataclass(frozen=True)
class _Question(Generic[Item]):
    key: str
    item: Item


#: what the call at hand is estimated to take: for the client's own retries, which are paced too
_NUM_TOKENS: ContextVar[int] = ContextVar("num_tokens", default=0)
#: So many items are looked up in the ledger before other calls get their turn.
_LOOK_UP_AT_ONCE = 32


class _Run(Generic[Item]):
    """One `ask`: what it has asked so far, and when to stop."""

    def __init__(
        self, task: Task[Item], ledger: Ledger, retry_failed: bool, limit: int | None, max_usd: float | None
    ) -> None:
        self._task, self._options, self._ledger = task, task.options, ledger
        self._final: tuple[Status | None, ...] = ("answered",) if retry_failed else ("answered", "failed")
        self._limit = float("inf") if limit is None else limit
        self._price = self._options.prices.get(self._options.model)
        self._paces = Paces(self._options)
        self._budget = Budget(max_usd)
        self._sizes = PromptTokens(task, ledger)
        self._url = self._options.base_url or OPENAI_URL
        self._num_begun = 0
        self._num_unanswered_in_a_row = 0
        self._stop: str | None = None
        self.last_failure = ""
        self.summary = AskSummary(task.name, usd=None if self._price is None else 0.0)

    # -- what to ask

    def must_ask(self, key: str) -> bool:
        return self._ledger.status(key) not in self._final

    def questions(self, items: Iterable[Item]) -> Iterator[_Question[Item] | None]:
        """Distinct questions to ask, and None now and then where none is found for long. After a stop the rest is
        counted, not given."""
        seen: set[int] = set()
        num_since_given = 0
        for item in items:
            num_since_given += 1
            if num_since_given % _LOOK_UP_AT_ONCE == 0:
                yield None
            key = request_key(self._task, self._task.identity(item))
            short_key = int(key[:16], 16)  # 64 of 256 bits: among a million, two alike once in 40 million runs
            if short_key in seen:
                continue
            seen.add(short_key)
            self.summary.num_distinct += 1
            if not self.must_ask(key):
                self.summary.num_already += 1
                continue
            if self._num_begun >= self._limit:
                self.summary.stopped_by = self.summary.stopped_by or "limit"
            if self.summary.stopped_by is not None:
                self.summary.num_left += 1
                continue
            self._num_begun += 1
            num_since_given = 0
            yield _Question(key, item)

    async def ask_all(self, todo: Iterator[_Question[Item] | None], key: str, progress: Progress) -> None:
        # base_url is given always, so that OPENAI_BASE_URL in the environment cannot send questions elsewhere
        async with openai.AsyncOpenAI(
            api_key=key,
            base_url=self._url,
            timeout=self._options.timeout_s,
            max_retries=self._options.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._pace_retry]})
            if self._paces
            else None,
        ) as client:

            async def work() -> None:
                for question in todo:
                    if question is None:
                        await asyncio.sleep(0)
                        continue
                    await self._ask(client, question)
                    progress.advance()

            workers = [asyncio.create_task(work()) for _ in range(self._options.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _pace_retry(self, request: Any) -> None:
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            await self._paces.acquire(_NUM_TOKENS.get())

    # -- one question

    async def _ask(self, client: openai.AsyncOpenAI, question: _Question[Item]) -> None:
        answer = await self._attempts(client, question)
        if answer is None:
            self.summary.stopped_by = "max_usd"
            self.summary.num_left += 1
            return
        self._ledger.put(question.key, self._task, answer)
        if answer.status == "answered":
            self.summary.num_answered += 1
        elif answer.status == "failed":
            self.summary.num_failed += 1
        else:
            self.summary.num_unanswered += 1
        self.last_failure = answer.failure or self.last_failure
        if self._stop is not None:
            raise InputError(self._stop)
        self._num_unanswered_in_a_row = self._num_unanswered_in_a_row + 1 if answer.status == "unanswered" else 0
        if self._num_unanswered_in_a_row >= _STOP_AFTER * self._options.concurrency:
            raise InputError(
                f"{self._url}: {self._num_unanswered_in_a_row} calls in a row without an answer, the last for: "
                f"{answer.failure}; see to the server and run again; what it says is in the ledger"
            )

    async def _attempts(self, client: openai.AsyncOpenAI, question: _Question[Item]) -> Answer | None:
        """Ask until an answer can be used, at most `max_attempts` times. None: there is no money for the first."""
        body = request_body(self._task, question.item)
        limit_name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        judged: list[Judged] = []
        latency_s: float | None = None
        unanswered: _NoAnswerError | None = None
        num_attempts = 0
        for _ in range(self._options.max_attempts):
            num_in = self._sizes.at_most(body["messages"])
            bound_usd = 0.0 if self._price is None else cost_usd(self._price, num_in, body[limit_name])
            if not await self._budget.reserve(bound_usd):
                if not judged:
                    return None
                self.summary.stopped_by, unanswered = "max_usd", _NoAnswerError(_OUT_OF_MONEY)
                break
            num_attempts += 1
            paid_usd = 0.0
            try:
                start_s, completion = await self._call(client, body, body[limit_name])
                latency_s = time.perf_counter() - start_s
                judged.append(judge(self._task, question.item, completion))
                paid_usd = self._count(judged[-1], bound_usd)
            except NotACompletionError as error:
                unanswered = _NoAnswerError(str(error))
                break
            except _NoAnswerError as error:
                unanswered, self._stop = error, error.stop or self._stop
                break
            finally:
                self._budget.settle(bound_usd, paid_usd)
            failure = judged[-1].failure
            if failure is None:
                break
            self.summary.unusable[failure] += 1
            if failure == CUT_OFF:
                if body[limit_name] > self._options.max_output_tokens:
                    break
                body[limit_name] *= 2
        return self._answer(judged, unanswered, num_attempts, num_text_bytes(body["messages"]), latency_s)

    def _answer(
        self,
        judged: list[Judged],
        unanswered: _NoAnswerError | None,
        num_attempts: int,
        num_bytes: int,
        latency_s: float | None,
    ) -> Answer:
        earlier = judged if unanswered is not None else judged[:-1]
        last = Judged(unanswered.server_said, None, str(unanswered)) if unanswered is not None else judged[-1]
        status: Status = "answered" if last.failure is None else "failed" if unanswered is None else "unanswered"
        return Answer(
            status,
            raw=self._without_key(last.raw),
            finish_reason=last.finish_reason,
            num_tokens_in=sum(one.num_tokens_in or 0 for one in judged),
            num_tokens_out=sum(one.num_tokens_out or 0 for one in judged),
            num_attempts=num_attempts,
            failure=last.failure,
            raw_failures=tuple((one.failure or "", self._without_key(one.raw)) for one in earlier),
            num_bytes_in=num_bytes,
            latency_s=latency_s,
        )

    def _without_key(self, text: str | None) -> str | None:
        return None if text is None else hide_key(text, self._options)

    def _count(self, judged: Judged, bound_usd: float) -> float:
        """Dollars paid for a reply; without a word from the server, the most it can have been."""
        num_in, num_out = judged.num_tokens_in, judged.num_tokens_out
        if num_in is not None:
            self._sizes.observe(num_in)
        self.summary.num_tokens_in += num_in or 0
        self.summary.num_tokens_out += num_out or 0
        if self._price is None:
            return 0.0
        usd = bound_usd if num_in is None or num_out is None else cost_usd(self._price, num_in, num_out)
        self.summary.usd = (self.summary.usd or 0.0) + usd
        return usd

    async def _call(
        self, client: openai.AsyncOpenAI, body: dict[str, Any], max_output_tokens: int
    ) -> tuple[float, object]:
        """When the call began, by `time.perf_counter`, and the reply, decoded from JSON."""
        if self._paces:
            num_tokens = self._sizes.estimated(body["messages"]) + max_output_tokens
            _NUM_TOKENS.set(num_tokens)
            await self._paces.acquire(num_tokens)
        start_s = time.perf_counter()
        try:
            # the body as a batch file would hold it; its types are the server's business
            return start_s, await client.post("/chat/completions", cast_to=object, body=body)
        except openai.APIStatusError as error:
            failure, stop = failure_of(error.status_code, error.code), None
            if error.status_code in _REFUSED:
                stop = (
                    f"{self._url}: {failure} for model {self._options.model!r}; check model, base_url and the key in "
                    f"{self._options.api_key_env}; what the server says is in the ledger"
                )
            raise _NoAnswerError(failure, error.message, stop) from None
        except openai.APITimeoutError:
            raise _NoAnswerError(f"no answer within {self._options.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            if _nobody_there(error):
                raise InputError(f"{self._url}: cannot connect; start the server or correct base_url") from None
            raise _NoAnswerError("connection lost") from None
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _NoAnswerError("not an answer of this protocol", str(error)) from None


def _nobody_there(error: BaseException) -> bool:
    """Whether the connection was refused or the host name does not exist: the innermost cause tells."""
    cause: BaseException | None = error
    while cause is not None:
        # socket.gaierror, by its class, without the network stack's own exceptions in between
        if isinstance(cause, ConnectionRefusedError) or type(cause).__name__ == "gaierror":
            return True
        cause = cause.__cause__ or cause.__context__
    return False
