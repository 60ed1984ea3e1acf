"""A real HTTP server on this machine that speaks the Files and Batch API, with a script for what goes wrong; and
`/v1/chat/completions`, so that both ways of asking meet the same answers.

It counts what would be paid: every request of a batch that was run, by custom_id. At a chosen event it can SIGKILL its
client, before it answers.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Line:
    """What one request of a batch comes to."""

    content: str | None = None
    status: int = 200
    finish_reason: str = "stop"
    refusal: str | None = None
    missing: bool = False  # in neither file
    times: int = 1  # in the file


@dataclass(frozen=True)
class Outcome:
    """What becomes of one batch."""

    status: Literal["completed", "expired", "failed", "cancelled"] = "completed"
    share_done: float = 1.0  # of the requests, from the first; the others are `batch_expired` in the error file
    output: bool = True  # False: completed, and no file at all
    error: dict[str, Any] | None = None  # of a batch that fails validation
    num_polls: int = 1  # in progress for so many
    foreign_line: bool = False  # with a custom_id that is not in the input


@dataclass
class _Batch:
    body: dict[str, Any]
    outcome: Outcome
    num_polls: int = 0


@dataclass(frozen=True)
class Fault:
    """What the n-th request of an event gets instead of its reply, from 0."""

    event: str  # "upload", "create", "retrieve", "list", "content"
    number: int
    status: int | None = None  # this error; None: the connection is closed without a word
    message: str = "scripted"
    code: str | None = None
    done: bool = False  # True: what was asked for is done all the same


class BatchApi:
    """State of the server. `answer(body, n)`: to the n-th asking of a request; `outcome(n)`: of the n-th batch."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any], int], Line],
        outcome: Callable[[int], Outcome],
        faults: Sequence[Fault],
    ) -> None:
        self._answer, self._outcome = answer, outcome
        self._faults = {(fault.event, fault.number): fault for fault in faults}
        self.lock = threading.RLock()
        self.url = ""
        self.files: dict[str, tuple[str, bytes]] = {}  # id -> name, content
        self.batches: dict[str, _Batch] = {}
        self.events: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()  # custom_id -> answers that were made
        self.called: Counter[bytes] = Counter()  # body of a call -> how often
        self.in_queue_limit: int | None = None  # requests in batches that have not ended
        self.num_content_bytes: int | None = None  # of a file's content that is sent before the client is killed
        self.kill: tuple[str, int, str] | None = None  # event, number, "before" or "after" it is done
        self.pid = 0

    # -- events

    def begin(self, event: str) -> tuple[int, Fault | None]:
        number = self.events[event]
        self.events[event] += 1
        if self.kill_if((event, number, "before")):
            return number, Fault(event, number)
        return number, self._faults.get((event, number))

    def kill_if(self, moment: tuple[str, int, str]) -> bool:
        if self.kill != moment:
            return False
        self.kill = None
        os.kill(self.pid, signal.SIGKILL)
        return True

    # -- what is done

    def upload(self, name: str, purpose: str, content: bytes) -> dict[str, Any]:
        assert purpose == "batch"
        file_id = self.add_file(name, content)
        return self.file(file_id)

    def add_file(self, name: str, content: bytes) -> str:
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = (name, content)
        return file_id

    def file(self, file_id: str) -> dict[str, Any]:
        name, content = self.files[file_id]
        times = {"created_at": int(time.time()), "expires_at": None}
        return {
            "id": file_id, "object": "file", "bytes": len(content), "filename": name, "purpose": "batch",
            "status": "processed", **times,
        }  # fmt: skip

    def requests(self, file_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[file_id][1].splitlines()]

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        number = len(self.batches)
        batch_id = f"batch_{number}"
        requests = self.requests(body["input_file_id"])
        outcome = self._outcome(number)
        ids = [request["custom_id"] for request in requests]
        if len(set(ids)) < len(ids):
            outcome = Outcome("failed", error={"code": "duplicate_custom_id", "message": "twice", "line": 1})
        queued = sum(
            len(self.requests(batch.body["input_file_id"]))
            for batch in self.batches.values()
            if batch.body["status"] == "in_progress"
        )
        if self.in_queue_limit is not None and queued + len(requests) > self.in_queue_limit:
            error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for tiny", "line": None}
            outcome = Outcome("failed", error=error)
        made = {
            "id": batch_id, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"], "status": "validating", "created_at": int(time.time()),
            "metadata": body.get("metadata"), "output_file_id": None, "error_file_id": None, "errors": None,
            "request_counts": {"total": len(requests), "completed": 0, "failed": 0},
        }  # fmt: skip
        self.batches[batch_id] = _Batch(made, outcome)
        if outcome.status != "failed":
            made["status"] = "in_progress"
            self._work(batch_id)
        return made

    def call(self, content: bytes) -> dict[str, Any]:
        number = self.called[content]
        self.called[content] += 1
        body = json.loads(content)
        return completion(self._answer(body, number), body["model"])

    def retrieve(self, batch_id: str) -> dict[str, Any] | None:
        batch = self.batches.get(batch_id)
        if batch is None:
            return None
        batch.num_polls += 1
        if batch.num_polls > batch.outcome.num_polls and batch.body["status"] in ("validating", "in_progress"):
            batch.body["status"] = batch.outcome.status
            if batch.outcome.status == "failed":
                batch.body["errors"] = {"object": "list", "data": [batch.outcome.error]}
            else:
                batch.body |= batch.body.pop("_files")
        return {key: value for key, value in batch.body.items() if not key.startswith("_")}

    def _work(self, batch_id: str) -> None:
        """Answers are made, and paid, when a batch is accepted; they are shown when it ends."""
        batch = self.batches[batch_id]
        requests = self.requests(batch.body["input_file_id"])
        num_done = round(len(requests) * batch.outcome.share_done)
        output: list[bytes] = []
        errors: list[bytes] = []
        for position, request in enumerate(requests):
            custom_id = request["custom_id"]
            if position >= num_done:
                error = {"code": "batch_expired", "message": "This request could not be executed before the end."}
                errors.append(_line(custom_id, None, error))
                continue
            line = self._answer(request["body"], self.paid[custom_id])
            self.paid[custom_id] += 1
            if line.missing:
                continue
            body = completion(line, request["body"]["model"])
            target = output if line.status == 200 else errors
            target += [
                _line(custom_id, {"status_code": line.status, "request_id": "r", "body": body}, None)
            ] * line.times
        if batch.outcome.foreign_line:
            output.append(
                _line("0" * 64, {"status_code": 200, "request_id": "r", "body": completion(Line("{}"), "x")}, None)
            )
        output.reverse()  # in any order
        files: dict[str, str | None] = {"output_file_id": None, "error_file_id": ""}
        if output and batch.outcome.output:
            files["output_file_id"] = self.add_file("output.jsonl", b"".join(output))
        if errors and batch.outcome.output:
            files["error_file_id"] = self.add_file("errors.jsonl", b"".join(errors))
        batch.body["_files"] = files


def completion(line: Line, model: str) -> dict[str, Any]:
    """The body of a response."""
    if line.status != 200:
        return {"error": {"message": line.content, "type": "error", "code": None, "param": None}}
    message = {"role": "assistant", "content": line.content, "refusal": line.refusal}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": line.finish_reason, "logprobs": None}],
        "usage": {"prompt_tokens": 700, "completion_tokens": 50, "total_tokens": 750},
    }  # fmt: skip


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    result = {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(result).encode() + b"\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: BatchApi

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/files":
            fields = _multipart(self.headers["Content-Type"], content)
            purpose, (name, data) = fields["purpose"][1].decode(), fields["file"]
            self._do("upload", lambda: self.api.upload(name or "", purpose, data))
        elif self.path == "/v1/chat/completions":
            self._do("call", lambda: self.api.call(content))
        elif self.path == "/v1/batches":
            self._do("create", lambda: self.api.create(json.loads(content)))
        else:
            self._error(404, "no such path")

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = url.path.split("/")[2:]
        if parts == ["files"]:
            self._do("list", lambda: _page([self.api.file(file_id) for file_id in self.api.files], query))
        elif parts == ["batches"]:
            self._do("list", lambda: _page([batch.body for batch in reversed(self.api.batches.values())], query))
        elif parts[0] == "batches":
            self._do("retrieve", lambda: self.api.retrieve(parts[1]))
        elif parts[0] == "files" and parts[2:] == ["content"]:
            self._do("content", lambda: self.api.files[parts[1]][1])
        else:
            self._error(404, "no such path")

    def _do(self, event: str, act: Callable[[], dict[str, Any] | bytes | None]) -> None:
        with self.api.lock:
            number, fault = self.api.begin(event)
            reply = act() if fault is None or fault.done else None
            if reply is not None:
                self.api.kill_if((event, number, "after"))
        if fault is not None and fault.status is None:
            if isinstance(reply, bytes):  # closed in the middle of the body
                self._send(200, reply, reply[: len(reply) // 2])
            self.close_connection = True
            return
        if fault is not None:
            self._error(fault.status or 0, fault.message, fault.code)
        elif reply is None:
            self._error(404, "no such batch")
        elif isinstance(reply, bytes):
            self._send(200, reply, reply)
        else:
            self._send(200, json.dumps(reply).encode())

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        body = {"error": {"message": message, "type": "error", "code": code, "param": None}}
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, payload: bytes, sent: bytes | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if sent is None else "application/octet-stream")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(payload if sent is None else sent)

    def log_message(self, format: str, *args: object) -> None:
        """No lines on the test's standard error."""


def _page(items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """At most two at a time, so that paging is exercised."""
    ids = [item["id"] for item in items]
    begin = ids.index(query["after"]) + 1 if "after" in query else 0
    shown = [
        {key: value for key, value in item.items() if not key.startswith("_")} for item in items[begin : begin + 2]
    ]
    return {"object": "list", "data": shown, "has_more": begin + 2 < len(items)}


def _multipart(content_type: str, content: bytes) -> dict[str, tuple[str | None, bytes]]:
    """Field -> (file name, bytes)."""
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    message = parser.parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + content)
    fields: dict[str, tuple[str | None, bytes]] = {}
    for part in message.iter_parts():
        data = part.get_payload(decode=True)
        assert isinstance(data, bytes)
        fields[str(part.get_param("name", header="content-disposition"))] = (part.get_filename(), data)
    return fields


@contextmanager
def serve_batches(
    answer: Callable[[dict[str, Any], int], Line],
    outcome: Callable[[int], Outcome] = lambda _: Outcome(),
    faults: Sequence[Fault] = (),
) -> Iterator[BatchApi]:
    """A server on a free port, stopped on leaving. `answer(body, n)`: what the n-th asking of a request comes to."""
    api = BatchApi(answer, outcome, faults)
    handler = type("Handler", (_Handler,), {"api": api})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that were killed
    api.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
