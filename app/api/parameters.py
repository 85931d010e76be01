"""What addresses, queries and headers may hold: strict types, and nothing that the route does not know.

pydantic reads "1_0", " 5" and "5.0" as integers, FastAPI takes the last of two equal names and ignores unknown ones.
"""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

from fastapi import Header, Path, Query, Request
from fastapi.dependencies.models import Dependant
from pydantic import BeforeValidator
from starlette.datastructures import Headers

from app.api.downloads import matches_etag
from app.errors import (
    Fault,
    InvalidHeader,
    InvalidIdempotencyKey,
    InvalidParameter,
    JobNotFound,
    MalformedRequest,
    NotFound,
    PreconditionFailed,
)
from app.validation.strict import TEXT_LENGTH

LARGEST_LIMIT = 2**31 - 1
LONGEST_WAIT_S = 60
_DIGITS = re.compile(r"[0-9]{1,18}")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_ID = re.compile(r"[a-z]{2,8}_[0-9a-z]{26}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_NO_SUCH = {"ds": "there is no such data set", "wt": "there are no such weights"}
_LABEL = re.compile(rf"([^:]{{1,{TEXT_LENGTH}}}):(.{{0,{TEXT_LENGTH}}})", re.DOTALL)


def _digits(value: Any) -> Any:
    if isinstance(value, str) and not _DIGITS.fullmatch(value):
        raise ValueError("must be digits alone")
    return value


def _seconds(value: Any) -> Any:
    if isinstance(value, str) and not _SECONDS.fullmatch(value):
        raise ValueError("must be a number of seconds")
    return value


Limit = Annotated[int, BeforeValidator(_digits), Query(ge=1, le=LARGEST_LIMIT, description="Most items in the answer.")]
After = Annotated[
    int, BeforeValidator(_digits), Query(ge=0, le=10**18 - 1, description="Only events with a higher seq.")
]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before, with the same filters.")]
WaitS = Annotated[
    float | None,
    BeforeValidator(_seconds),
    Query(ge=0, le=LONGEST_WAIT_S, description="Hold the answer until the job changes, at most so many seconds."),
]
JobId = Annotated[str, Path(description="The job's id.")]
WeightsId = Annotated[str, Path(description="The id of the weights.")]
DatasetId = Annotated[str, Path(description="The data set's id.")]
IdempotencyKey = Annotated[
    str | None, Header(description="1 to 255 visible ASCII characters. Same key and body: the same job, for 7 days.")
]
LastEventId = Annotated[str | None, Header(description="The last `id` that was received: the stream goes on after it.")]
IfNoneMatch = Annotated[str | None, Header(description="ETag of the version the client has: 304 if it is the newest.")]
IfMatch = Annotated[str | None, Header(description="ETag of the version this is meant for: 412 if it has changed.")]


async def refuse_unknown_query(request: Request) -> None:
    """Refuse query parameters that the route does not know, that come twice, or that are not UTF-8.

    Raises InvalidParameter.
    """
    query: bytes = request.scope["query_string"]
    if not query:
        return
    known = _query_names(request.scope["route"].dependant)
    seen = set()
    for pair in query.split(b"&"):
        name = _decoded(pair.partition(b"=")[0])
        _decoded(pair)
        if name not in known:
            raise InvalidParameter(
                "unknown query parameter"
                + (f"; known here: {', '.join(sorted(known))}" if known else ": this address takes none")
            )
        if name in seen:
            raise _invalid(name, "is given twice")
        seen.add(name)


def check_id(kind: str, value: str) -> str:
    """`value`, if it has the form of our ids. Raises NotFound if not, as for any id that does not exist."""
    if not is_id(kind, value):
        raise JobNotFound() if kind == "job" else NotFound(_NO_SUCH[kind])
    return value


def is_id(kind: str, value: str) -> bool:
    """Whether `value` has the form of our ids."""
    return value.startswith(f"{kind}_") and _ID.fullmatch(value) is not None


def parse_label(label: str | None) -> tuple[str, str] | None:
    """`k:v` as (k, v). Raises InvalidParameter."""
    if label is None:
        return None
    match = _LABEL.fullmatch(label)
    if match is None or not label.isprintable():
        raise _invalid("label", f"must be key:value, each of at most {TEXT_LENGTH} printable characters")
    return match[1], match[2]


def parse_last_event_id(value: str | None) -> int | None:
    """The number in Last-Event-ID. Raises InvalidHeader."""
    if value is None:
        return None
    if not _DIGITS.fullmatch(value):
        raise InvalidHeader(
            "Last-Event-ID must be the id of an event: digits alone",
            [Fault("/header/Last-Event-ID", "must be digits alone")],
        )
    return int(value)


def read_idempotency_key(headers: Headers) -> str | None:
    """The key, bare or in one pair of quotes (the draft's form). Raises InvalidIdempotencyKey, MalformedRequest."""
    values = headers.getlist("idempotency-key")
    if not values:
        return None
    if len(values) > 1:
        raise MalformedRequest("Idempotency-Key is given twice")
    key = values[0]
    if len(key) > 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidIdempotencyKey()
    return key


def check_match(if_match: str | None, etag: str) -> None:
    """Raise PreconditionFailed if If-Match names another version."""
    if if_match is not None and not matches_etag(if_match, etag):
        raise PreconditionFailed()


def _invalid(name: str, message: str) -> InvalidParameter:
    return InvalidParameter(f"{name} {message}", [Fault(f"/query/{name}", message)])


def _decoded(raw: bytes) -> str:
    try:
        if _BAD_PERCENT.search(raw):
            raise ValueError("a lone percent sign")
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode("utf-8")
    except ValueError as exc:
        raise InvalidParameter("the query is not percent-encoded UTF-8") from exc


def _query_names(dependant: Dependant) -> set[str]:
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(inner) for inner in dependant.dependencies))
