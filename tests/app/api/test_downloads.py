"""Ranges, conditions and names of downloads, without any store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from app.api.downloads import StoredFile, answer_download, content_disposition, parse_range
from app.api.middleware import HEAD
from app.errors import NotFound, RangeNotSatisfiable

CONTENT = b"0123456789"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def _read(start: int, end: int) -> Iterator[bytes]:
    for place in range(start, end, 3):
        yield CONTENT[place : min(place + 3, end)]


FILE = StoredFile("pruned.onnx", "application/octet-stream", len(CONTENT), SHA256, _read)


def _answer(headers: dict[str, str], *, head: bool = False, file: StoredFile = FILE) -> tuple[Response, bytes]:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": raw, "state": {}, HEAD: head}
    scope["asgi"] = {"spec_version": "2.4"}
    response = answer_download(Request(scope), file)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    asyncio.run(response(scope, receive, send))
    return response, b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=2-4", (2, 5)),
        ("bytes=7-", (7, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=5-999", (5, 10)),
        ("bytes=5-2", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes=1-1-1", None),
        ("bytes=1-2,4-5", None),
        ("bytes=" + ",".join("0-1" for _ in range(2000)), None),
        ("items=0-2", None),
        ("bytes=" + "9" * 5000 + "-", None),
        ("bytes=²-3", None),
        ("bytes=٣-٤", None),
        ("", None),
    ],
)
def test_a_range_is_one_well_formed_span_and_anything_else_is_the_whole_file(header, span):
    assert parse_range(header, 10) == span


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-12", "bytes=999999-", "bytes=-0"])
def test_a_range_behind_the_end_is_416_with_the_size(header):
    with pytest.raises(RangeNotSatisfiable, match="the file has 10 bytes"):
        parse_range(header, 10)
    response, _ = _answer({"Range": header})
    assert response.status_code == 416
    assert response.headers["content-range"] == "bytes */10"


def test_an_empty_file_has_no_range_but_can_be_fetched_whole():
    empty = StoredFile("empty", "text/plain", 0, SHA256, _read)
    response, body = _answer({}, file=empty)
    assert (response.status_code, body) == (200, b"")
    with pytest.raises(RangeNotSatisfiable):
        parse_range("bytes=0-", 0)


def test_the_whole_file_comes_with_its_hash_as_etag():
    response, body = _answer({})
    assert (response.status_code, body) == (200, CONTENT)
    assert response.headers["etag"] == f'"{SHA256}"'
    assert response.headers["content-length"] == "10"
    assert response.headers["content-disposition"] == 'attachment; filename="pruned.onnx"'
    assert "sandbox" in response.headers["content-security-policy"]
    assert "immutable" in response.headers["cache-control"]


def test_a_part_of_the_file_says_which_part_it_is():
    response, body = _answer({"Range": "bytes=2-5"})
    assert (response.status_code, body) == (206, b"2345")
    assert response.headers["content-range"] == "bytes 2-5/10"
    assert response.headers["content-length"] == "4"


@pytest.mark.parametrize("condition", [f'"{SHA256}"', f'W/"{SHA256}"', f'"old", "{SHA256}"', "*"])
def test_a_file_that_the_client_has_is_304_without_a_body(condition):
    response, body = _answer({"If-None-Match": condition})
    assert (response.status_code, body) == (304, b"")
    assert response.headers["etag"] == f'"{SHA256}"'


@pytest.mark.parametrize("condition", ['"old"', "junk", ",".join(f'"{n}"' for n in range(3000))])
def test_a_file_that_the_client_does_not_have_is_sent(condition):
    assert _answer({"If-None-Match": condition})[0].status_code == 200


@pytest.mark.parametrize("condition", ['"old"', f'W/"{SHA256}"', "junk", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_range_of_another_version_is_the_whole_file(condition):
    response, body = _answer({"Range": "bytes=2-5", "If-Range": condition})
    assert (response.status_code, body) == (200, CONTENT)


def test_a_range_of_the_same_version_is_honoured():
    response, body = _answer({"Range": "bytes=2-5", "If-Range": f'"{SHA256}"'})
    assert (response.status_code, body) == (206, b"2345")


def test_head_reads_nothing_and_has_the_headers_of_get():
    def unreadable(start: int, end: int) -> Iterator[bytes]:
        raise AssertionError("HEAD does not read")

    response, body = _answer(
        {"Range": "bytes=2-5"}, head=True, file=StoredFile("a", "text/plain", 10, SHA256, unreadable)
    )
    assert (response.status_code, body, response.headers["content-length"]) == (206, b"", "4")


def test_an_object_that_is_gone_is_an_error_before_the_answer_begins():
    def gone(start: int, end: int) -> Iterator[bytes]:
        raise NotFound()
        yield b""

    with pytest.raises(NotFound):
        _answer({}, file=StoredFile("a", "text/plain", 10, SHA256, gone))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("model.py", 'attachment; filename="model.py"'),
        ('a"b\r\n', "attachment; filename*=utf-8''a%22b%0D%0A"),
        ("größe.onnx", "attachment; filename*=utf-8''gr%C3%B6%C3%9Fe.onnx"),
    ],
)
def test_a_name_cannot_break_out_of_its_header(name, header):
    assert content_disposition(name) == header
