"""uvicorn as this API needs it: exact limits, a deadline on request heads, streams that end when the server stops."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.settings import Settings

HEAD_S = 10.0
M_ARENA_MAX = -8  # malloc.h
LONGEST_HEAD = 128 * 1024  # `RequestGuard` answers from 32 KiB on; here the connection is cut


class GuardedHttp(HttpToolsProtocol):
    """HTTP with a deadline and a limit for a request's head: uvicorn waits for ever and reads without end."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start the clock again with a request's first byte: its head has ten seconds."""
        super().on_message_begin()
        self._head_bytes = 0
        self._start_clock()

    def on_url(self, url: bytes) -> None:
        """Count a part of the address."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header."""
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock; `RequestGuard` guards the body."""
        self._stop_clock()
        super().on_headers_complete()

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > LONGEST_HEAD:
            raise ValueError("the head of the request is too large")  # httptools answers 400 and closes

    def _start_clock(self) -> None:
        self._stop_clock()
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def serve_options(settings: Settings) -> dict[str, Any]:
    """Arguments of `uvicorn.Config`. httptools: h11 took an address of 70 KB and hung on a huge chunk."""
    return {
        "host": settings.host,
        "port": settings.port,
        "http": GuardedHttp,
        "ws": "none",
        "loop": "uvloop",
        "lifespan": "on",
        "limit_concurrency": 512,
        "backlog": 512,
        "timeout_keep_alive": 5,
        "timeout_graceful_shutdown": 10,
        "server_header": False,
        "access_log": False,
        "proxy_headers": False,
        "log_config": None,
        "log_level": logging.WARNING,
    }


def bound_arenas() -> None:
    """Let malloc use two arenas (glibc): with one for each of 40 threads, 300 busy requests took 13 MiB more."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 2)


class ApiServer(uvicorn.Server):
    """The API's server: prints when it is ready, and ends event streams before it waits for connections."""

    def __init__(self, app: FastAPI, settings: Settings, stopping: asyncio.Event) -> None:
        bound_arenas()
        super().__init__(uvicorn.Config(app, **serve_options(settings)))
        self._stopping = stopping
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then print the address, which tells whoever started the service that it is ready."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            host, port = (sockets or self.servers[0].sockets)[0].getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the streams, then the server. The lifespan's shutdown is too late: it comes after the connections."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        super().handle_exit(sig, frame)
