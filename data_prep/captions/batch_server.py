"""The calls to the Batch API that are made, so that nothing is created twice and no exception holds the key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
from openai.types import Batch, FileObject

from data_prep.captions.batch_state import BatchFile, BatchState
from data_prep.captions.endpoint import OPENAI_URL, failure_of, hide_key, read_api_key
from data_prep.config import LLMOptions
from data_prep.errors import InputError
from data_prep.files import atomic

_TRANSFER_TIMEOUT_S = 600.0  # of a read or write of files, up to 200 MB
_CLOCK_SKEW_S = 86_400  # between us and the server, at most, when its batches are searched
_FULL_QUEUE = ("token_limit_exceeded", "enqueued token")
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")


class OutageError(InputError):
    """The server did not answer; it may next time."""


class QueueFullError(Exception):
    """There is no room for this batch now."""


class BatchServer:
    """The calls that are made, with their exceptions made InputErrors that hold neither the key nor anything that the
    server wrote: that goes to `keep_server_said`."""

    def __init__(self, options: LLMOptions, keep_server_said: Callable[[str], None]) -> None:
        self.options, self._keep = options, keep_server_said
        self.url = options.base_url or OPENAI_URL
        # base_url is given always, so that OPENAI_BASE_URL in the environment cannot send questions elsewhere
        self.client = openai.OpenAI(
            api_key=read_api_key(options), base_url=self.url, timeout=options.timeout_s, max_retries=options.max_retries
        )
        self.transfers = self.client.with_options(timeout=max(options.timeout_s, _TRANSFER_TIMEOUT_S))

    @contextmanager
    def asked_for(self, what: str) -> Iterator[None]:
        passing = True  # whether it may go by itself
        said: str | None = None
        try:
            yield
            return
        except openai.APIStatusError as error:
            message, said = failure_of(error.status_code, error.code), error.message
            passing = error.status_code >= 500 or error.status_code == 429
        except (openai.APIConnectionError, httpx2.HTTPError):
            message = "no answer; is the server up and base_url right?"
        except (openai.APIError, json.JSONDecodeError) as error:
            message, said = "not an answer of this protocol", str(error)
        if said is not None:
            self._keep(hide_key(said, self.options))
            message += " (what the server says: batches.sqlite, run.server_said)"
        text = f"{self.url}: {what}: {message}; run again to go on, nothing that was submitted is lost"
        raise (OutageError if passing else InputError)(hide_key(text, self.options)) from None

    def upload(self, state: BatchState, file: BatchFile) -> str:
        name = f"dermvlp-{state.run_id}-{file.name}"
        if file.upload_begun:
            with self.asked_for("listing files"):
                for known in self.client.files.list(purpose="batch"):
                    if known.filename == name and known.bytes == file.num_bytes:
                        return known.id
        state.update(file.number, upload_begun=1)
        with self.asked_for(f"uploading {file.name}"), state.path(file).open("rb") as content:
            made = self.transfers.files.create(file=(name, content, "application/jsonl"), purpose="batch")
        if not isinstance(made, FileObject):  # a web page with status 200 comes back as a string
            raise InputError("base_url: not an answer of this protocol; does it end in /v1?")
        return made.id

    def find_batch(self, state: BatchState, file: BatchFile, file_id: str) -> Batch | None:
        """Our batch of this file, if the server has made one that it has not refused since."""
        wanted = _metadata(state, file)
        with self.asked_for("listing batches"):
            for batch in self.client.batches.list(limit=100):  # the newest first, page after page
                if batch.created_at < state.started_s - _CLOCK_SKEW_S:
                    return None
                # some servers do not keep metadata
                ours = batch.input_file_id == file_id or wanted.items() <= (batch.metadata or {}).items()
                if ours and batch.status != "failed":
                    return batch
        return None

    def create_batch(self, state: BatchState, file: BatchFile, file_id: str) -> Batch:
        """Never makes two of a file. Raises QueueFullError."""
        # the client's own retries would create a second one where the first answer was lost
        once = self.client.with_options(max_retries=0)
        begun = bool(file.create_begun)
        for attempt in range(self.options.max_retries + 1):
            if begun and (found := self.find_batch(state, file, file_id)) is not None:
                return found
            state.update(file.number, create_begun=1)
            begun = True
            with self.asked_for(f"creating the batch of {file.name}"):
                try:
                    return once.batches.create(
                        input_file_id=file_id,
                        endpoint="/v1/chat/completions",
                        completion_window="24h",
                        metadata=_metadata(state, file),
                    )
                except (openai.RateLimitError, openai.BadRequestError) as error:
                    if not is_full_queue(error.status_code, f"{error.code} {error.message}"):
                        raise
                    self._keep(hide_key(error.message, self.options))
                    raise QueueFullError(failure_of(error.status_code, error.code)) from None
                except (openai.APIConnectionError, openai.InternalServerError):
                    if attempt == self.options.max_retries:
                        raise
            time.sleep(_backoff_s(attempt))
        raise AssertionError("unreachable")

    def download(self, file_id: str, path: Path) -> None:
        for attempt in range(self.options.max_retries + 1):
            with self.asked_for(f"fetching {path.name}"):
                try:
                    with (
                        self.transfers.files.with_streaming_response.content(file_id) as response,
                        atomic(path) as out,
                    ):
                        for chunk in response.iter_bytes(1 << 20):
                            out.write(chunk)
                    return
                except httpx2.HTTPError:  # lost in the middle of the body, where the client does not try again
                    if attempt == self.options.max_retries:
                        raise
            time.sleep(_backoff_s(attempt))


def _backoff_s(attempt: int) -> float:
    return min(0.5 * 2.0**attempt, 8.0)


def is_full_queue(status_code: int | None, text: str) -> bool:
    if any(code in text for code in _NO_MONEY):
        return False
    return status_code == 429 or any(sign in text.lower() for sign in _FULL_QUEUE)


def _metadata(state: BatchState, file: BatchFile) -> dict[str, str]:
    return {"dermvlp_run": state.run_id, "dermvlp_file": file.name, "dermvlp_sha256": file.sha256}
