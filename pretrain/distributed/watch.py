"""A rank that dies takes the others down within a minute, whatever they are at.

gloo sees at once that a connection closed, but only in a collective. NCCL over shared memory or InfiniBand may see
nothing and wait out `engine.collective_timeout_minutes`, with the process inside a CUDA call. So each rank holds a TCP
connection to rank 0 on which nothing is sent: a dead process's kernel closes it, a dead node fails its keepalives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Self

from pretrain.distributed import comm

_LEAVES = b"."
_CONNECT_S = 30.0
#: for the main thread to end by itself, with a better message: often it has the same trouble as the rank that is gone
_GRACE_S = 5.0


class PeerWatch:
    """While entered, the loss of a rank ends this process with status 1. One rank has nobody to watch.

    Left without an exception, this rank is known to be done; with one, the others end as if it had died.
    """

    def __enter__(self) -> Self:
        self._connections: list[socket.socket] = []
        self._left, self._connected = threading.Event(), threading.Event()
        if comm.world_size() > 1 and "MASTER_ADDR" in os.environ:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()  # this rank says itself how it ends
        if error is not None:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # at once: what comes before the process's end can take long
        else:
            if comm.world_size() > 1 and "MASTER_ADDR" in os.environ:
                self._connected.wait(_CONNECT_S)  # of a run of no length: who has no connection cannot be told
            for connection in self._connections:
                _send(connection, _LEAVES)

    def _start(self) -> None:
        server = socket.create_server(("", 0), backlog=comm.world_size()) if comm.rank() == 0 else None
        own = (server.getsockname()[1], secrets.token_bytes(16)) if server is not None else None
        port, token = comm.from_rank_0(own)
        if server is None:
            self._connect((os.environ["MASTER_ADDR"], port), token)
        threading.Thread(target=self._run, args=(server, token), name="peer watch", daemon=True).start()
        comm.barrier()  # a rank that dies from here on has a connection to miss it by

    def _run(self, server: socket.socket | None, token: bytes) -> None:
        if server is not None:
            self._accept(server, token)
        self._connected.set()
        self._watch()

    def _accept(self, server: socket.socket, token: bytes) -> None:
        """A connection from each other rank; who does not know the token is not one."""
        deadline = time.monotonic() + _CONNECT_S
        with server:
            while len(self._connections) < comm.world_size() - 1 and (left_s := deadline - time.monotonic()) > 0:
                server.settimeout(left_s)
                try:
                    connection, _ = server.accept()
                    connection.settimeout(5.0)
                    if connection.recv(len(token), socket.MSG_WAITALL) == token:
                        self._keep(connection)
                    else:
                        connection.close()
                except OSError:
                    continue
        if len(self._connections) < comm.world_size() - 1:
            _say(f"only {len(self._connections)} of {comm.world_size() - 1} ranks reached rank 0 to be watched")

    def _connect(self, address: tuple[str, int], token: bytes) -> None:
        try:
            connection = socket.create_connection(address, timeout=_CONNECT_S)
        except OSError as error:
            _say(f"no connection to {address[0]}:{address[1]} ({error}); a dead rank is noticed in collectives alone")
            return
        _send(connection, token)
        self._keep(connection)

    def _keep(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        self._connections.append(connection)
        if self._left.is_set():  # done before it was connected
            _send(connection, _LEAVES)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = key.fileobj
                    assert isinstance(peer, socket.socket)
                    if not _has_left(peer):
                        self._end()
                    selector.unregister(peer)

    def _end(self) -> None:
        if not self._left.wait(_GRACE_S):
            print(f"error: rank {comm.rank()}: {comm.LOST_PEER}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread, or the end of the process group, may hang in a CUDA call for ever


def _has_left(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == _LEAVES
    except OSError:
        return False


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:  # gone; who watches it says so
        return


def _say(message: str) -> None:
    print(f"warning: rank {comm.rank()}: {message}", file=sys.stderr, flush=True)
