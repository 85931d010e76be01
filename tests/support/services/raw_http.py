"""HTTP by hand: bytes to a port, the answer's status, headers and body back. Clients refuse to send what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from app.api.server import ApiServer
from app.settings import Settings


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came; status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        """The body as a problem document."""
        assert self.headers["content-type"] == "application/problem+json", self
        document = json.loads(self.body)
        assert document["status"] == self.status
        return document


def send_raw(port: int, request: bytes, *, timeout_s: float = 15, then: bytes = b"", pause: Any = None) -> RawAnswer:
    """The answer to `request`, followed after `pause()` by `then`: all until the server closes or the body is whole."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
            if pause is not None:
                pause()
                connection.sendall(then)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while not _whole(received) and (piece := connection.recv(65536)):
                received += piece
    return _parse(received)


def _whole(received: bytes) -> bool:
    head, separator, body = _final(received).partition(b"\r\n\r\n")
    if not separator:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return False


def _final(received: bytes) -> bytes:
    """The answer after a `100 Continue`."""
    return received.partition(b"\r\n\r\n")[2] if received.startswith(b"HTTP/1.1 100") else received


def _parse(received: bytes) -> RawAnswer:
    if not received:
        return RawAnswer(0, {}, b"")
    head, _, body = _final(received).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return RawAnswer(int(first.split(" ")[1]), headers, body)


@contextlib.contextmanager
def serving(app: FastAPI, settings: Settings, stopping: asyncio.Event | None = None) -> Iterator[int]:
    """The port of a real server that runs the application in a thread of this process; it sets `stopping` at its end."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = ApiServer(app, settings, stopping or asyncio.Event())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.01)
        yield port
    finally:
        server.handle_exit(15, None)
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"
        listener.close()
