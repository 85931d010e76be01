"""Request bodies: strict JSON, and nothing else where JSON is wanted."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic_core import from_json

from app.errors import DuplicateKey, Fault, InvalidJson, InvalidSpec, UnsupportedMediaType

DEEPEST = 64
_JSON_TYPE = re.compile(r"\s*application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class JsonBody:
    """One JSON body: the bytes as they came (an idempotency key is bound to them) and the document in them."""

    raw: bytes
    document: object


async def read_json(request: Request) -> bytes:
    """The body's bytes, for `parse_json` to read in a thread.

    Raises:
        UnsupportedMediaType: the Content-Type is not JSON, or the body is compressed.
        TooLarge, RequestTimeout: from `RequestGuard`, while reading.
    """
    refuse_encoding(request)
    if not _JSON_TYPE.fullmatch(request.headers.get("content-type", "")):
        raise UnsupportedMediaType()
    return await request.body()


JsonBytes = Annotated[bytes, Depends(read_json)]


def refuse_encoding(request: Request) -> None:
    """Raise UnsupportedMediaType for a compressed body: a kilobyte of it can hold a gigabyte."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("a compressed body is not accepted: send it without Content-Encoding")


def parse_json(raw: bytes) -> JsonBody:
    """The document in `raw`.

    Raises:
        InvalidJson: not one JSON document (NaN, lone surrogates, a byte order mark, UTF-16, more than 200 levels, ...).
        DuplicateKey: an object names a key twice; other readers would silently take one of them.
        InvalidSpec: nested deeper than 64 levels.
    """
    try:
        document = from_json(raw, allow_inf_nan=False)
    except ValueError as exc:
        raise InvalidJson(f"the body is not valid JSON: {_parser_message(exc)}") from exc
    if raw.count(b"[") + raw.count(b"{") > DEEPEST:
        _refuse_depth(document)
    json.loads(raw, object_pairs_hook=_refuse_duplicates)
    return JsonBody(raw, document)


def _parser_message(exc: ValueError) -> str:
    """The parser's sentence, which names a line and a column and quotes nothing."""
    return str(exc).split("\n", 1)[0][:200]


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise DuplicateKey(f"an object of the body names the key {json.dumps(key[:100])} twice: name it once")
        seen.add(key)


def _refuse_depth(document: object) -> None:
    level = [document]
    for _ in range(DEEPEST + 1):
        if not level:
            return
        level = [member for value in level for member in _members(value).values() if isinstance(member, (dict, list))]
    raise InvalidSpec([Fault(_deep_pointer(document), f"is nested deeper than {DEEPEST} levels", limit=DEEPEST)])


def _deep_pointer(document: object) -> str:
    """The pointer of a value at level 65, found by descending one branch after the other."""
    branches: list[tuple[str, int, object]] = [("", 0, document)]
    while branches:
        pointer, depth, value = branches.pop()
        if depth == DEEPEST:
            return pointer
        branches += [
            (f"{pointer}/{_escape(str(key))}", depth + 1, member)
            for key, member in _members(value).items()
            if isinstance(member, (dict, list))
        ]
    raise AssertionError("only called for a document that is too deep")


def _members(value: object) -> dict[Any, object]:
    return value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}


def _escape(key: str) -> str:
    return key[:100].replace("~", "~0").replace("/", "~1")
