"""Captions into sub-captions by a language model behind any OpenAI-compatible server.

The pure half, prompt and check of the answer, is in `answers.py`. `LLMSplitter.prepare` asks, `decompose` reads the
ledger and needs no network, so worker processes build their own from the configuration.

What happens to failures:
- an answer that cannot be used (refusal, cut off, not the schema, nothing of it grounded) is asked again up to
  `max_attempts` times, then kept as failed and not asked again in later runs (unless `retry_failed`);
- no answer (429, 5xx, 400, timeout, lost connection, after the client's own retries) is kept as unanswered and asked
  again in the next run;
- both are served by `on_failure`, and `Decomposition.failure` says why;
- what cannot get better by going on stops the run with InputError: key or model refused (401, 403, 404), no server at
  the address, or so many calls without an answer in a row that the server must be down. What was answered is kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit, urlunsplit

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from openai.types.shared_params import ResponseFormatJSONSchema
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.captions.answers import ANSWER_SCHEMA, Unusable, format_prompt, hash_prompt, parse_answer, read_prompt
from data_prep.captions.decompose import Decomposition, Dropped
from data_prep.captions.ledger import Answer, Ledger, Status
from data_prep.captions.rules import split
from data_prep.config import LLMDecomposer
from data_prep.errors import InputError

_LOG = logging.getLogger(__name__)
_OPENAI_URL = "https://api.openai.com/v1"
_RESPONSE_FORMAT: ResponseFormatJSONSchema = {
    "type": "json_schema",
    "json_schema": {"name": "subcaptions", "strict": True, "schema": ANSWER_SCHEMA},
}
_LOG_EVERY_S = 30.0
#: This many calls in a row without any answer, times the concurrency: the server is down, not the caption difficult.
_STOP_AFTER = 4

# ---------------------------------------------------------------------------------------------- asking


class _NoAnswerError(Exception):
    """No answer came for this caption; others may be answered."""


class LLMSplitter:
    """The Decomposer that asks a language model. Build one in each process; opens the ledger when first used."""

    def __init__(self, config: LLMDecomposer, ledger_path: Path, retry_failed: bool = False) -> None:
        self._config = config
        self._ledger_path = ledger_path
        self._retry_failed = retry_failed
        self._prompt = read_prompt(config.prompt)
        self._prompt_hash = hash_prompt(self._prompt)
        self._ledger_opened: Ledger | None = None

    @property
    def name(self) -> str:
        return f"llm:{self._config.model}:{self._prompt_hash[:12]}"

    @property
    def _ledger(self) -> Ledger:
        if self._ledger_opened is None:
            self._ledger_opened = Ledger(self._ledger_path, self._config.model, self._prompt_hash)
        return self._ledger_opened

    def decompose(self, caption: str) -> Decomposition:
        """From the ledger. Raises InputError for a caption that `prepare` was not given."""
        answer = self._ledger.get(caption)
        if answer is None:
            raise InputError(
                f"{self._ledger_path}: holds no answer of {self.name} for a caption; run the preparation again"
            )
        failure, dropped = answer.failure or "no usable answer", tuple[Dropped, ...]()
        if answer.raw is not None and answer.status != "unanswered":
            parsed = parse_answer(answer.raw, caption)
            if answer.status == "answered" and isinstance(parsed, Decomposition):
                return parsed
            dropped = parsed.dropped
            # an answer that was usable under earlier checks and is not under today's
            failure = parsed.reason if answer.status == "answered" and isinstance(parsed, Unusable) else failure
        if self._config.on_failure == "skip":
            return Decomposition((), dropped, made_by="llm", failure=failure)
        by_rules = split(caption)
        return Decomposition(by_rules.subcaptions, dropped + by_rules.dropped, made_by="rules", failure=failure)

    def prepare(self, captions: Iterable[str]) -> None:
        """Ask for every distinct caption without a final answer in the ledger, `concurrency` at a time.

        Raises InputError as the module says; the key never enters its message.
        """
        missing = [caption for caption in dict.fromkeys(captions) if self._must_ask(caption)]
        if not missing:
            return
        key = read_api_key(self._config)
        run = _Run(self._config, self._ledger, self._prompt, key)
        with _progress(len(missing), run.summary) as advance:
            try:
                asyncio.run(run.ask_all(missing, advance))
            except InputError as error:
                raise InputError(
                    _scrub(f"{error}; {run.summary()}; answers so far are in {self._ledger_path}", key)
                ) from None
        _LOG.info("%s: %s", self.name, run.summary())
        if run.outcomes["unanswered"]:
            _LOG.warning(
                "%d captions got no answer (%s): served by on_failure=%s now, asked again in the next run",
                run.outcomes["unanswered"],
                run.last_failure,
                self._config.on_failure,
            )

    def _must_ask(self, caption: str) -> bool:
        answer = self._ledger.get(caption)
        return answer is None or answer.status == "unanswered" or (answer.status == "failed" and self._retry_failed)


def read_api_key(config: LLMDecomposer) -> str:
    """From the environment variable that the configuration names. A server of one's own may need none."""
    key = os.environ.get(config.api_key_env, "").strip()
    if key:
        return key
    if config.base_url is None:
        raise InputError(
            f"decomposer.api_key_env: the environment variable {config.api_key_env} is not set; "
            "export it, or give base_url"
        )
    return "not-needed"


def _scrub(text: str, key: str) -> str:
    """Servers repeat the key they refuse, sometimes."""
    return text.replace(key, "***") if key != "not-needed" else text


def _shown(url: str) -> str:
    """Without a user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class _Run:
    """One `prepare`: what it has asked so far, and when to give up."""

    def __init__(self, config: LLMDecomposer, ledger: Ledger, prompt: str, key: str) -> None:
        self._config, self._ledger, self._prompt, self._key = config, ledger, prompt, key
        self._url = config.base_url or _OPENAI_URL
        self.outcomes: Counter[str] = Counter()
        self.last_failure = ""
        self._num_unanswered_in_a_row = 0

    def summary(self) -> str:
        return ", ".join(f"{self.outcomes[status]} {status}" for status in ("answered", "failed", "unanswered"))

    async def ask_all(self, captions: list[str], advance: Callable[[], None]) -> None:
        todo = iter(captions)
        # base_url is given always, so that OPENAI_BASE_URL in the environment cannot send captions elsewhere
        async with openai.AsyncOpenAI(
            api_key=self._key, base_url=self._url, timeout=self._config.timeout_s, max_retries=self._config.max_retries
        ) as client:

            async def work() -> None:
                for caption in todo:
                    await self._ask(client, caption)
                    advance()

            tasks = [asyncio.create_task(work()) for _ in range(min(self._config.concurrency, len(captions)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: openai.AsyncOpenAI, caption: str) -> None:
        answer = await self._attempts(client, caption)
        self._ledger.put(caption, answer)
        self.outcomes[answer.status] += 1
        self.last_failure = answer.failure or self.last_failure
        self._num_unanswered_in_a_row = self._num_unanswered_in_a_row + 1 if answer.status == "unanswered" else 0
        if self._num_unanswered_in_a_row >= _STOP_AFTER * self._config.concurrency:
            raise InputError(
                f"{_shown(self._url)}: {self._num_unanswered_in_a_row} calls in a row without an answer, the last for: "
                f"{answer.failure}; see to the server and run again"
            )

    async def _attempts(self, client: openai.AsyncOpenAI, caption: str) -> Answer:
        """Ask until an answer can be used, at most `max_attempts` times."""
        raw: str | None = None
        finish_reason: str | None = None
        num_in = num_out = num_attempts = 0
        for _ in range(self._config.max_attempts):
            num_attempts += 1
            status: Status = "failed"
            try:
                completion = await self._call(client, caption)
            except _NoAnswerError as error:
                status, failure = "unanswered", str(error)
                break
            if completion.usage is not None:
                num_in += completion.usage.prompt_tokens
                num_out += completion.usage.completion_tokens
            raw, finish_reason, why = _judge(completion, caption)
            failure = why or ""
            if why is None:
                status = "answered"
                break
        scrubbed = None if raw is None else _scrub(raw, self._key)
        why_failed = _scrub(failure, self._key) or None
        return Answer(status, scrubbed, finish_reason, num_in, num_out, num_attempts, why_failed)

    async def _call(self, client: openai.AsyncOpenAI, caption: str) -> ChatCompletion:
        # OpenAI's newer models refuse max_tokens, most other servers know nothing else
        limit = openai.omit if self._config.base_url is None else self._config.max_output_tokens
        new_limit = self._config.max_output_tokens if self._config.base_url is None else openai.omit
        try:
            completion = await client.chat.completions.create(
                model=self._config.model,
                messages=cast(list[ChatCompletionMessageParam], format_prompt(caption, self._prompt)),
                response_format=_RESPONSE_FORMAT,
                max_tokens=limit,
                max_completion_tokens=new_limit,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise InputError(
                f"{_shown(self._url)}: HTTP {error.status_code} for model {self._config.model!r}: {error.message}; "
                f"check decomposer.model, decomposer.base_url and the key in {self._config.api_key_env}"
            ) from None
        except openai.APIStatusError as error:
            raise _NoAnswerError(_scrub(f"HTTP {error.status_code}: {error.message}"[:300], self._key)) from None
        except openai.APITimeoutError:
            raise _NoAnswerError(f"no answer within {self._config.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            if _nobody_there(error):
                raise InputError(
                    f"{_shown(self._url)}: cannot connect; start the server or correct decomposer.base_url"
                ) from None
            raise _NoAnswerError("connection lost") from None
        except (openai.APIError, json.JSONDecodeError) as error:
            raise _NoAnswerError(_scrub(f"not an answer of this protocol: {error}"[:300], self._key)) from None
        if not isinstance(completion, ChatCompletion):  # a web page with status 200 comes back as a string
            raise _NoAnswerError("not an answer of this protocol; does decomposer.base_url end in /v1?")
        return completion


def _nobody_there(error: BaseException) -> bool:
    """Whether the connection was refused or the host name does not exist: the innermost cause tells."""
    cause: BaseException | None = error
    while cause is not None:
        # socket.gaierror, by its class, without the network stack's own exceptions in between
        if isinstance(cause, ConnectionRefusedError) or type(cause).__name__ == "gaierror":
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _judge(completion: ChatCompletion, caption: str) -> tuple[str | None, str | None, str | None]:
    """(raw answer, finish reason, why it cannot be used or None)."""
    if not completion.choices:
        return None, None, "no choices in the answer"
    choice = completion.choices[0]
    raw, refusal, finish_reason = choice.message.content, choice.message.refusal, str(choice.finish_reason)
    if refusal:
        return refusal, finish_reason, "refused by the model"
    if finish_reason == "content_filter":
        return raw, finish_reason, "stopped by the content filter"
    if finish_reason == "length":
        return raw, finish_reason, "cut off at max_output_tokens"
    if not (raw or "").strip():
        return raw, finish_reason, "empty answer"
    parsed = parse_answer(raw or "", caption)
    return raw, finish_reason, parsed.reason if isinstance(parsed, Unusable) else None


# ---------------------------------------------------------------------------------------------- progress


@contextmanager
def _progress(num_captions: int, summary: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, else a log line now and then; yields what to call after each caption."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("captions"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[summary]}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task("captions", total=num_captions, summary="")
            yield lambda: progress.update(task, advance=1, summary=summary())
        return
    num_done, last_s = 0, time.monotonic()

    def advance() -> None:
        nonlocal num_done, last_s
        num_done += 1
        if time.monotonic() - last_s >= _LOG_EVERY_S:
            last_s = time.monotonic()
            _LOG.info("captions: %d of %d asked, %s", num_done, num_captions, summary())

    yield advance
