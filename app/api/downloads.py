"""Stored bytes as answers: one range, `If-Range`, `If-None-Match`, HEAD (RFC 9110), the same over every object store.

Starlette's FileResponse serves local paths only and knows no 304. Several ranges, malformed ones and other units are
ignored and the whole file is sent, as RFC 9110 section 14.2 allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.middleware import HEAD
from app.api.problems import ProblemResponse, request_id
from app.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class StoredFile:
    """A file that can be downloaded; `read(start, end)` gives its bytes [start, end) in pieces."""

    name: str
    media_type: str
    size_bytes: int
    sha256: str
    read: Callable[[int, int], Iterator[bytes]]


class StreamedResponse(StreamingResponse):
    """A stream that a HEAD request does not start."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; to HEAD its headers alone."""
        if scope.get(HEAD):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b""})
        else:
            await super().__call__(scope, receive, send)


def answer_download(request: Request, file: StoredFile) -> Response:
    """The answer to a GET of `file`: 200, 206, 304 or 416. The first chunk is read before the answer begins."""
    etag = f'"{file.sha256}"'
    headers = {"ETag": etag, "Cache-Control": "private, immutable, max-age=31536000", "Accept-Ranges": "bytes"}
    if matches_etag(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range") if request.headers.get("if-range", etag) == etag else None
    try:
        span = parse_range(wanted, file.size_bytes)
    except RangeNotSatisfiable as error:
        return ProblemResponse(error, request_id(request.scope), {"Content-Range": f"bytes */{file.size_bytes}"})
    start, end = span or (0, file.size_bytes)
    headers |= {
        "Content-Disposition": content_disposition(file.name),
        "Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
        "Content-Length": str(end - start),
        "Content-Type": file.media_type,
    }
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size_bytes}"
    pieces: Iterator[bytes] = iter(())
    if end > start and not request.scope.get(HEAD):
        pieces = file.read(start, end)
        pieces = chain([next(pieces)], pieces)  # a lost object or an absent store gives an error, not half a file
    return StreamedResponse(pieces, status_code=200 if span is None else 206, headers=headers)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [start, end) that a Range header asks for; None: the whole file.

    Raises:
        RangeNotSatisfiable: it begins at or after the end, or asks for the last 0 bytes.
    """
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiable(f"the range begins after the end: the file has {size} bytes")
    return start, end


def matches_etag(header: str | None, etag: str) -> bool:
    """True if an If-None-Match or If-Match header names `etag` or is `*`; compared weakly."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def content_disposition(name: str) -> str:
    """Content-Disposition of a file to be saved under `name`."""
    if _PLAIN_NAME.fullmatch(name):
        return f'attachment; filename="{name}"'
    return f"attachment; filename*=utf-8''{quote(name, safe='')}"
