"""The outermost layer of the API: what a request must be before any route sees it, and what every answer carries.

A pure ASGI middleware (no task per request). It gives every request an id; refuses what is too long, too large, from
the wrong host or without its key; puts a deadline on bodies (uvicorn has none: a `Content-Length: 10^20` would hang for
ever); answers HEAD wherever GET is answered; sets the security headers; counts answers; and writes one log line for
each request, never a body, a header or a query.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access import authenticate
from app.api.problems import ProblemResponse, error_of
from app.errors import (
    HeadersTooLarge,
    HostNotAllowed,
    MalformedRequest,
    RequestError,
    RequestTimeout,
    TooLarge,
    Unauthorized,
    UriTooLong,
)
from app.settings import Settings

log = structlog.get_logger("espalier.api")

LONGEST_URI = 8192
MOST_HEADERS = 100
LONGEST_HEADERS = 32 * 1024
SMALL_BODY = 64 * 1024
BODY_S = 10.0
UPLOAD_SILENCE_S = 30.0
UPLOAD_BYTES_PER_S = 64 * 1024
LINGER_S = 2.0  # how long a client that still sends may take to read its refusal before the connection is closed
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
HEAD = "espalier.head"  # scope key: a HEAD is answered as a GET; a response that streams may omit its body
UPLOADS = frozenset({"/v1/datasets", "/v1/weights"})
_HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_SPECS = frozenset({"/v1/jobs", "/v1/jobs/validate"})

ANSWER_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)

Observe = Callable[[str, str, int, float], None]  # method, route template, status, seconds to the first byte


@dataclass
class Exchange:
    """One request and its answer while they pass through `RequestGuard`."""

    scope: Scope
    receive: Receive
    send: Send
    request_id: str
    limit: int
    upload: bool
    head: bool
    complete: bool  # the whole body of the request has come
    withheld: bool  # `Expect: 100-continue`: the body comes only when it is read for the first time
    began: float = field(default_factory=time.monotonic)
    received: int = 0
    status: int = 0
    seconds: float = 0.0
    closing: bool = False

    async def receive_message(self) -> Message:
        """The next message of the request; bodies have a deadline and a limit until the answer begins.

        Raises RequestTimeout, TooLarge.
        """
        if self.complete or self.status:
            message = await self.receive()
            self._count_received(message)
            return message
        self.withheld = False
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._patience_s()):
                message = await self.receive()
        except TimeoutError as exc:
            raise RequestTimeout() from exc
        self._count_received(message)
        if self.received > self.limit:
            raise too_large(self.limit)
        return message

    async def send_message(self, message: Message) -> None:
        """Send one message of the answer: headers added, no body for HEAD, no cut-off while the client still sends."""
        if message["type"] == "http.response.start":
            await self._start_answer(message)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            if self.closing:
                await self.send({**self._without_head_body(message), "more_body": True})
                await self._discard_body(LINGER_S)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await self.send(self._without_head_body(message))
        else:
            await self.send(self._without_head_body(message))

    async def _start_answer(self, message: Message) -> None:
        self.status = int(message["status"])
        self.seconds = time.monotonic() - self.began
        headers = list(message.get("headers", ()))
        present = {name.lower() for name, _ in headers}
        headers += [pair for pair in ANSWER_HEADERS if pair[0] not in present]
        headers.append((b"x-request-id", self.request_id.encode()))
        if not self.complete:
            await self._discard_body(0.05)  # a small body that is under way already need not cost the connection
        if not self.complete:
            self.closing = True
            headers.append((b"connection", b"close"))
        await self.send({**message, "headers": headers})

    async def _discard_body(self, seconds: float) -> None:
        """Read and drop what the client still sends, so that it reads our answer instead of a reset connection."""
        if self.withheld:
            return
        try:
            async with asyncio.timeout(seconds):
                while not self.complete:
                    self._count_received(await self.receive())
        except TimeoutError:
            return

    def _count_received(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.complete = True
        elif message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.complete = self.complete or not message.get("more_body", False)

    def _patience_s(self) -> float:
        """Seconds to wait for the next piece of the body."""
        age = time.monotonic() - self.began
        if not self.upload:
            return BODY_S - age
        return min(UPLOAD_SILENCE_S, UPLOAD_SILENCE_S + self.received / UPLOAD_BYTES_PER_S - age)

    def _without_head_body(self, message: Message) -> Message:
        return {**message, "body": b""} if self.head else message


class RequestGuard:
    """The ASGI middleware; it calls `observe` for every answer."""

    def __init__(self, app: ASGIApp, settings: Settings, observe: Observe) -> None:
        self.app = app
        self._settings = settings
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request through the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = self._open_exchange(scope, receive, send)
        try:
            self._check_request(exchange.scope, exchange.limit)
        except RequestError as error:
            await self._answer_error(exchange, error)
        else:
            await self._run_application(exchange)
        self._record_answer(exchange)

    async def _run_application(self, exchange: Exchange) -> None:
        try:
            await self.app(exchange.scope, exchange.receive_message, exchange.send_message)
        except ClientDisconnect:
            exchange.status = exchange.status or 499
        except Exception as exc:
            log.exception("request failed", request_id=exchange.request_id, route=route_of(exchange.scope))
            if exchange.status:
                raise  # half an answer was sent: the server cuts the connection, so that it is not taken for a whole one
            await self._answer_error(exchange, error_of(exc))

    async def _answer_error(self, exchange: Exchange, error: RequestError) -> None:
        response = ProblemResponse(error, exchange.request_id)
        if isinstance(error, Unauthorized) and not exchange.scope["path"].startswith("/v1"):
            response.headers["WWW-Authenticate"] = 'Basic realm="espalier"'
        await response(exchange.scope, exchange.receive_message, exchange.send_message)

    def _record_answer(self, exchange: Exchange) -> None:
        method = "HEAD" if exchange.head else str(exchange.scope["method"])
        route = route_of(exchange.scope)
        self._observe(method, route, exchange.status, exchange.seconds)
        log.info(
            "request",
            request_id=exchange.request_id,
            method=method,
            route=route,
            status=exchange.status,
            ms=round(exchange.seconds * 1000, 1),
        )

    def _open_exchange(self, scope: Scope, receive: Receive, send: Send) -> Exchange:
        head = scope["method"] == "HEAD"
        scope = {**scope, HEAD: head, "method": "GET" if head else scope["method"]}
        scope["state"] = {**scope.get("state", {}), "request_id": (request_id := f"req_{secrets.token_hex(8)}")}
        upload = scope["method"] == "POST" and scope["path"] in UPLOADS
        small = self._settings.max_spec_bytes if scope["method"] == "POST" and scope["path"] in _SPECS else SMALL_BODY
        declared = any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
            for name, value in scope["headers"]
        )
        return Exchange(
            scope=scope,
            receive=receive,
            send=send,
            request_id=request_id,
            limit=self._settings.max_upload_bytes if upload else small,
            upload=upload,
            head=head,
            complete=not declared,
            withheld=declared and any(name == b"expect" for name, _ in scope["headers"]),
        )

    def _check_request(self, scope: Scope, limit: int) -> None:
        """Raise the error of a request that no route needs to see, and note its tenant."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"]) > LONGEST_URI:
            raise UriTooLong()
        if len(headers) > MOST_HEADERS or sum(len(name) + len(value) + 4 for name, value in headers) > LONGEST_HEADERS:
            raise HeadersTooLarge()
        if any(byte in value for _, value in headers for byte in (b"\0", b"\r", b"\n")):
            raise MalformedRequest("a header holds a control character")
        self._check_host(_values(headers, b"host"))
        self._check_length(_values(headers, b"content-length"), limit)
        self._check_key(scope, _values(headers, b"authorization"))

    def _check_host(self, hosts: list[bytes]) -> None:
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise MalformedRequest("the request needs exactly one valid Host header")
        if self._settings.api_key is None and match[1].decode().strip("[]").lower() not in LOOPBACK:
            # A page on the internet whose name resolves to 127.0.0.1 (DNS rebinding) sends its own name here.
            raise HostNotAllowed()

    def _check_length(self, lengths: list[bytes], limit: int) -> None:
        if not lengths:
            return
        if len(lengths) > 1 or not re.fullmatch(rb"[0-9]+", lengths[0]):
            raise MalformedRequest("the Content-Length is not one number")
        if len(lengths[0]) > 18 or int(lengths[0]) > limit:
            raise too_large(limit)

    def _check_key(self, scope: Scope, credentials: list[bytes]) -> None:
        """Note the tenant. Raises Unauthorized. Pages take the key as HTTP Basic's password, as browsers send it."""
        path = scope["path"]
        if path.startswith("/v1"):
            sent = credentials[0] if len(credentials) == 1 else None
        elif path == "/" or path.startswith("/jobs/"):
            sent = b"Bearer " + _password(credentials[0]) if len(credentials) == 1 else None
        else:
            return
        scope["state"]["tenant"] = authenticate(self._settings.api_key, sent)


def too_large(limit: int) -> TooLarge:
    """The error for a body over `limit` bytes."""
    return TooLarge(f"the body is larger than {limit} bytes, the most that this address takes")


def route_of(scope: Scope) -> str:
    """The template of the route that answers, or "other": addresses are the client's text, never logged or counted."""
    return str(getattr(scope.get("route"), "path", "other"))


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _password(credentials: bytes) -> bytes:
    """The password of HTTP Basic credentials; empty when they are something else."""
    scheme, _, encoded = credentials.partition(b" ")
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True)
    except binascii.Error:
        return b""
    return decoded.partition(b":")[2] if scheme.lower() == b"basic" else b""
