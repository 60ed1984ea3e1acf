"""A real HTTP server on this machine that speaks `/v1/chat/completions` from a script per caption."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What one request gets. With a status other than 200, `content` is the error's message."""

    content: str | None = None
    status: int = 200
    finish_reason: str = "stop"
    refusal: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    body: bytes | None = None  # instead of an answer of the protocol
    content_type: str | None = None  # of `body`
    closes_after: int | None = None  # bytes of the payload, then the connection is closed


def answer(*subcaptions: tuple[str, str]) -> Reply:
    """A well-formed answer of (aspect, text) pairs."""
    return Reply(json.dumps({"subcaptions": [{"aspect": aspect, "text": text} for aspect, text in subcaptions]}))


class LLMServer:
    """Replies by caption: the n-th request for a caption gets its n-th reply, later ones the last."""

    def __init__(self, script: Callable[[str], Sequence[Reply]]) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._in_flight = 0
        self.max_in_flight = 0
        self.num_requests: Counter[str] = Counter()
        self.num_completed: Counter[str] = Counter()  # replies wholly written
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.times_s: list[float] = []  # of arrival, by time.monotonic
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        caption = json.loads(body["messages"][-1]["content"])["caption"]
        with self._lock:
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.bodies.append(body)
            self.times_s.append(time.monotonic())
            number = self.num_requests[caption]
            self.num_requests[caption] += 1
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        replies = self._script(caption)
        reply = replies[min(number, len(replies) - 1)]
        time.sleep(reply.delay_s)
        with self._lock:
            self._in_flight -= 1
        payload = reply.body if reply.body is not None else json.dumps(_payload(reply, body["model"])).encode()
        handler.send_response(reply.status)
        html = reply.body is not None and reply.content_type is None
        handler.send_header("Content-Type", "text/html" if html else reply.content_type or "application/json")
        handler.send_header("Content-Length", str(len(payload)))
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if reply.closes_after is not None:
            handler.wfile.write(payload[: reply.closes_after])
            handler.close_connection = True
            return
        handler.wfile.write(payload)
        with self._lock:
            self.num_completed[caption] += 1


def _payload(reply: Reply, model: str) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": reply.content, "type": "error", "code": None, "param": None}}
    message = {"role": "assistant", "content": reply.content, "refusal": reply.refusal}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }


@contextmanager
def serve(script: Callable[[str], Sequence[Reply]], port: int = 0) -> Iterator[LLMServer]:
    """A server, by default on a free port, stopped on leaving. As vLLM's it says by /health that it is ready."""
    state = LLMServer(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            if self.path != "/v1/chat/completions":
                self.send_error(404)
                return
            try:
                state.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client was killed, or gave up

        def log_message(self, format: str, *args: object) -> None:
            """No lines on the test's standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
