"""A real HTTP server over a folder of shards, which can break a connection off in the middle of a file."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.url = directory, f"http://127.0.0.1:{port}/"
        self.requests: Counter[str] = Counter()  # by file name
        #: file name -> how many of the next requests for it are cut in the middle
        self.num_drops: dict[str, int] = {}
        self.num_unavailable = 0  # of the next requests that are answered with 503


@contextmanager
def serve(directory: Path) -> Iterator[ShardServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            state.requests[name] += 1
            if state.num_unavailable > 0:
                state.num_unavailable -= 1
                self.send_error(503)
                return
            path = directory / name
            if not path.is_file():
                self.send_error(404, "File not found")
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if state.num_drops.get(name, 0) > 0:
                state.num_drops[name] -= 1
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # a reader that has what it wanted
                super().handle()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = ShardServer(directory, server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
