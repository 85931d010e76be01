"""A TCP proxy that a test puts before a server, to cut connections at a chosen word."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 16


class Proxy:
    """Forwards bytes both ways; `cut` breaks the next connection whose client says a word."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._cut: tuple[bytes, Literal["before", "after"]] | None = None
        self.cuts = 0
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self, word: bytes, when: Literal["before", "after"]) -> None:
        """Break one connection when its client sends `word`: before the server has it, or after and unanswered."""
        self._cut = (word, when)

    def close(self) -> None:
        """End all connections and threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for one in self._sockets:
            _end(one)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection((HOST, self._target_port))
                self._sockets += [client, server]
                muted = threading.Event()
                for source, sink, talks in ((client, server, True), (server, client, False)):
                    thread = threading.Thread(target=self._forward, args=(source, sink, talks, muted))
                    self._threads.append(thread)
                    thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket, talks: bool, muted: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                cut = self._cut
                if talks and cut is not None and cut[0] in data:
                    self._cut = None
                    self.cuts += 1
                    muted.set()
                    if cut[1] == "after":
                        sink.sendall(data)
                        time.sleep(0.2)  # the server has time to do what it was told
                    break
                if talks or not muted.is_set():
                    sink.sendall(data)
        _end(source)
        _end(sink)


@contextmanager
def proxy(target_port: int) -> Iterator[Proxy]:
    """A proxy before a port of loopback."""
    between = Proxy(target_port)
    try:
        yield between
    finally:
        between.close()


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
