"""Errors as `application/problem+json` (RFC 9457): one renderer for ours, FastAPI's and Starlette's.

Of the request only what a fault names on purpose (`value`) is echoed, if it is small and is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from app.errors import (
    Fault,
    IllegalTransition,
    InvalidHeader,
    InvalidParameter,
    JsonValue,
    MalformedRequest,
    NotFound,
    RequestError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from app.validation.faults import MOST_FAULTS

log = structlog.get_logger("espalier.api")

MEDIA_TYPE = "application/problem+json"

LONGEST_POINTER = 300
LONGEST_SENTENCE = 1000
LONGEST_VALUE = 200
_EXACT_INT = 2**53  # what every JSON reader keeps exactly


class MethodNotAllowed(RequestError):
    """This address does not take this method."""

    code = "method_not_allowed"
    status = 405
    title = "Method not allowed"


class Internal(RequestError):
    """Something went wrong here, not in your request: report the request_id."""

    code = "internal"
    status = 500
    title = "Internal error"


class ProblemResponse(Response):
    """One error as an answer."""

    media_type = MEDIA_TYPE

    def __init__(self, error: RequestError, request_id: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(problem_document(error, request_id), ensure_ascii=True, allow_nan=False).encode()
        super().__init__(body, status_code=error.status, headers={**_headers(error), **(headers or {})})


def problem_document(error: RequestError, request_id: str) -> dict[str, JsonValue]:
    """RFC 9457's members, `code`, `request_id`, at most 100 `errors`; `illegal_transition` adds `state`, `allowed`."""
    document: dict[str, JsonValue] = {
        "type": f"/docs/errors#{error.code}",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": _shorten(error.message, LONGEST_SENTENCE),
        "request_id": request_id,
        "errors": [_fault_document(fault) for fault in error.faults[:MOST_FAULTS]],
    }
    if isinstance(error, IllegalTransition):
        document["state"] = error.state
        document["allowed"] = list(error.allowed)
    return document


def error_of(exc: Exception) -> RequestError:
    """The error to answer with for any exception of a route; an unknown one is `Internal`."""
    if isinstance(exc, RequestError):
        return exc
    if isinstance(exc, RequestValidationError):
        return _parameter_error(exc)
    if isinstance(exc, HTTPException):
        return _http_error(exc)
    return Internal()


def request_id(scope: Scope) -> str:
    """The id under which this request is logged."""
    return str(scope.get("state", {}).get("request_id", ""))


def install_handlers(app: FastAPI) -> None:
    """Render what routes refuse as problems; `RequestGuard` logs and renders an unknown exception."""
    for kind in (RequestError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_problem)


async def _answer_problem(request: Request, exc: Exception) -> Response:
    error = error_of(exc)
    if isinstance(error, Unavailable):
        log.warning("backend unavailable", request_id=request_id(request.scope), error=repr(exc)[:500])
    headers = exc.headers if isinstance(exc, HTTPException) else None
    return ProblemResponse(error, request_id(request.scope), headers)


def _headers(error: RequestError) -> dict[str, str]:
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    after = getattr(error, "retry_after_s", None)
    return {} if after is None else {"Retry-After": str(after)}


def _http_error(exc: HTTPException) -> RequestError:
    known: dict[int, type[RequestError]] = {404: NotFound, 405: MethodNotAllowed, 413: TooLarge}
    if exc.status_code in known:
        return known[exc.status_code]()
    return Internal() if exc.status_code >= 500 else MalformedRequest()


def _parameter_error(exc: RequestValidationError) -> RequestError:
    """Parameters that FastAPI refused; an address it refused is unknown."""
    faults = []
    kinds = set()
    for problem in exc.errors():
        place, *names = problem["loc"]
        kinds.add(place)
        context = problem.get("ctx", {})
        limit = next((context[key] for key in ("ge", "le", "gt", "lt", "pattern", "expected") if key in context), None)
        message = problem["msg"].removeprefix("Value error, ")
        faults.append(Fault("/".join(["", str(place), *map(str, names)]), message, limit=_small_json(limit)))
    if "path" in kinds:
        return NotFound()
    kind = InvalidHeader if kinds == {"header"} else InvalidParameter
    return kind("; ".join(f"{fault.pointer[1:]}: {fault.message}" for fault in faults[:3]), faults)


def _fault_document(fault: Fault) -> dict[str, JsonValue]:
    """The fault's document, without what is long or what JSON cannot say."""
    document: dict[str, JsonValue] = {
        "pointer": fault.pointer[:LONGEST_POINTER],
        "message": _shorten(fault.message, LONGEST_SENTENCE),
    }
    for name, value in (("limit", _small_json(fault.limit)), ("value", _small_json(fault.value))):
        if value is not None:
            document[name] = value
    return document


def _small_json(value: Any) -> JsonValue:
    """`value` if it is small and exact in JSON, a long text cut; else None, and it is left out."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return _shorten(value, LONGEST_VALUE)
    if isinstance(value, int):
        return value if abs(value) <= _EXACT_INT else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)) and len(value) <= 100:
        members = [_small_json(member) for member in value]
        return None if len(json.dumps(members)) > LONGEST_SENTENCE else members
    return None


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
